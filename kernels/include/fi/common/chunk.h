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

// x /= scale, rounded as IEEE division rounds it, at about a third of its cost.
//
// With y = 1 / scale rounded to nearest and q = x * y, the correction q + y * (x - q * scale) is
// the correctly rounded quotient as long as nothing leaves the normal range (Markstein, 1990).
// Outside that: scales that are tiny or huge take the division; a quotient too small for the
// residual is far below half of fp8's smallest value; a large one, infinity included, saturates as
// it is.
__device__ inline void divide_by_scale(float (&x)[kChunk], float scale) {
  const float size = fabsf(scale);
  if (!(size > 0x1p-60f && size < 0x1p60f)) {
#pragma unroll
    for (int e = 0; e < kChunk; ++e) x[e] = __fdiv_rn(x[e], scale);
    return;
  }
  const float reciprocal = __frcp_rn(scale);
#pragma unroll
  for (int e = 0; e < kChunk; ++e) {
    const float q = __fmul_rn(x[e], reciprocal);
    const float corrected = __fmaf_rn(__fmaf_rn(-q, scale, x[e]), reciprocal, q);
    // The sign of a zero survives only in q.
    x[e] = fabsf(q) < 1024.0f ? copysignf(corrected, q) : q;
  }
}

}  // namespace fi
