// Integer division where it is needed often: GPUs have no instruction for it and emulate 32 bits in
// some 20 instructions, 64 bits in some 70. Exact, and the same on host and device.
#pragma once

#include "fi/core/types.h"

namespace fi {

// A divisor known before the launch, as multiplication and shift.
//   multiplier = floor(2^shift / value) + 1 with shift = 31 + ceil(log2(value)): it exceeds
//   2^shift / value by at most 1, hence n * multiplier / 2^shift exceeds n / value by less than
//   n / 2^shift <= 1 / value for n < 2^31: too little to reach the next integer.
// Example: value 5, shift 34, multiplier 3435973837; 14 * 3435973837 >> 34 = 2.
// Source: Granlund and Montgomery, Division by Invariant Integers using Multiplication, 1994.
struct Divisor {
  int32_t value;
  uint32_t multiplier;
  int32_t shift;

  // floor(n / value) and its remainder, for 0 <= n < 2^31.
  FI_HOST_DEVICE int32_t quotient(int32_t n) const {
    return static_cast<int32_t>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * multiplier >>
                                shift);
  }
  FI_HOST_DEVICE int32_t remainder(int32_t n) const { return n - quotient(n) * value; }

  FI_HOST_DEVICE int32_t ceil_quotient(int32_t n) const { return quotient(n + value - 1); }
};

FI_HOST_DEVICE constexpr Divisor make_divisor(int32_t value) {
  int32_t log = 0;
  while ((int64_t{1} << log) < value) ++log;
  const uint64_t power = uint64_t{1} << (31 + log);
  return {value, static_cast<uint32_t>(power / static_cast<uint64_t>(value) + 1), 31 + log};
}

struct Quotient64 {
  int64_t quotient;
  int32_t remainder;
};

// Upper half of a product of 64 bits each.
FI_HOST_DEVICE inline uint64_t high_product(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(a, b);
#else
  const uint64_t a_low = a & 0xffffffff, a_high = a >> 32, b_low = b & 0xffffffff, b_high = b >> 32;
  const uint64_t first = a_high * b_low + (a_low * b_low >> 32);
  const uint64_t second = a_low * b_high + (first & 0xffffffff);
  return a_high * b_high + (first >> 32) + (second >> 32);
#endif
}

// The same for dividends of 63 bits. The multiplier is below 2^64 / value by at most 1, hence the
// product below the quotient by less than 1 / 2: after rounding down it is one too small at most.
struct LongDivisor {
  uint64_t multiplier;
  int64_t value;

  FI_HOST_DEVICE Quotient64 divide(int64_t n) const {
    const auto guess = static_cast<int64_t>(high_product(static_cast<uint64_t>(n), multiplier));
    const int64_t rest = n - guess * value;
    const bool is_low = rest >= value;
    return {guess + is_low, static_cast<int32_t>(rest - (is_low ? value : 0))};
  }
};

FI_HOST_DEVICE constexpr LongDivisor make_long_divisor(int32_t value) {
  return {~uint64_t{0} / static_cast<uint64_t>(value), value};
}

// floor(a / b) for a >= 0 and b > 0 where it is below 2^31. A float guesses it to within 2^-22 of
// itself or to one below or above: one round does for quotients below 2^22.
FI_HOST_DEVICE inline int32_t quotient_of(int64_t a, int64_t b) {
  int32_t quotient = 0;
  while (true) {
#if defined(__CUDA_ARCH__)
    const float guess = __fdividef(static_cast<float>(a), static_cast<float>(b));
#else
    const float guess = static_cast<float>(a) / static_cast<float>(b);
#endif
    quotient += static_cast<int32_t>(guess);
    a -= static_cast<int32_t>(guess) * b;
    if (a < 0) {
      --quotient;
      a += b;
    } else if (a >= b) {
      ++quotient;
      a -= b;
    }
    if (a >= 0 && a < b) return quotient;
  }
}

// 1 / value, to within 2^-22 of itself.
FI_HOST_DEVICE inline float reciprocal_of(float value) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
#else
  return 1.0f / value;
#endif
}

struct Quotient32 {
  int32_t quotient;
  uint32_t remainder;
};

// (a * factor + rest) / b where the quotient is below 2^16, for a, b < 2^31 and b > 0; the dividend
// may have more than 32 bits. The guess is too small rather than too large, by less than one, and
// what it leaves is below 2 b: right modulo 2^32 is right.
FI_HOST_DEVICE inline Quotient32 small_quotient(uint32_t a, int32_t factor, int32_t rest,
                                                int32_t b) {
  constexpr float kLess = 1.0f - 1.0f / (1 << 18);
  const float dividend =
      static_cast<float>(a) * static_cast<float>(factor) + static_cast<float>(rest);
  const float inverse = reciprocal_of(static_cast<float>(b)) * kLess;
  const auto guess = static_cast<int32_t>(dividend * inverse);
  const uint32_t left = a * factor + rest - static_cast<uint32_t>(guess) * b;
  const bool is_low = left >= static_cast<uint32_t>(b);
  return {guess + is_low, left - (is_low ? b : 0)};
}

}  // namespace fi
