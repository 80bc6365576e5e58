// Loads that are under way together. PTX ISA 9.7.9.8 (ld), 9.7.13.4 (fence).
#pragma once

#include "fi/core/types.h"

namespace fi::ptx {

// 4 and 16 bytes of global memory past L1; `otherwise`, or zeros, and no access when !exists.
__device__ inline float load_4(const float* at, bool exists, float otherwise) {
  float x;
  asm volatile(
      "{\n"
      ".reg .pred exists;\n"
      "setp.ne.u32 exists, %2, 0;\n"
      "mov.f32 %0, %3;\n"
      "@exists ld.global.cg.f32 %0, [%1];\n"
      "}\n"
      : "=f"(x)
      : "l"(at), "r"(static_cast<uint32_t>(exists)), "f"(otherwise));
  return x;
}
__device__ inline float4 load_16(const float4* at, bool exists) {
  float4 x;
  asm volatile(
      "{\n"
      ".reg .pred exists;\n"
      "setp.ne.u32 exists, %5, 0;\n"
      "mov.f32 %0, 0f00000000;\n"
      "mov.f32 %1, 0f00000000;\n"
      "mov.f32 %2, 0f00000000;\n"
      "mov.f32 %3, 0f00000000;\n"
      "@exists ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];\n"
      "}\n"
      : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
      : "l"(at), "r"(static_cast<uint32_t>(exists)));
  return x;
}

// Loads above are under way together. Without it the assembler may move each to where its value is
// used, and a batch of loads costs a latency each.
__device__ inline void finish_loads() { asm volatile("fence.acq_rel.cta;" ::: "memory"); }

}  // namespace fi::ptx
