// Single words that one CTA hands over to another: each is its own flag. PTX ISA 9.7.9 (ld, st), 8
// (memory consistency): relaxed at gpu scope.
#pragma once

#include "fi/core/types.h"

namespace fi::ptx {

__device__ inline uint64_t load_now(const uint64_t* from) {
  uint64_t word;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
  return word;
}

__device__ inline void store_now(uint64_t* to, uint64_t word) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
}

}  // namespace fi::ptx
