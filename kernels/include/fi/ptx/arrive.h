// Counting who has arrived, across CTAs, and who takes what they left. PTX ISA 9.7.13 (atom), 8
// (memory consistency).
#pragma once

#include "fi/core/types.h"

namespace fi::ptx {

// Adds an arrival to a counter and returns how many there are. Call from one thread after a CTA
// barrier; once all have arrived, the CTA barrier that follows makes what they wrote before visible
// to the whole CTA (release and acquire at gpu scope).
__device__ inline int32_t arrive(int32_t* counter) {
  int32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(counter)
               : "memory");
  return before + 1;
}

// The same, true for the last of `expected`, who also resets the counter for the next launch:
// nobody else can claim what is counted. All who arrive at a counter name the same number.
__device__ inline bool arrive_last(int32_t* counter, int32_t expected) {
  uint32_t before;
  asm volatile("atom.inc.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(static_cast<uint32_t>(expected - 1))
               : "memory");
  return before == static_cast<uint32_t>(expected - 1);
}

// The arrivals so far, by one who has arrived: 0 when a claim has reset them.
__device__ inline int32_t arrivals(const int32_t* counter) {
  int32_t count;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
  return count;
}

// Resets a counter that all `expected` have arrived at; true for the one who does.
__device__ inline bool claim(int32_t* counter, int32_t expected) {
  int32_t before;
  asm volatile("atom.cas.acq_rel.gpu.global.b32 %0, [%1], %2, 0;"
               : "=r"(before)
               : "l"(counter), "r"(expected)
               : "memory");
  return before == expected;
}

}  // namespace fi::ptx
