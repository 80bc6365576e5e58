// Grids that overlap: programmatic dependent launch. PTX ISA 9.7.13 (griddepcontrol); below sm_90
// grids follow one another, and these do nothing.
#pragma once

#include "fi/core/types.h"

namespace fi::ptx {

// The next grid of the stream may be started once all CTAs of this one have come here or ended, if
// its launch allows that. A grid that overlaps the one before it waits for that first: kernels of
// others may wait for the grid right before theirs alone, and count on the end of earlier ones.
__device__ inline void start_next_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Waits until the grid before this one has ended and its writes can be read.
__device__ inline void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace fi::ptx
