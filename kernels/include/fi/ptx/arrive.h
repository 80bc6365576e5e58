// Counting who has arrived, across CTAs. PTX ISA 9.7.13 (atom), 8 (memory consistency).
#pragma once

#include "fi/core/types.h"

namespace fi::ptx {

// Adds an arrival to a counter; true for the one that completes it, which resets the counter for
// the next launch. Call from one thread after a CTA barrier; the CTA barrier that follows makes
// what all arrivals wrote before visible to the whole CTA (release and acquire at gpu scope).
__device__ inline bool arrive(int32_t* counter, int32_t expected) {
  int32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(counter)
               : "memory");
  if (before + 1 != expected) return false;
  *counter = 0;
  return true;
}

}  // namespace fi::ptx
