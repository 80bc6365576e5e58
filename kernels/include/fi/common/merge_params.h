// Arguments of the kernel that merges partial states, passed as one __grid_constant__.
#pragma once

#include "fi/core/types.h"

namespace fi {

constexpr int32_t kMergeThreads = 256;

struct MergeKernelParams {
  const float* o;    // [num_states, rows, dim]
  const float* lse;  // [num_states, rows] natural log; not read without softmax
  float* out_o;      // [rows, dim]
  float* out_lse;    // [rows]; zero without softmax
  int64_t num_states, rows;
};

// Elements that a thread merges: 16 bytes where rows allow it.
FI_HOST_DEVICE constexpr int32_t merge_width(bool aligned) { return aligned ? 4 : 1; }

}  // namespace fi
