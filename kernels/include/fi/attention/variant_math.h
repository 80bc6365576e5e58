// Arithmetic of variant functions: what the text printed from Python calls.
//
// Three number types, float, int32_t and bool. Integers wrap like two's complement everywhere, and
// division by zero gives 0, so that host, device and the torch oracle agree on every input. The
// elementary functions have no branches and no library calls: a loop over them vectorises. Their
// polynomials are weighted least-squares fits of our own; on the device the built-in functions are
// as accurate and faster.
#pragma once

#include "fi/core/types.h"

// Printed functions and what they call must end up inside the loop that is compiled for one
// instruction set: a call out of it would stop vectorisation.
#if defined(__CUDACC__)
#define FI_VARIANT_FN FI_HOST_DEVICE __forceinline__
#else
#define FI_VARIANT_FN [[gnu::always_inline]] inline
#endif

namespace fi::variants {

FI_VARIANT_FN float from_bits(int32_t bits) {
#if defined(__CUDA_ARCH__)
  return __int_as_float(bits);
#else
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

FI_VARIANT_FN int32_t to_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_int(value);
#else
  int32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

FI_VARIANT_FN int32_t wrap(uint32_t value) { return static_cast<int32_t>(value); }
FI_VARIANT_FN uint32_t unwrap(int32_t value) { return static_cast<uint32_t>(value); }

FI_VARIANT_FN float to_f32(int32_t x) { return static_cast<float>(x); }
FI_VARIANT_FN float to_f32(bool x) { return x ? 1.0f : 0.0f; }
FI_VARIANT_FN int32_t to_i32(bool x) { return x ? 1 : 0; }

template <class T>
FI_VARIANT_FN T select(bool condition, T yes, T no) {
  return condition ? yes : no;
}
template <class T>
FI_VARIANT_FN T minimum(T a, T b) {
  return a < b ? a : b;
}
template <class T>
FI_VARIANT_FN T maximum(T a, T b) {
  return a > b ? a : b;
}

FI_VARIANT_FN int32_t add(int32_t a, int32_t b) { return wrap(unwrap(a) + unwrap(b)); }
FI_VARIANT_FN int32_t sub(int32_t a, int32_t b) { return wrap(unwrap(a) - unwrap(b)); }
FI_VARIANT_FN int32_t mul(int32_t a, int32_t b) { return wrap(unwrap(a) * unwrap(b)); }
FI_VARIANT_FN int32_t neg(int32_t a) { return wrap(0u - unwrap(a)); }
FI_VARIANT_FN int32_t abs(int32_t a) { return a < 0 ? neg(a) : a; }

// Rounds towards minus infinity, like Python.
FI_VARIANT_FN int32_t floor_div(int32_t a, int32_t b) {
  if (b == 0) return 0;
  if (b == -1) return neg(a);  // INT32_MIN / -1 traps
  const int32_t quotient = a / b;
  const int32_t remainder = a - quotient * b;
  return remainder != 0 && (remainder ^ b) < 0 ? quotient - 1 : quotient;
}
// Has the sign of the divisor, like Python.
FI_VARIANT_FN int32_t floor_mod(int32_t a, int32_t b) {
  return b == 0 ? 0 : sub(a, mul(floor_div(a, b), b));
}
// The shift count is taken modulo 32; shr keeps the sign.
FI_VARIANT_FN int32_t shl(int32_t a, int32_t count) { return wrap(unwrap(a) << (count & 31)); }
FI_VARIANT_FN int32_t shr(int32_t a, int32_t count) { return a >> (count & 31); }

FI_VARIANT_FN float abs(float x) { return from_bits(to_bits(x) & 0x7fffffff); }

#if defined(__CUDA_ARCH__)

FI_VARIANT_FN float sqrt(float x) { return ::sqrtf(x); }
FI_VARIANT_FN float exp(float x) { return ::expf(x); }
FI_VARIANT_FN float log(float x) { return ::logf(x); }
FI_VARIANT_FN float tanh(float x) { return ::tanhf(x); }

#else

FI_VARIANT_FN float sqrt(float x) { return __builtin_sqrtf(x); }

// exp(x) = 2^n exp(r), |r| <= ln 2 / 2. Relative error 1e-7; +-inf, NaN and denormal results too.
FI_VARIANT_FN float exp(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  constexpr float kLn2High = 0.693359375f;
  constexpr float kLn2Low = -2.12194442e-4f;
  x = x > 89.0f ? 89.0f : x;      // overflows to inf from 88.73
  x = x < -104.0f ? -104.0f : x;  // underflows to 0 from -103.97
  const float shifted = x * 1.44269502f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  float p = 0.00138145383f;
  p = p * r + 0.00836874545f;
  p = p * r + 0.0416683890f;
  p = p * r + 0.166665211f;
  p = p * r + 0.499999940f;
  p = p * (r * r) + r + 1.0f;
  // 2^n in two factors: n reaches 128 and -150, outside the exponents of a normal float.
  const int32_t exponent = sub(to_bits(shifted), to_bits(kRound));
  const int32_t half = exponent >> 1;
  return p * from_bits((half + 127) << 23) * from_bits((exponent - half + 127) << 23);
}

// log(x) = e ln 2 + log(1 + f), 1 + f in [sqrt(1/2), sqrt(2)). Relative error 1e-7.
FI_VARIANT_FN float log(float x) {
  constexpr int32_t kSqrtHalf = 0x3f3504f3;
  constexpr float kLn2High = 0.693359375f;
  constexpr float kLn2Low = -2.12194442e-4f;
  const bool denormal = x < 1.17549435e-38f;
  const int32_t bits = to_bits(denormal ? x * 8388608.0f : x);
  const int32_t exponent = (bits - kSqrtHalf) >> 23;
  const float e = to_f32(exponent) - (denormal ? 23.0f : 0.0f);
  const float f = from_bits(wrap(unwrap(bits) - (unwrap(exponent) << 23))) - 1.0f;
  float p = 0.0674659163f;
  p = p * f - 0.116756387f;
  p = p * f + 0.118881777f;
  p = p * f - 0.124055922f;
  p = p * f + 0.142195508f;
  p = p * f - 0.166679963f;
  p = p * f + 0.200021192f;
  p = p * f - 0.250000089f;
  p = p * f + 0.333333135f;
  float y = (p * f * (f * f) - 0.5f * (f * f) + e * kLn2Low) + f + e * kLn2High;
  y = x == from_bits(0x7f800000) ? x : y;
  y = x == 0.0f ? from_bits(static_cast<int32_t>(0xff800000)) : y;
  return x >= 0.0f ? y : from_bits(0x7fc00000);
}

// Odd polynomial near 0, where 1 - 2 / (exp(2 |x|) + 1) would cancel. Relative error 3e-7.
FI_VARIANT_FN float tanh(float x) {
  const float magnitude = abs(x);
  const float z = x * x;
  float p = -0.00559100742f;
  p = p * z + 0.0205388106f;
  p = p * z - 0.0537096560f;
  p = p * z + 0.133310929f;
  p = p * z - 0.333332688f;
  const float small = x + x * (p * z);
  const float large = 1.0f - 2.0f / (exp(magnitude + magnitude) + 1.0f);
  const int32_t sign = to_bits(x) & static_cast<int32_t>(0x80000000);
  return magnitude < 0.625f ? small : from_bits(to_bits(large) | sign);
}

#endif

FI_VARIANT_FN float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }

}  // namespace fi::variants
