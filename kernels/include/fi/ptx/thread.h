// Special registers. PTX ISA 10.
#pragma once

#include "fi/core/types.h"

namespace fi::ptx {

// threadIdx.x (unsigned: a remainder is then a mask), read anew at every call. Volatile on purpose:
// what is computed from it is not moved out of the persistent loop, where it would occupy registers
// through every main loop.
__device__ inline uint32_t thread_index() {
  uint32_t index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// True in one lane of a warp whose lanes are all here. PTX ISA 9.7.13.18.
__device__ inline bool elect() {
  uint32_t is_elected;
  asm volatile(
      "{\n"
      ".reg .pred elected;\n"
      "elect.sync _|elected, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, elected;\n"
      "}\n"
      : "=r"(is_elected));
  return is_elected != 0;
}

// A lane's value, in all lanes, which are all here. The compiler knows them to be alike, and keeps
// what is computed from such values in uniform registers, as copies of boxes want them.
__device__ inline int32_t uniform(int32_t x, int lane = 0) {
  return __shfl_sync(0xffffffff, x, lane);
}

// Of the multiprocessor's clock, modulo 2^32.
__device__ inline uint32_t cycles() {
  uint32_t count;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(count));
  return count;
}

// The same address, in a form that the compiler computes where it is used and not before.
template <class T>
__device__ inline T* here(T* address) {
  T* same;
  asm volatile("mov.b64 %0, %1;" : "=l"(same) : "l"(address));
  return same;
}

}  // namespace fi::ptx
