// What the passes that find a prefix forest (forest.h) are made of.
#pragma once

#include "fi/common/forest_params.h"
#include "fi/common/planner_parts.h"

namespace fi::forest {

using planner::count_bits;
using planner::highest_bit;
using planner::lowest_bit;
using planner::store_16;

// Atomics of one CTA; on a CPU its threads take turns.
FI_HOST_DEVICE inline int32_t add_to(int32_t* sum, int32_t value) {
#if defined(__CUDA_ARCH__)
  return atomicAdd(sum, value);
#else
  const int32_t before = *sum;
  *sum += value;
  return before;
#endif
}

FI_HOST_DEVICE inline uint64_t swap_if_equal(uint64_t* place, uint64_t expected, uint64_t value) {
#if defined(__CUDA_ARCH__)
  return atomicCAS(reinterpret_cast<unsigned long long*>(place), expected, value);
#else
  const uint64_t found = *place;
  if (found == expected) *place = value;
  return found;
#endif
}

// Without waiting for what was there.
FI_HOST_DEVICE inline void add_to_total(int64_t* sum, int32_t value) {
#if defined(__CUDA_ARCH__)
  atomicAdd(reinterpret_cast<unsigned long long*>(sum), static_cast<unsigned long long>(value));
#else
  *sum += value;
#endif
}

// A branch as a number, in the order of the forest; 0: none.
FI_HOST_DEVICE inline uint64_t key_of(const Branch& branch) {
  if (branch.steps <= 0) return 0;
  return static_cast<uint64_t>(branch.creator) << 32 | static_cast<uint32_t>(branch.steps);
}
FI_HOST_DEVICE inline int32_t creator_of(uint64_t key) { return static_cast<int32_t>(key >> 32); }
FI_HOST_DEVICE inline int32_t steps_of(uint64_t key) { return static_cast<int32_t>(key); }

// Reads of the step that both parts need.
class Step {
 public:
  FI_HOST_DEVICE explicit Step(const ForestKernelParams& params) : p(params) {}

  FI_HOST_DEVICE int32_t q_len(int32_t r) const { return p.qo_indptr[r + 1] - p.qo_indptr[r]; }

  FI_HOST_DEVICE int64_t kv_len(int32_t r) const {
    return p.kv_len_is_int64 ? static_cast<const int64_t*>(p.kv_len)[r]
                             : static_cast<const int32_t*>(p.kv_len)[r];
  }

  // Within capacity.
  FI_HOST_DEVICE int32_t clamped_kv_len(int32_t r) const {
    const int64_t length = kv_len(r);
    return length < 0 ? 0
                      : static_cast<int32_t>(
                            length < p.capacity.max_kv_len ? length : p.capacity.max_kv_len);
  }

  // Steps of its row that request r may share.
  FI_HOST_DEVICE int32_t steps(int32_t r) const {
    return shareable_steps(q_len(r), kv_len(r), p.capacity.max_kv_len, p.step_tokens);
  }

 private:
  const ForestKernelParams& p;
};

// Where the arrays of the forest lie.
struct Output {
  FI_HOST_DEVICE explicit Output(const ForestKernelParams& p)
      : header(static_cast<int32_t*>(p.forest)),
        nodes(at<ForestNode>(p, p.layout.nodes)),
        requests(at<ForestRequest>(p, p.layout.requests)),
        links(at<ForestLink>(p, p.layout.links)),
        totals(p.totals) {}

  // By one thread.
  FI_HOST_DEVICE void write_header(const ForestHeader& sums, int32_t kv_tokens) const {
    store_16(header, sums.num_nodes, sums.num_links, sums.num_tokens, sums.status);
    store_16(header + 4, kv_tokens, sums.saved_kv_tokens, 0, 0);
    if (!totals) return;
    add_to_total(totals, kv_tokens);
    add_to_total(totals + 1, sums.saved_kv_tokens);
  }

  int32_t* header;
  ForestNode* nodes;
  ForestRequest* requests;
  ForestLink* links;
  int64_t* totals;

 private:
  template <class T>
  FI_HOST_DEVICE static T* at(const ForestKernelParams& p, int64_t offset) {
    return reinterpret_cast<T*>(static_cast<char*>(p.forest) + offset);
  }
};

}  // namespace fi::forest
