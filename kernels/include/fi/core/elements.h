// 16-bit element types: packing and unpacking pairs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

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
};

template <>
struct ElementOps<__half> {
  static __device__ uint32_t pack(float lo, float hi) {
    const __half2 pair = __floats2half2_rn(lo, hi);
    return reinterpret_cast<const uint32_t&>(pair);
  }
};

}  // namespace fi
