// The kernel that finds a prefix forest, and its CTA.
#pragma once

#include "fi/common/forest.h"
#include "fi/common/planner_block.h"
#include "fi/ptx/handover.h"

namespace fi::forest {

template <int32_t kThreads>
struct BlockMemory {
  planner::BlockMemory<kThreads, false> scans;
  int32_t smallest[2][kThreads / 32];
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

  // The lowest lane of the warp with the same number.
  __device__ int32_t first_equal(uint64_t number) const {
    return __ffs(static_cast<int32_t>(__match_any_sync(~0u, number))) - 1;
  }

  __device__ void sync_warp() const { __syncwarp(); }

  // Hands a branch over to the CTA that takes it.
  __device__ void give(uint64_t* to, const Branch& branch) const {
    ptx::store_now(to, word_of(branch));
  }

  // What another CTA of this launch gives, which may not have started: the first to be there waits
  // for all, and all others go on without it.
  __device__ Branch take(uint64_t* from) const {
    uint64_t word;
    do {
      word = ptx::load_now(from);
    } while (word == 0);
    ptx::store_now(from, 0);
    return branch_of(word);
  }

 private:
  BlockMemory<kThreads>* memory_;
  int32_t turn_ = 0;
};

// Body of the kernel, for a CTA per request and one more. kInShared: scratch in dynamic shared
// memory, else at p.scratch.
template <int32_t kThreads, bool kInShared>
__device__ void run(const ForestKernelParams& p) {
  extern __shared__ int4 dynamic_shared[];
  __shared__ BlockMemory<kThreads> memory;
  ptx::start_next_grid();  // the planner, which waits where it needs the forest
  CudaBlock<kThreads> block(&memory);
  const auto r = static_cast<int32_t>(blockIdx.x);
  if (r < p.num_requests) {
    const Branch branch = Search(p, block, r).find();
    if (block.thread() == 0) block.give(p.branches + r, branch);
    return;
  }
  char* base = kInShared ? reinterpret_cast<char*>(dynamic_shared) : static_cast<char*>(p.scratch);
  const Scratch scratch = scratch_at(p.scratch_layout, base);
  Builder(p, scratch, block).run();
}

}  // namespace fi::forest
