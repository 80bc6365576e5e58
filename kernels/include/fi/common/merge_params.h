// Arguments of the kernel that merges partial states, passed as one __grid_constant__.
#pragma once

#include "fi/core/types.h"

namespace fi {

constexpr int32_t kMergeThreads = 256;
constexpr int32_t kMergeCtas = 4;  // of an SM at a time, at least: 64 registers per thread

struct MergeKernelParams {
  const float* o;    // [num_states, rows, dim]
  const float* lse;  // [num_states, rows] natural log; not read without softmax
  float* out_o;      // [rows, dim]
  float* out_lse;    // [rows]; zero without softmax
  int64_t rows;
  int32_t num_states;
};

// Elements of one access: 16 bytes where rows allow it.
FI_HOST_DEVICE constexpr int32_t merge_width(bool aligned) { return aligned ? 4 : 1; }

// Accesses of a thread per state: two states alone would keep too few bytes in flight with one.
FI_HOST_DEVICE constexpr int32_t merge_parts(int32_t dim, bool aligned) {
  return dim % (2 * merge_width(aligned)) == 0 ? 2 : 1;
}

// Threads of a row.
FI_HOST_DEVICE constexpr int32_t merge_lanes(int32_t dim, bool aligned) {
  return dim / (merge_width(aligned) * merge_parts(dim, aligned));
}

}  // namespace fi
