// Eight elements of a row, or four: loading, storing, and conversion to and from fp32.
#pragma once

#include <cuda_fp8.h>

#include "fi/common/append_params.h"
#include "fi/core/elements.h"

namespace fi {

template <class T, int kCount = kChunk>
struct Chunk {
  uint32_t words[kCount * sizeof(T) / 4];
};

template <int kBytes>
struct BitsOf;
template <>
struct BitsOf<1> {
  using Type = uint8_t;
};
template <>
struct BitsOf<2> {
  using Type = uint16_t;
};
template <>
struct BitsOf<4> {
  using Type = uint32_t;
};

// Aligned: the whole chunk by accesses of up to 16 bytes. Else the first `count` elements one by
// one, zeros for the others.
template <bool kAligned, int kCount, class T>
__device__ inline Chunk<T, kCount> load_chunk(const T* from, int count) {
  Chunk<T, kCount> chunk;
  constexpr int kWords = sizeof(chunk.words) / 4;
  if constexpr (kAligned && kWords == 2) {
    const uint2 two = *reinterpret_cast<const uint2*>(from);
    chunk.words[0] = two.x;
    chunk.words[1] = two.y;
  } else if constexpr (kAligned) {
#pragma unroll
    for (int w = 0; w < kWords; w += 4) {
      const uint4 four = reinterpret_cast<const uint4*>(from)[w / 4];
      chunk.words[w] = four.x;
      chunk.words[w + 1] = four.y;
      chunk.words[w + 2] = four.z;
      chunk.words[w + 3] = four.w;
    }
  } else {
    constexpr int kPerWord = 4 / sizeof(T);
    const auto* bits = reinterpret_cast<const typename BitsOf<sizeof(T)>::Type*>(from);
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      const uint32_t one = e < count ? bits[e] : 0u;
      uint32_t& word = chunk.words[e / kPerWord];
      word = e % kPerWord == 0 ? one : word | one << (8 * sizeof(T) * (e % kPerWord));
    }
  }
  return chunk;
}

template <bool kAligned, class T>
__device__ inline void store_chunk(T* to, const Chunk<T>& chunk, int count) {
  constexpr int kWords = sizeof(chunk.words) / 4;
  if constexpr (kAligned && kWords == 2) {
    *reinterpret_cast<uint2*>(to) = {chunk.words[0], chunk.words[1]};
  } else if constexpr (kAligned) {
    static_assert(kWords == 4, "chunks are stored as 8 or 16 bytes");
    *reinterpret_cast<uint4*>(to) = {chunk.words[0], chunk.words[1], chunk.words[2],
                                     chunk.words[3]};
  } else {
    constexpr int kPerWord = 4 / sizeof(T);
    using Bits = typename BitsOf<sizeof(T)>::Type;
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
      if (e >= count) continue;
      const uint32_t word = chunk.words[e / kPerWord];
      reinterpret_cast<Bits*>(to)[e] = static_cast<Bits>(word >> (8 * sizeof(T) * (e % kPerWord)));
    }
  }
}

template <int kCount>
__device__ inline void unpack(const Chunk<float, kCount>& chunk, float (&x)[kCount]) {
#pragma unroll
  for (int e = 0; e < kCount; ++e) x[e] = __uint_as_float(chunk.words[e]);
}

// bf16 is the upper half of fp32.
template <int kCount>
__device__ inline void unpack(const Chunk<__nv_bfloat16, kCount>& chunk, float (&x)[kCount]) {
#pragma unroll
  for (int e = 0; e < kCount; e += 2) {
    x[e] = __uint_as_float(chunk.words[e / 2] << 16);
    x[e + 1] = __uint_as_float(chunk.words[e / 2] & 0xffff0000u);
  }
}

template <int kCount>
__device__ inline void unpack(const Chunk<__half, kCount>& chunk, float (&x)[kCount]) {
#pragma unroll
  for (int e = 0; e < kCount; e += 2) {
    const float2 pair = __half22float2(reinterpret_cast<const __half2&>(chunk.words[e / 2]));
    x[e] = pair.x;
    x[e + 1] = pair.y;
  }
}

// Rounds to nearest even; fp8 saturates to +-448.
template <class T>
__device__ inline Chunk<T> pack(const float (&x)[kChunk]) {
  Chunk<T> chunk;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int e = 0; e < kChunk; e += 2) chunk.words[e / 2] = ElementOps<T>::pack(x[e], x[e + 1]);
  } else {
#pragma unroll
    for (int e = 0; e < kChunk; e += 4) {
      const uint32_t lo = __nv_cvt_float2_to_fp8x2({x[e], x[e + 1]}, __NV_SATFINITE, __NV_E4M3);
      const uint32_t hi = __nv_cvt_float2_to_fp8x2({x[e + 2], x[e + 3]}, __NV_SATFINITE, __NV_E4M3);
      chunk.words[e / 4] = lo | hi << 16;
    }
  }
  return chunk;
}

// Scales that divide_by_scale may not be given.
__device__ inline bool is_awkward(float scale) {
  const float size = fabsf(scale);
  const uint32_t off = (__float_as_uint(scale) + 128) & 0xfffff;
  return !(size > 0x1p-100f && size < 0x1p100f) || (off < 256 && off != 128);
}

// x and y divided by any scale, rounded as IEEE division rounds. A product with the inverse to
// 2^-52 of itself does: no quotient of 24-bit numbers is within 2^-50 of where rounding changes.
__device__ inline void divide_exactly(float (&x)[kChunk], float (&y)[kChunk], double scale) {
  double inverse;
  // 20 bits. The compiler's own division is a call, which costs registers.
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(inverse) : "d"(scale));
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    const double error = __fma_rn(-scale, inverse, 1.0);
    if (error == error) inverse = __fma_rn(error, inverse, inverse);  // else 0 or infinity
  }
#pragma unroll
  for (int e = 0; e < kChunk; ++e) {
    x[e] = static_cast<float>(x[e] * inverse);
    y[e] = static_cast<float>(y[e] * inverse);
  }
}

// x and y divided by a scale that is not awkward, at two instructions per element: as fp8 the
// results are what quotients of IEEE division are.
//
// 1 / scale is high + low, low / high in (0, 2^-21). Before it is rounded to fp32, x * high + x *
// low is within 2^-43 of t = x / scale, relative to t. fp8 changes at midpoints of two values, m =
// M * 2^i with integers 16 <= M <= 32. Rounding t itself gives another fp8 value only if an end of
// what fp32 rounds to m, m * (1 +- 2^-24), lies between the two. With integers S and X for scale
// and x, 2^23 <= S, X < 2^24, that is
//   X * 2^n = M * S * 2^20 +- S + d,  n >= 24, |d| < 2^7.
// So 2^20 divides S +- d: S = a * 2^20 -+ d with 8 <= a <= 16, whence 16 divides a - M * d. With
// d = 0 a is 16, which is no S. All S with another d are awkward.
//
// Zeros and infinities keep their signs: low is not 0, and its sign is that of high.
__device__ inline void divide_by_scale(float (&x)[kChunk], float (&y)[kChunk], float scale) {
  const float guess = reciprocal_of(scale);
  const float nearest = __fmaf_rn(__fmaf_rn(-scale, guess, 1.0f), guess, guess);
  const float high = __fmul_rn(nearest, 1.0f - 0x1p-23f);
  const float low = __fmul_rn(__fmaf_rn(-scale, high, 1.0f), nearest);
#pragma unroll
  for (int e = 0; e < kChunk; ++e) {
    x[e] = __fmaf_rn(x[e], high, __fmul_rn(x[e], low));
    y[e] = __fmaf_rn(y[e], high, __fmul_rn(y[e], low));
  }
}

}  // namespace fi
