// Vectors of the widest registers that the including file is compiled for: 4, 8 or 16 floats.
//
// Included by isa_v2.cc, isa_v3.cc and isa_v4.cc, each built with its own -march. Everything sits
// in an unnamed namespace and no std:: function is called: the linker keeps one copy of an inline
// function with external linkage, and the AVX-512 copy would crash an older CPU.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <utility>

namespace fi::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

using Vec [[gnu::vector_size(kWidth * 4)]] = float;
using IntVec [[gnu::vector_size(kWidth * 4)]] = int32_t;
using UintVec [[gnu::vector_size(kWidth * 4)]] = uint32_t;

// e4m3 as fp16 bits of the value / 256: the exponents differ by 8 in their bias, and subnormals
// stay subnormals. `bytes`: sign-extended to 16 bits. 0x7f and 0xff become NaN.
template <class Bits>
[[gnu::always_inline]] inline Bits fp8_to_fp16(Bits bytes) {
  using Words [[gnu::vector_size(sizeof(Bits))]] = int16_t;
  const Words half = ((Words)bytes << 7) & int16_t(0xbf80);
  const Words nan = (half & int16_t(0x3f80)) == int16_t(0x3f80);
  return (Bits)(half | (nan & int16_t(0x4000)));
}

// Per-architecture part: 8- and 16-bit integers to and from 32-bit lanes (generic vector
// conversions compile to scalar code in GCC 12), and the fp16 instructions where they exist.
#if defined(__AVX512F__)
constexpr bool kHasFp16 = true;
// GCC 12 warns of its own undefined operand in the unmasked forms; the code is the same.
constexpr __mmask16 kAllLanes = 0xffff;
[[gnu::always_inline]] inline UintVec widen_u16(const void* p) {
  return (UintVec)_mm512_maskz_cvtepu16_epi32(kAllLanes,
                                              _mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
[[gnu::always_inline]] inline UintVec widen_u8(const void* p) {
  return (UintVec)_mm512_maskz_cvtepu8_epi32(kAllLanes,
                                             _mm_loadu_si128(static_cast<const __m128i*>(p)));
}
[[gnu::always_inline]] inline void narrow_u16(UintVec v, void* p) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_maskz_cvtepi32_epi16(kAllLanes, (__m512i)v));
}
[[gnu::always_inline]] inline void narrow_u8(UintVec v, void* p) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_maskz_cvtepi32_epi8(kAllLanes, (__m512i)v));
}
[[gnu::always_inline]] inline Vec load_fp16(const void* p) {
  return (Vec)_mm512_maskz_cvtph_ps(kAllLanes, _mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
[[gnu::always_inline]] inline Vec load_fp8(const void* p) {
  const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(p));
  return (Vec)_mm512_maskz_cvtph_ps(kAllLanes, fp8_to_fp16(_mm256_cvtepi8_epi16(bytes))) * 256.0f;
}
[[gnu::always_inline]] inline void store_fp16(Vec v, void* p) {
  _mm256_storeu_si256(static_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(kAllLanes, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
constexpr bool kHasFp16 = true;
[[gnu::always_inline]] inline UintVec widen_u16(const void* p) {
  return (UintVec)_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
[[gnu::always_inline]] inline UintVec widen_u8(const void* p) {
  return (UintVec)_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
}
[[gnu::always_inline]] inline void narrow_u16(UintVec v, void* p) {
  const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);
  _mm_storeu_si128(static_cast<__m128i*>(p),
                   _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
[[gnu::always_inline]] inline void narrow_u8(UintVec v, void* p) {
  const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);
  const __m128i low = _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
  _mm_storel_epi64(static_cast<__m128i*>(p), _mm_packus_epi16(low, low));
}
[[gnu::always_inline]] inline Vec load_fp16(const void* p) {
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
[[gnu::always_inline]] inline Vec load_fp8(const void* p) {
  const __m128i bytes = _mm_loadl_epi64(static_cast<const __m128i*>(p));
  return (Vec)_mm256_cvtph_ps(fp8_to_fp16(_mm_cvtepi8_epi16(bytes))) * 256.0f;
}
[[gnu::always_inline]] inline void store_fp16(Vec v, void* p) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
constexpr bool kHasFp16 = false;
[[gnu::always_inline]] inline UintVec widen_u16(const void* p) {
  return (UintVec)_mm_cvtepu16_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
}
[[gnu::always_inline]] inline UintVec widen_u8(const void* p) {
  int32_t bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return (UintVec)_mm_cvtepu8_epi32(_mm_cvtsi32_si128(bits));
}
[[gnu::always_inline]] inline void narrow_u16(UintVec v, void* p) {
  _mm_storel_epi64(static_cast<__m128i*>(p), _mm_packus_epi32((__m128i)v, (__m128i)v));
}
[[gnu::always_inline]] inline void narrow_u8(UintVec v, void* p) {
  const __m128i words = _mm_packus_epi32((__m128i)v, (__m128i)v);
  const int32_t bits = _mm_cvtsi128_si32(_mm_packus_epi16(words, words));
  __builtin_memcpy(p, &bits, sizeof(bits));
}
[[gnu::always_inline]] inline Vec load_fp16(const void*) { return Vec{}; }
[[gnu::always_inline]] inline Vec load_fp8(const void*) { return Vec{}; }
[[gnu::always_inline]] inline void store_fp16(Vec, void*) {}
#endif

// f(0), f(1), .., f(N - 1), spelled out: arrays of vectors indexed by a loop counter end up in
// memory, by constants in registers.
template <class F, int... I>
[[gnu::always_inline]] inline void unroll(const F& f, std::integer_sequence<int, I...>) {
  (f(I), ...);
}
template <int N, class F>
[[gnu::always_inline]] inline void unroll(const F& f) {
  unroll(f, std::make_integer_sequence<int, N>{});
}

[[gnu::always_inline]] inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
[[gnu::always_inline]] inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof(v)); }
[[gnu::always_inline]] inline Vec broadcast(float x) { return x - Vec{}; }
[[gnu::always_inline]] inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

// 0, 1, .., kWidth - 1
[[gnu::always_inline]] inline IntVec lane_index() {
  IntVec lanes;
  for (int i = 0; i < kWidth; ++i) lanes[i] = i;
  return lanes;
}

// Swaps blocks of `stride` lanes between a and b, the step from which transposes and sums over
// lanes are built: a = a's low blocks, then b's; b = a's high blocks, then b's.
// Worked example, 4 lanes, stride 2: a0 a1 a2 a3, b0 b1 b2 b3 -> a0 a1 b0 b1, a2 a3 b2 b3.
[[gnu::always_inline]] inline void exchange(Vec& a, Vec& b, int stride) {
  const IntVec lane = lane_index();
  const IntVec high = (lane & stride) != 0;
  const Vec low_blocks = __builtin_shuffle(a, b, high ? lane + kWidth - stride : lane);
  b = __builtin_shuffle(a, b, high ? lane + kWidth : lane + stride);
  a = low_blocks;
}

// rows[i][j] <-> rows[j][i]
template <int kStride = kWidth / 2>
[[gnu::always_inline]] inline void transpose(Vec* rows) {
  unroll<kWidth>([&](int i) {
    if ((i & kStride) == 0) exchange(rows[i], rows[i + kStride], kStride);
  });
  if constexpr (kStride > 1) transpose<kStride / 2>(rows);
}

// Lane i of the result is the sum over the lanes of v[i]: one shuffle pair per addition instead of
// kWidth separate horizontal sums. Destroys v.
template <int kStride = kWidth / 2>
[[gnu::always_inline]] inline Vec sum_lanes(Vec* v) {
  unroll<kStride>([&](int i) {
    exchange(v[i], v[i + kStride], kStride);
    v[i] += v[i + kStride];
  });
  if constexpr (kStride > 1) return sum_lanes<kStride / 2>(v);
  return v[0];
}

[[gnu::always_inline]] inline float max_lane(Vec v) {
#pragma GCC unroll 4
  for (int stride = kWidth / 2; stride > 0; stride /= 2) {
    v = max(v, __builtin_shuffle(v, lane_index() ^ stride));
  }
  return v[0];
}

[[gnu::always_inline]] inline float sum_lane(Vec v) {
#pragma GCC unroll 4
  for (int stride = kWidth / 2; stride > 0; stride /= 2) {
    v += __builtin_shuffle(v, lane_index() ^ stride);
  }
  return v[0];
}

// e^x for x <= 0, within 1.5 ulp; below -87.3 (results under the smallest normal number) 0. NaN
// stays NaN. x = n ln2 + r with |r| <= ln2 / 2; e^r = 1 + r + r^2 P(r), where P is the degree-4
// polynomial of least relative error on that interval (2^-28.3, found by reweighted least squares).
// The high part of ln2 has 15 significant bits, so n * kLn2High is exact for every n that occurs.
[[gnu::always_inline]] inline Vec exp_nonpositive(Vec x) {
  constexpr float kLowest = -87.3f;
  constexpr float kRound = 12582912.0f + 127.0f;  // 1.5 * 2^23: adding it rounds to an integer
  constexpr float kLog2E = 1.44269504f;
  constexpr float kLn2High = 0.693145752f;
  constexpr float kLn2Low = 1.42860682e-6f;
  const Vec clamped = x < kLowest ? broadcast(kLowest) : x;  // written so that NaN passes
  const Vec shifted = clamped * kLog2E + kRound;
  const Vec n = shifted - kRound;
  const Vec r = (clamped - n * kLn2High) - n * kLn2Low;
  Vec poly = r * 0.00138145405f + 0.00836874545f;
  poly = poly * r + 0.041668389f;
  poly = poly * r + 0.166665211f;
  poly = poly * r + 0.49999994f;
  const Vec exp_r = (poly * r) * r + r + 1.0f;
  const Vec power = (Vec)((IntVec)shifted << 23);  // low bits of `shifted`: n + 127, so 2^n
  return x < kLowest ? Vec{} : exp_r * power;
}

}  // namespace
}  // namespace fi::cpu
