// Loads whose place in a program matters: behind a wait, or under way together. PTX ISA 9.7.9.8
// (ld), 9.7.13.4 (fence).
#pragma once

#include "fi/core/types.h"

namespace fi::ptx {

// A word of global memory, read here. What __ldg() reads may be read earlier: it is promised never
// to change.
__device__ inline int32_t load_word(const int32_t* at) {
  int32_t x;
  asm volatile("ld.global.s32 %0, [%1];" : "=r"(x) : "l"(at) : "memory");
  return x;
}

// Element `index` of `count`, of 4 or 16 bytes in global memory and past L1. One that does not
// exist is `otherwise`, or zeros, and costs no access.
__device__ inline float load_4(const float* at, int index, int count, float otherwise) {
  float x;
  asm volatile(
      "{\n"
      ".reg .pred exists;\n"
      "setp.lt.s32 exists, %2, %3;\n"
      "mov.f32 %0, %4;\n"
      "@exists ld.global.cg.f32 %0, [%1];\n"
      "}\n"
      : "=f"(x)
      : "l"(at), "r"(index), "r"(count), "f"(otherwise));
  return x;
}
__device__ inline float4 load_16(const float4* at, int index, int count) {
  float4 x;
  asm volatile(
      "{\n"
      ".reg .pred exists;\n"
      "setp.lt.s32 exists, %5, %6;\n"
      "mov.f32 %0, 0f00000000;\n"
      "mov.f32 %1, 0f00000000;\n"
      "mov.f32 %2, 0f00000000;\n"
      "mov.f32 %3, 0f00000000;\n"
      "@exists ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];\n"
      "}\n"
      : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
      : "l"(at), "r"(index), "r"(count));
  return x;
}

// Loads above are under way together. Without it the assembler may move each to where its value is
// used, and a batch of loads costs a latency each.
__device__ inline void finish_loads() { asm volatile("fence.acq_rel.cta;" ::: "memory"); }

}  // namespace fi::ptx
