// The kernel that finds a prefix forest, and its CTA.
#pragma once

#include "fi/common/forest.h"
#include "fi/common/planner_block.h"
#include "fi/ptx/arrive.h"

namespace fi::forest {

template <int32_t kThreads>
struct BlockMemory {
  planner::BlockMemory<kThreads, false> scans;
  int32_t smallest[2][kThreads / 32];
  int32_t is_last;
};

template <int32_t kThreads>
class CudaBlock : public planner::CudaBlock<kThreads, true, false> {
 public:
  __device__ explicit CudaBlock(BlockMemory<kThreads>* memory)
      : planner::CudaBlock<kThreads, true, false>(&memory->scans, nullptr), memory_(memory) {}

  // Smallest value of all threads.
  __device__ int32_t min(int32_t value) {
    int32_t* smallest = memory_->smallest[turn_];
    turn_ ^= 1;  // the other one is read until the next barrier
    value = __reduce_min_sync(~0u, value);
    if (this->lane() == 0) smallest[this->warp()] = value;
    __syncthreads();
#pragma unroll
    for (int32_t w = 0; w < kThreads / 32; ++w) value = min_i32(value, smallest[w]);
    return value;
  }

  __device__ bool any(bool is_set) const { return __syncthreads_or(is_set) != 0; }
  __device__ void sync_warp() const { __syncwarp(); }

  // What another CTA of this launch wrote.
  __device__ Branch load(const Branch* from) const {
    const int2 words = __ldcg(reinterpret_cast<const int2*>(from));
    return {words.x, words.y};
  }

  // True in the last CTA that comes here, which sees what all others wrote before.
  __device__ bool arrives_last(int32_t* arrivals) const {
    if (this->thread() == 0) {
      memory_->is_last = ptx::arrive_last(arrivals, static_cast<int32_t>(gridDim.x));
    }
    __syncthreads();
    return memory_->is_last != 0;
  }

 private:
  BlockMemory<kThreads>* memory_;
  int32_t turn_ = 0;
};

// Body of the kernel, for a CTA per request. kInShared: scratch in dynamic shared memory, else at
// p.scratch.
template <int32_t kThreads, bool kInShared>
__device__ void run(const ForestKernelParams& p) {
  extern __shared__ int4 dynamic_shared[];
  __shared__ BlockMemory<kThreads> memory;
  ptx::start_next_grid();  // the planner, which waits where it needs the forest
  CudaBlock<kThreads> block(&memory);
  const auto r = static_cast<int32_t>(blockIdx.x);
  if (r < p.num_requests) {
    const Branch branch = Search(p, block, r).find();
    if (block.thread() == 0) p.branches[r] = branch;
  }
  if (!block.arrives_last(p.arrivals)) return;
  char* base = kInShared ? reinterpret_cast<char*>(dynamic_shared) : static_cast<char*>(p.scratch);
  const Scratch scratch = scratch_at(p.scratch_layout, base);
  Builder(p, scratch, block).run();
}

}  // namespace fi::forest
