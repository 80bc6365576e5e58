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
