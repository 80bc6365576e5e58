// Element types in memory <-> fp32 vectors. Exact where the format allows, else round to nearest
// even. fp8 is e4m3fn: bias 7, no infinity, NaN = 0x7f and 0xff, largest finite 448.
// Unnamed namespace: see simd.h.
#pragma once

#include "cpu/simd.h"

namespace fi::cpu {
namespace {

struct Float32 {
  float value;
};
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
struct Float8 {
  uint8_t bits;
};

[[gnu::always_inline]] inline Vec load(const Float32* p) { return load(&p->value); }

[[gnu::always_inline]] inline Vec load(const BFloat16* p) { return (Vec)(widen_u16(p) << 16); }

// Small floats share one scheme: move exponent and mantissa into place and add the difference of
// the biases; a zero exponent (subnormal) is integer * 2^ulp instead, which is exact.
[[gnu::always_inline]] inline Vec load(const Float16* p) {
  if constexpr (kHasFp16) return load_fp16(p);
  const UintVec bits = widen_u16(p);
  const UintVec magnitude = bits & 0x7fff;
  const UintVec rebias = magnitude >= 0x7c00 ? UintVec{} + (224u << 23) : UintVec{} + (112u << 23);
  const Vec normal = (Vec)((magnitude << 13) + rebias);  // 224: exponent 31 becomes 255
  const Vec subnormal = __builtin_convertvector((IntVec)magnitude, Vec) * 0x1p-24f;
  const UintVec value = magnitude < 0x400 ? (UintVec)subnormal : (UintVec)normal;
  return (Vec)(value | (bits & 0x8000) << 16);
}

[[gnu::always_inline]] inline Vec load(const Float8* p) {
  if constexpr (kHasFp16) return load_fp8(p);
  const UintVec bits = widen_u8(p);
  const UintVec magnitude = bits & 0x7f;
  const UintVec normal = (magnitude << 20) + (120u << 23);
  const Vec subnormal = __builtin_convertvector((IntVec)magnitude, Vec) * 0x1p-9f;
  UintVec value = magnitude < 8 ? (UintVec)subnormal : normal;
  value = magnitude == 0x7f ? UintVec{} + 0x7fc00000u : value;
  return (Vec)(value | (bits & 0x80) << 24);
}

// Head dimensions are multiples of 8, so only 16 lanes can meet a row's end in the middle.
constexpr bool kHasHalfVec = kWidth > 8;

// The first 8 elements, zeros above: nothing past a row may be read, it can be another head's NaN
// padding or unmapped.
template <class T>
[[gnu::always_inline]] inline Vec load_half(const T* p) {
  T whole[kWidth] = {};
  __builtin_memcpy(whole, p, sizeof(whole) / 2);
  return load(whole);
}

[[gnu::always_inline]] inline void store(Float32* p, Vec v) { store(&p->value, v); }

[[gnu::always_inline]] inline void store(BFloat16* p, Vec v) {
  const UintVec bits = (UintVec)v;
  const UintVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const UintVec quiet_nan = bits >> 16 | 0x40;
  narrow_u16((bits & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded, p);
}

// Rounding by hardware: adding 2^(23 + ulp exponent) leaves the subnormal's integer in the low
// bits.
[[gnu::always_inline]] inline void store(Float16* p, Vec v) {
  if constexpr (kHasFp16) return store_fp16(v, p);
  const UintVec bits = (UintVec)v;
  const UintVec magnitude = bits & 0x7fffffff;
  const UintVec odd = (magnitude >> 13) & 1;
  const UintVec normal = (magnitude - (112u << 23) + 0xfff + odd) >> 13;
  const UintVec subnormal = (UintVec)((Vec)magnitude + 0.5f) - 0x3f000000;
  UintVec half = magnitude < 0x38800000 ? subnormal : normal;   // 2^-14
  half = magnitude >= 0x47800000 ? UintVec{} + 0x7c00u : half;  // 2^16 and infinity
  half = magnitude > 0x7f800000 ? UintVec{} + 0x7e00u : half;
  narrow_u16(half | (bits & 0x80000000) >> 16, p);
}

[[gnu::always_inline]] inline void store(Float8* p, Vec v) {
  const UintVec bits = (UintVec)v;
  const UintVec unsigned_bits = bits & 0x7fffffff;
  const UintVec limit = UintVec{} + 0x43e00000u;  // 448
  const UintVec magnitude = unsigned_bits > limit ? limit : unsigned_bits;
  const UintVec odd = (magnitude >> 20) & 1;
  const UintVec normal = (magnitude - (120u << 23) + 0x7ffff + odd) >> 20;
  const UintVec subnormal = (UintVec)((Vec)magnitude + 16384.0f) - 0x46800000;
  UintVec result = magnitude < 0x3c800000 ? subnormal : normal;  // 2^-6
  result = unsigned_bits > 0x7f800000 ? UintVec{} + 0x7fu : result;
  narrow_u8(result | (bits & 0x80000000) >> 24, p);
}

// dst[0, n) = src[0, n), n a multiple of 8.
template <class T>
void load_row(const void* src, float* dst, int64_t n) {
  const T* from = static_cast<const T*>(src);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(dst + i, load(from + i));
  if (kHasHalfVec && i < n) {
    const Vec half = load_half(from + i);
    __builtin_memcpy(dst + i, &half, sizeof(half) / 2);
  }
}

template <class T>
void store_row(const float* src, void* dst, int64_t n) {
  T* to = static_cast<T*>(dst);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(to + i, load(src + i));
  if (kHasHalfVec && i < n) {
    T whole[kWidth];
    store(whole, load_half(reinterpret_cast<const Float32*>(src + i)));
    __builtin_memcpy(to + i, whole, sizeof(whole) / 2);
  }
}

}  // namespace
}  // namespace fi::cpu
