// The planner kernel's CTA: scans by warp shuffles, one barrier each.
#pragma once

#include "fi/common/planner.h"

namespace fi::planner {

template <int32_t kThreads>
struct BlockMemory {
  static constexpr int32_t kMostBytes = 32;  // of what one warp tells the others in a scan

  alignas(16) char warps[2][kThreads / 32 * kMostBytes];
  int32_t marks[kThreads];
  int32_t parameters[32];
};

template <int32_t kThreads>
class CudaBlock {
 public:
  static constexpr int32_t kWarp = 32;

  __device__ explicit CudaBlock(BlockMemory<kThreads>* memory) : memory_(memory) {}

  __device__ int32_t thread() const { return static_cast<int32_t>(threadIdx.x); }
  __device__ static constexpr int32_t num_threads() { return kThreads; }
  __device__ int32_t cta() const { return static_cast<int32_t>(blockIdx.x); }
  __device__ int32_t num_ctas() const { return static_cast<int32_t>(gridDim.x); }

  __device__ void sync() const { __syncthreads(); }
  __device__ int32_t* marks() const { return memory_->marks; }

  // Reads a word of each 64 bytes of the parameters, which a launch leaves outside the constant
  // cache: to be called while other loads are under way, instead of missing one line after another
  // where they are needed. The store keeps the compiler from dropping it.
  __device__ void await_parameters(const PlanKernelParams& p) const {
    constexpr int32_t kLine = 64 / sizeof(int32_t), kLines = (sizeof(p) + 63) / 64;
    static_assert(kLines <= 32);
    if (thread() >= kLines) return;
    memory_->parameters[thread()] = reinterpret_cast<const int32_t*>(&p)[thread() * kLine];
  }

  // Value of the last marked lane before this one; unspecified if there is none. For whole warps.
  __device__ int32_t last_before(bool is_marked, int32_t value) const {
    const uint32_t marked = __ballot_sync(~0u, is_marked), lane = threadIdx.x % 32;
    return __shfl_sync(~0u, value, 31 - __clz(marked & ((1u << lane) - 1)));
  }

  // Sum over the threads before this one; *total: over all. ORs *bits, if given, over all.
  template <class Sums>
  __device__ Sums scan(const Sums& value, Sums* total, int32_t* bits = nullptr) {
    struct alignas(16) Warp {
      Sums sums;
      int32_t bits;
    };
    static_assert(sizeof(Warp) <= BlockMemory<kThreads>::kMostBytes);
    constexpr int32_t kWarps = kThreads / 32;
    // Consecutive scans take turns with two arrays: whoever writes the first one again has passed
    // the barrier of the scan between, and so has everyone who read it.
    Warp* warps = reinterpret_cast<Warp*>(memory_->warps[turn_]);
    turn_ ^= 1;
    const int32_t lane = thread() % 32, warp = thread() / 32;
    Sums here = value;
#pragma unroll
    for (int32_t offset = 1; offset < 32; offset *= 2) {
      const Sums before = here.mapped(ShuffleUp{offset});
      if (lane >= offset) here += before;
    }
    const int32_t warp_bits = bits ? __reduce_or_sync(~0u, *bits) : 0;
    if (lane == 31) warps[warp] = {here, warp_bits};
    Sums before = here.mapped(ShuffleUp{1});
    if (lane == 0) before = {};
    __syncthreads();
    // Few warps: adding them up one by one is faster than a second round of shuffles.
    Sums warps_before{}, all{};
    int32_t all_bits = 0;
#pragma unroll
    for (int32_t w = 0; w < kWarps; ++w) {
      const Warp other = warps[w];
      if (w < warp) warps_before += other.sums;
      all += other.sums;
      all_bits |= other.bits;
    }
    before += warps_before;
    if (bits) *bits = all_bits;
    *total = all;
    return before;
  }

 private:
  struct ShuffleUp {
    int32_t offset;

    template <class Member>
    __device__ Member operator()(Member member) const {
      return __shfl_up_sync(~0u, member, offset);
    }
  };

  BlockMemory<kThreads>* memory_;
  int32_t turn_ = 0;
};

// Body of the kernel. kInShared: scratch in dynamic shared memory, else at p.scratch.
template <int32_t kThreads, int32_t kPerThread, bool kInShared, bool kInvariant>
__device__ void run(const PlanKernelParams& p) {
  extern __shared__ int4 dynamic_shared[];
  __shared__ BlockMemory<kThreads> memory;
  char* base = reinterpret_cast<char*>(dynamic_shared);
  if constexpr (!kInShared) {
    base = static_cast<char*>(p.scratch) + blockIdx.x * p.scratch_layout.total_bytes;
  }
  const Scratch scratch = scratch_at(p.scratch_layout, base);
  CudaBlock<kThreads> block(&memory);
  StepPlanner<CudaBlock<kThreads>, kInvariant, kPerThread>(p, scratch, block).run();
}

}  // namespace fi::planner
