// Keeping loads together. PTX ISA 10.
#pragma once

#include "fi/core/types.h"

namespace fi::ptx {

// Loads above are under way together. Without it the assembler may move each to where its value is
// used, and a batch of loads costs a latency each.
__device__ inline void finish_loads() { asm volatile("fence.acq_rel.cta;" ::: "memory"); }

}  // namespace fi::ptx
