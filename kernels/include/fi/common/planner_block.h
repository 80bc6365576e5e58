// The planner kernel's CTA: scans by warp shuffles, one barrier each.
#pragma once

#include "fi/common/planner.h"
#include "fi/ptx/cp_async.h"
#include "fi/ptx/grid.h"

namespace fi::planner {

// Sums of 32 bits each.
template <int32_t kCount>
struct alignas(8) Words {
  uint32_t at[kCount];
};

template <int32_t kThreads, bool kHasNodes>
struct BlockMemory {
  static constexpr int32_t kWarps = kThreads / 32;
  static constexpr int32_t kMostBytes = kHasNodes ? 48 : 32;  // that a warp tells others in a scan
  static constexpr int32_t kMostWords = kHasNodes ? 6 : 2;    // of sums, in whole pairs
  static constexpr int32_t kTileCosts = 128;                  // of a warp

  alignas(16) char warps[2][kWarps * kMostBytes];
  Words<kMostWords> words[3][kWarps + 1];  // see scan_words()
  uint32_t bits[3];
  int32_t marks[kThreads];
  int32_t tile_costs[kWarps][kTileCosts];
  int32_t parameters[16];
  ClassRules classes[kMaxTileClasses];
};

// The number of CTAs is a power of two.
template <int32_t kThreads, bool kInShared, bool kHasNodes>
class CudaBlock {
  using Memory = BlockMemory<kThreads, kHasNodes>;

 public:
  __device__ explicit CudaBlock(Memory* memory, char* base)
      : base_(base), memory_(memory), log_ctas_(31 - __clz(static_cast<int32_t>(gridDim.x))) {}

  __device__ int32_t thread() const { return static_cast<int32_t>(threadIdx.x); }
  __device__ static constexpr int32_t num_threads() { return kThreads; }
  __device__ static constexpr int32_t num_lanes() { return 32; }
  __device__ int32_t lane() const { return static_cast<int32_t>(threadIdx.x % 32); }
  __device__ int32_t warp() const { return static_cast<int32_t>(threadIdx.x / 32); }
  __device__ int32_t cta() const { return static_cast<int32_t>(blockIdx.x); }
  __device__ int32_t num_ctas() const { return static_cast<int32_t>(gridDim.x); }
  __device__ int32_t times_ctas(int32_t n) const { return n << log_ctas_; }
  __device__ int32_t over_ctas(int32_t n) const { return n >> log_ctas_; }

  __device__ char* scratch() const { return base_; }
  __device__ void sync() const { __syncthreads(); }
  __device__ int32_t* marks() const { return memory_->marks; }

  // After prepare().
  __device__ const ClassRules* classes() const { return memory_->classes; }

  // Room for a warp's row tiles of large requests: num_tile_costs() words.
  __device__ int32_t* tile_costs() const { return memory_->tile_costs[warp()]; }
  __device__ static constexpr int32_t num_tile_costs() { return Memory::kTileCosts; }
  // To a word in the scratch of this CTA, to which others add meanwhile.
  __device__ void add(int32_t* to, int32_t value) const { atomicAdd(to, value); }

  // 8 bytes into the scratch; they have landed after end_copies() and a barrier.
  __device__ void copy_8(void* to, const void* from) const {
    if constexpr (kInShared) {
      ptx::cp_async_8(ptx::shared_address(to), from);
    } else {
      *static_cast<Pair*>(to) = load_8(from);
    }
  }
  __device__ void end_copies() const {
    if constexpr (kInShared) ptx::cp_async_wait_all();
  }

  // The forest is read after this: the kernel that finds it may still run.
  __device__ void wait_for_forest() const { ptx::wait_for_previous_grid(); }

  // Clears the marks, and what scans need cleared; lays out classes(), which threads look up: loads
  // of parameters by index take long.
  //
  // Reads a word of each 64 bytes of the parameters, which a launch leaves outside the constant
  // cache: to be called while other loads are under way, instead of missing one line after another
  // where they are needed. A warp for each line: a warp's own misses follow one another. The store
  // keeps the compiler from dropping the load.
  template <int32_t kParamBytes>
  __device__ void prepare(const PlanKernelParams& p) const {
    // Parameters do not begin with a line: the last word may lie in one more.
    constexpr int32_t kLine = 64 / sizeof(int32_t), kLines = (kParamBytes + 63) / 64 + 1;
    constexpr int32_t kLastWord = kParamBytes / static_cast<int32_t>(sizeof(int32_t)) - 1;
    static_assert(kLines <= 16);
    memory_->marks[thread()] = -1;
    if (thread() < 3 * (kWarps + 1)) memory_->words[0][thread()] = {};
    if (thread() < 3) memory_->bits[thread()] = 0;
    if (thread() < p.tiling.num_classes) memory_->classes[thread()] = class_rules(p, thread());
    int32_t first;  // through an instruction that is not moved before the other loads
    asm volatile("mov.b32 %0, %1;" : "=r"(first) : "r"(warp()) : "memory");
#pragma unroll
    for (int32_t line = 0; line < kLines; line += kWarps) {
      if (first + line >= kLines) break;
      const int32_t at = min_i32((first + line) * kLine, kLastWord);
      const int32_t word = reinterpret_cast<const int32_t*>(&p)[at];
      if (lane() == 0) memory_->parameters[first + line] = word;
    }
    __syncthreads();
  }

  // The rest is for whole warps.
  __device__ uint32_t ballot(bool is_set) const { return __ballot_sync(~0u, is_set); }

  __device__ int32_t shuffle(int32_t value, int32_t from) const {
    return __shfl_sync(~0u, value, from);
  }

  __device__ uint32_t warp_sum(uint32_t value) const { return __reduce_add_sync(~0u, value); }

  // Sum over this lane and those before.
  __device__ uint32_t warp_scan(uint32_t value) const {
#pragma unroll
    for (int32_t offset = 1; offset < 32; offset *= 2) {
      const uint32_t before = __shfl_up_sync(~0u, value, offset);
      if (lane() >= offset) value += before;
    }
    return value;
  }

  // Value of the last marked lane before this one; unspecified if there is none.
  __device__ int32_t last_before(bool is_marked, int32_t value) const {
    const uint32_t marked = __ballot_sync(~0u, is_marked), before = (1u << lane()) - 1;
    return __shfl_sync(~0u, value, 31 - __clz(marked & before));
  }

  // Sum over the threads before this one; *total: over all. ORs *bits, if given, over all.
  // num_words: of the sums in words, how many are not zero in the whole warp, 2, 3 or all; those
  // before this thread are unspecified for the others.
  template <class Sums>
  __device__ Sums scan(const Sums& value, Sums* total, int32_t* bits = nullptr,
                       int32_t num_words = Memory::kMostWords) {
    if constexpr (Sums::kIsWords) {
      return scan_words(value, total, bits, num_words);
    } else {
      return scan_warps(value, total, bits);
    }
  }

 private:
  static constexpr int32_t kWarps = Memory::kWarps;

  struct ShuffleUp {
    int32_t offset;

    template <class Member>
    __device__ Member operator()(Member member) const {
      return __shfl_up_sync(~0u, member, offset);
    }
  };

  template <class Sums>
  __device__ Sums scan_warp(const Sums& value) const {
    Sums here = value;
#pragma unroll
    for (int32_t offset = 1; offset < 32; offset *= 2) {
      const Sums before = here.mapped(ShuffleUp{offset});
      if (lane() >= offset) here += before;
    }
    return here;
  }

  template <class Sums, int32_t kCount>
  __device__ static Sums first_words(const Words<kCount>& all) {
    struct Own {
      uint32_t at[sizeof(Sums) / sizeof(uint32_t)];
    };
    Own own;
#pragma unroll
    for (uint32_t w = 0; w < sizeof(Own) / sizeof(uint32_t); ++w) own.at[w] = all.at[w];
    return __builtin_bit_cast(Sums, own);
  }

  // The part of scan_words() before the barrier, for the first words of each lane: those of lanes
  // before.
  template <int32_t kCount, class Own>
  __device__ void scan_first(const Own& words, const int32_t* bits, Own* earlier) {
    uint32_t sum[kCount];
#pragma unroll
    for (int32_t w = 0; w < kCount; ++w) sum[w] = __reduce_add_sync(~0u, words.at[w]);
    if (warp() < lane() && lane() <= kWarps) {
#pragma unroll
      for (int32_t w = 0; w < kCount; ++w) {
        atomicAdd(&memory_->words[words_turn_][lane()].at[w], sum[w]);
      }
    }
    if (bits && *bits != 0) atomicOr(&memory_->bits[words_turn_], static_cast<uint32_t>(*bits));
#pragma unroll
    for (int32_t w = 0; w < kCount; ++w) earlier->at[w] = warp_scan(words.at[w]) - words.at[w];
  }

  // Sums of 32 bits: each warp adds its own to those of all later ones before it scans its lanes,
  // and nothing but a load is left to do after the barrier. Bits are rare.
  template <class Sums>
  __device__ Sums scan_words(const Sums& value, Sums* total, int32_t* bits, int32_t num_words) {
    constexpr int32_t kCount = sizeof(Sums) / sizeof(uint32_t);
    struct Own {
      uint32_t at[kCount];
    };
    const int32_t turn = words_turn_;
    const auto words = __builtin_bit_cast(Own, value);
    Own earlier{};
    if (kCount == 2 || num_words == 2) {
      scan_first<2>(words, bits, &earlier);
    } else if (num_words == 3) {
      scan_first<3>(words, bits, &earlier);
    } else {
      scan_first<kCount>(words, bits, &earlier);
    }
    __syncthreads();
    const auto before = memory_->words[turn][warp()];
    *total = first_words<Sums>(memory_->words[turn][kWarps]);
    if (bits) *bits = static_cast<int32_t>(memory_->bits[turn]);
    // Three arrays take turns. That of the last scan was read before this barrier, and is added to
    // again after the next one: now is the time to clear it.
    words_turn_ = turn == 2 ? 0 : turn + 1;
    const int32_t last = turn == 0 ? 2 : turn - 1;
    if (thread() <= kWarps) memory_->words[last][thread()] = {};
    if (thread() == 0) memory_->bits[last] = 0;
    Sums sums = __builtin_bit_cast(Sums, earlier);
    sums += first_words<Sums>(before);
    return sums;
  }

  // Any sums: the warps' are added one by one.
  template <class Sums>
  __device__ Sums scan_warps(const Sums& value, Sums* total, int32_t* bits) {
    struct alignas(16) Warp {
      Sums sums;
      int32_t bits;
    };
    static_assert(sizeof(Warp) <= Memory::kMostBytes);
    // Consecutive scans take turns with two arrays: whoever writes the first one again has passed
    // the barrier of the scan between, and so has everyone who read it.
    Warp* warps = reinterpret_cast<Warp*>(memory_->warps[turn_]);
    turn_ ^= 1;
    const Sums here = scan_warp(value);
    const int32_t warp_bits = bits ? __reduce_or_sync(~0u, *bits) : 0;
    if (lane() == 31) warps[warp()] = {here, warp_bits};
    Sums before = here.mapped(ShuffleUp{1});
    if (lane() == 0) before = {};
    __syncthreads();
    Sums warps_before{}, all{};
    int32_t all_bits = 0;
#pragma unroll(sizeof(Sums) > 24 ? 2 : kWarps)  // wide ones would take all registers
    for (int32_t w = 0; w < kWarps; ++w) {
      const Warp other = warps[w];
      if (w < warp()) warps_before += other.sums;
      all += other.sums;
      all_bits |= other.bits;
    }
    before += warps_before;
    if (bits) *bits = all_bits;
    *total = all;
    return before;
  }

  char* base_;
  Memory* memory_;
  int32_t log_ctas_;
  int32_t turn_ = 0;
  int32_t words_turn_ = 0;
};

// Body of the kernel. kInShared: scratch in dynamic shared memory, else at p.scratch.
template <int32_t kThreads, bool kInShared, Mode kMode>
__device__ void run(const PlanKernelParams& p) {
  extern __shared__ int4 dynamic_shared[];
  __shared__ BlockMemory<kThreads, kMode.has_nodes> memory;
  char* base = reinterpret_cast<char*>(dynamic_shared);
  if constexpr (!kInShared) {
    base = static_cast<char*>(p.scratch) + blockIdx.x * p.scratch_layout.total_bytes;
  }
  using Block = CudaBlock<kThreads, kInShared, kMode.has_nodes>;
  auto scratch = scratch_at<typename CostType<kMode>::Type>(p, base);
  Block block(&memory, base);
  StepPlanner<Block, kMode>(p, scratch, block).run();
}

}  // namespace fi::planner
