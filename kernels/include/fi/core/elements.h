// Element types: packing pairs of 16-bit values, widening 8-bit ones.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "fi/core/types.h"

namespace fi {

template <class Element>
struct ElementOps;

template <>
struct ElementOps<__nv_bfloat16> {
  static __device__ uint32_t pack(float lo, float hi) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  static __device__ __nv_bfloat16 from_float(float x) { return __float2bfloat16_rn(x); }

  // Two e4m3 values in bits 15..8 and 31..24 of `bytes`. e4m3 is sign, 4 exponent and 3 mantissa
  // bits with bias 7; shifted into place they read as a bf16 2^120 too small, denormals included.
  // A NaN of the cache comes out as 480.
  static __device__ uint32_t widen_e4m3(uint32_t bytes) {
    const uint32_t bits = (bytes & 0x80008000) | ((bytes >> 4) & 0x07f007f0);
    uint32_t pair;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(bits), "r"(0x7b807b80), "r"(0x80008000));
    return pair;
  }
};

template <>
struct ElementOps<__half> {
  static __device__ uint32_t pack(float lo, float hi) {
    const __half2 pair = __floats2half2_rn(lo, hi);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  static __device__ __half from_float(float x) { return __float2half_rn(x); }

  // As above; an fp16 read from these bits is 2^8 too small.
  static __device__ uint32_t widen_e4m3(uint32_t bytes) {
    const uint32_t bits = (bytes & 0x80008000) | ((bytes >> 1) & 0x3f803f80);
    uint32_t pair;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(bits), "r"(0x5c005c00));
    return pair;
  }
};

}  // namespace fi
