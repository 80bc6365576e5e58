// The planner kernel's CTA: scans by warp shuffles, one barrier each.
#pragma once

#include "fi/common/planner.h"

namespace fi::planner {

struct BlockMemory {
  int64_t warp_totals[2][32];
  int32_t raised;
};

template <int32_t kThreads>
class CudaBlock {
 public:
  static constexpr int32_t kWarp = 32;

  // The first barrier makes `memory` ready; nothing is raised before it.
  __device__ explicit CudaBlock(BlockMemory* memory) : memory_(memory) {
    if (threadIdx.x == 0) memory_->raised = 0;
  }

  __device__ int32_t thread() const { return static_cast<int32_t>(threadIdx.x); }
  __device__ static constexpr int32_t num_threads() { return kThreads; }
  __device__ int32_t cta() const { return static_cast<int32_t>(blockIdx.x); }
  __device__ int32_t num_ctas() const { return static_cast<int32_t>(gridDim.x); }

  __device__ void sync() const { __syncthreads(); }
  __device__ bool any(bool value) const { return __syncthreads_or(value) != 0; }
  __device__ void raise(int32_t bits) const { atomicOr(&memory_->raised, bits); }
  __device__ int32_t raised() const { return memory_->raised; }

  // Sum over the threads before this one; *total: over all.
  template <class T>
  __device__ T scan_sum(T value, T* total) {
    return scan(value, total, [](T a, T b) { return a + b; });
  }

  // Maximum over the threads before this one, at least 0; *total: over all.
  __device__ int32_t scan_max(int32_t value, int32_t* total) {
    return scan(value, total, [](int32_t a, int32_t b) { return max_i32(a, b); });
  }

 private:
  // Inclusive over the first kLanes lanes of a warp.
  template <int32_t kLanes, class T, class Op>
  __device__ static T scan_warp(T value, int32_t lane, Op op) {
#pragma unroll
    for (int32_t offset = 1; offset < kLanes; offset *= 2) {
      const T before = __shfl_up_sync(~0u, value, offset);
      if (lane >= offset) value = op(before, value);
    }
    return value;
  }

  // Consecutive scans take turns with two arrays: whoever writes the first one again has passed the
  // barrier of the scan between, and so has everyone who read it.
  template <class T, class Op>
  __device__ T scan(T value, T* total, Op op) {
    const int32_t lane = thread() % 32, warp = thread() / 32;
    constexpr int32_t kWarps = kThreads / 32;
    T* totals = reinterpret_cast<T*>(memory_->warp_totals[turn_]);
    turn_ ^= 1;
    const T here = scan_warp<32>(value, lane, op);
    if (lane == 31) totals[warp] = here;
    __syncthreads();
    const T warps = scan_warp<kWarps>(lane < kWarps ? totals[lane] : T(0), lane, op);
    *total = __shfl_sync(~0u, warps, kWarps - 1);
    const T warps_before = __shfl_sync(~0u, warps, warp - 1);
    const T lanes_before = __shfl_up_sync(~0u, here, 1);
    const T before = warp > 0 ? warps_before : T(0);
    return lane > 0 ? op(before, lanes_before) : before;
  }

  BlockMemory* memory_;
  int32_t turn_ = 0;
};

// Body of the kernel. kInShared: scratch in dynamic shared memory, else at p.scratch.
template <int32_t kThreads, bool kInShared, bool kInvariant>
__device__ void run(const PlanKernelParams& p) {
  extern __shared__ int64_t dynamic_shared[];
  __shared__ BlockMemory memory;
  Scratch scratch;
  if constexpr (kInShared) {
    place_scratch(p, reinterpret_cast<char*>(dynamic_shared), &scratch);
  } else {
    place_scratch(p, static_cast<char*>(p.scratch) + blockIdx.x * scratch_bytes(p), &scratch);
  }
  CudaBlock<kThreads> block(&memory);
  StepPlanner<CudaBlock<kThreads>, kInvariant>(p, scratch, block).run();
}

}  // namespace fi::planner
