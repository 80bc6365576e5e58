// The merge of units that are complete: nodes ascending, then the request's own splits ascending.
#pragma once

#include "fi/ptx/arrive.h"
#include "fi/ptx/cp_async.h"
#include "fi/sm80/epilogue.h"

namespace fi::sm80 {

// Where the states of one row lie: state i at row first + i * stride of the partial buffers.
struct States {
  int first, count, stride;
};

// States that a merge rescales together. Whatever else merges at the same time decides how many
// lanes a row has and how many states are fetched at once, never this: bits must not depend on it.
constexpr int kMergeGroup = 4;

// Adds a row's states in order, this lane's components of them. They come by way of shared memory,
// as many at once as it holds: one after the other would cost an L2 latency each. Its loops are
// short on purpose: a merge runs once, and fetching its instructions takes longer than its
// arithmetic. kBytes: of shared memory, for all threads.
template <class S, bool kSoftmax, int kMaxQuads, int kThreads, int kBytes>
class RowStates {
  static constexpr int kQuadsOfRow = S::kHeadDimVo / 4;
  // States that fit at once.
  template <int kQuads>
  static constexpr int kMost = kBytes / kThreads / (kQuads * 16 + 4) / kMergeGroup * kMergeGroup;
  static_assert(kMost<kMaxQuads> >= kMergeGroup);

 public:
  __device__ RowStates(const KernelParams& p, const RowShare& share, char* smem)
      : p_(p), share_(share) {
    most_ = share.quads == kMaxQuads ? kMost<kMaxQuads> : kMost<1>;
    const uint32_t thread = ptx::thread_index();
    o_ = reinterpret_cast<float4*>(smem) + thread;
    lse_ = reinterpret_cast<float*>(smem + most_ * share.quads * kThreads * 16) + thread;
  }

  // Adds what next(0), next(1), ..., next(count - 1) are.
  template <class Next>
  __device__ RowMerge<kSoftmax, kMaxQuads>& add(int count, const Next& next) {
    States states{};
    int number = 0;
#pragma unroll 1
    while (true) {
      const bool is_more = states.count > 0 || number < count;
      if (is_more && staged_ < most_) {
        if (states.count == 0) {
          states = next(number++);
          continue;
        }
        stage(states.first);
        states.first += states.stride;
        states.count -= 1;
        continue;
      }
      flush();
      if (!is_more) return merge_;
    }
  }

 private:
  __device__ void stage(int row) {
    const float* from = p_.partial_o + static_cast<int64_t>(row) * S::kHeadDimVo + share_.lane * 4;
    float4* to = o_ + staged_ * share_.quads * kThreads;
#pragma unroll 1
    for (int q = 0; q < share_.quads; ++q) {
      const bool is_of_row = share_.lane + q * share_.lanes < kQuadsOfRow;
      ptx::cp_async_16(ptx::shared_address(to + q * kThreads), from + q * share_.lanes * 4,
                       is_of_row);
    }
    if constexpr (kSoftmax) {
      ptx::cp_async_4(ptx::shared_address(lse_ + staged_ * kThreads), p_.partial_lse + row);
    }
    ++staged_;
  }

  __device__ void flush() {
    ptx::cp_async_wait_all();  // no other thread reads them
#pragma unroll 1
    for (int first = 0; first < staged_; first += kMergeGroup) add_group(first);
    staged_ = 0;
  }

  __device__ void add_group(int first) {
    float lse[kMergeGroup], weights[kMergeGroup];
#pragma unroll
    for (int i = 0; i < kMergeGroup; ++i) {
      lse[i] =
          first + i < staged_ ? kSoftmax ? lse_[(first + i) * kThreads] : 0.0f : neg_infinity();
    }
    merge_.template rescale<kMaxQuads>(merge_.weigh(lse, weights));
    const float4* o = o_ + first * share_.quads * kThreads;
#pragma unroll
    for (int i = 0; i < kMergeGroup; ++i) {
      if (first + i >= staged_) break;
#pragma unroll
      for (int q = 0; q < kMaxQuads; ++q) {
        if (q == 1 && share_.quads == 1) break;
        merge_.add_weighted(q, weights[i], o[q * kThreads]);
      }
      o += share_.quads * kThreads;
    }
  }

  const KernelParams& p_;
  const RowShare& share_;
  float4* o_;   // [state][quad][thread], this thread's
  float* lse_;  // [state][thread]
  int most_, staged_ = 0;
  RowMerge<kSoftmax, kMaxQuads> merge_;
};

// What the merge of a unit needs to know of the plan.
struct alignas(16) MergeJob {
  MergeUnit unit;
  PlannedRequest request;
  NodeLink link;        // the request's first one, if any
  NodeTile node_tile;   // of the unit's first row in that node
  int node_tile_index;  // that tile
  int request_index;
  int kv_head;
  int first_row;  // packed row of the request that is the unit's first
};

template <class S, class Classes>
__device__ inline void look_up(const KernelParams& p, int unit, int request, MergeJob& job) {
  const PlanView plan = plan_of(p);
  job.unit = plan.units[unit];
  const PlannedRequest r = job.request = plan.requests[request];
  uint32_t kv_head = unit - r.unit_base, tile = 0;
  if (r.num_tiles > 1) {
    tile = kv_head % r.num_tiles;
    kv_head /= r.num_tiles;
  }
  job.request_index = request;
  job.kv_head = kv_head;
  job.first_row = tile << Classes::log_rows(r.tile_class);
  if (S::kDecodes || r.link_begin == r.link_end) return;
  const NodeLink link = job.link = plan.links[r.link_begin];
  const int num_kv_heads = p.num_qo_heads / S::kGroupSize;
  job.node_tile_index = (link.row_offset + job.first_row) >> Classes::log_rows(link.tile_class);
  job.node_tile =
      plan.node_tiles[link.tile_base + job.node_tile_index * num_kv_heads + job.kv_head];
}

// The states of the unit's row `row` in the node of the request's link `number`.
template <class S, class Classes>
__device__ inline States states_in_node(const KernelParams& p, const MergeJob& job, int number,
                                        int row) {
  const bool is_first = number == 0;
  const PlanView plan = plan_of(p);
  const NodeLink link = is_first ? job.link : plan.links[job.request.link_begin + number];
  const int log_rows = Classes::log_rows(link.tile_class);
  const int node_row = link.row_offset + job.first_row + row, tile = node_row >> log_rows;
  const int num_kv_heads = p.num_qo_heads / S::kGroupSize;
  const NodeTile at = is_first && tile == job.node_tile_index
                          ? job.node_tile
                          : plan.node_tiles[link.tile_base + tile * num_kv_heads + job.kv_head];
  return {at.partial_row + node_row - (tile << log_rows), at.num_splits, at.num_rows};
}

// How many merge units a CTA completed at once, and the rows of the largest.
struct CompletedUnits {
  int count, most_rows;
};

// Merges row `row` of a unit: this lane's part of it.
template <class S, class V, class Classes, int kMaxQuads, int kBytes>
__device__ inline void merge_row(const KernelParams& p, const MergeJob& job, int row,
                                 const RowShare& share, char* smem) {
  const PlannedRequest& request = job.request;
  RowStates<S, V::kSoftmax, kMaxQuads, Classes::kThreads, kBytes> states(p, share, smem);
  const int num_links = S::kDecodes ? 0 : request.link_end - request.link_begin;
  auto& merge = states.add(num_links + 1, [&](int number) -> States {
    if (!S::kDecodes && number < num_links) return states_in_node<S, Classes>(p, job, number, row);
    return {job.unit.partial_row + row, job.unit.num_splits, job.unit.num_rows};
  });
  const int packed = job.first_row + row, local = packed / S::kGroupSize;
  const VariantRow who = {request.kv_len - request.q_len + local,
                          request.qo_begin + local,
                          job.kv_head * S::kGroupSize + packed % S::kGroupSize,
                          job.request_index,
                          request.q_len,
                          request.kv_len};
  write_merged<S, V>(RowTarget<S, V>(p, job.kv_head, -1), row, who, share, merge);
}

// Merges a unit of a decode, whose rows are few.
template <class S, class V, class Classes, int kBytes>
__device__ inline void merge_unit(const KernelParams& p, const MergeJob& job, char* smem) {
  constexpr int kThreads = Classes::kThreads;
  // Lanes for all components of a group's rows.
  constexpr int kQuads = are_few<S, kThreads>(S::kGroupSize)       ? 1
                         : are_few<S, 2 * kThreads>(S::kGroupSize) ? 2
                                                                   : 4;
  const RowShare share = share_rows<S, kThreads, kQuads>();
#pragma unroll 1
  for (int row = share.row; row < job.unit.num_rows; row += share.rows_at_once) {
    merge_row<S, V, Classes, kQuads, kBytes>(p, job, row, share, smem);
  }
}

// Merges the units that a CTA completed: jobs at `slots`. kBytes: of shared memory at `smem`.
template <class S, class V, class Classes, int kBytes>
__device__ inline void merge_units(const KernelParams& p, const CompletedUnits& done,
                                   const int* slots, const MergeJob* jobs, char* smem) {
  constexpr int kThreads = Classes::kThreads, kQuads = 4;
  // Few rows: lanes enough for all their components. Many: a row's weights once for several.
  const int most_rows = done.most_rows, num_rows = done.count * most_rows;
  RowShare share = share_rows<S, kThreads, kQuads>();
  if (are_few<S, kThreads>(num_rows)) share = share_rows<S, kThreads, 1>();
#pragma unroll 1
  for (int at = share.row; at < num_rows; at += share.rows_at_once) {
    const uint32_t index = static_cast<uint32_t>(at) / static_cast<uint32_t>(most_rows);
    const int row = at - static_cast<int>(index) * most_rows;
    const MergeJob& job = jobs[slots[index]];
    if (row >= job.unit.num_rows) continue;  // units differ in their rows
    merge_row<S, V, Classes, kQuads, kBytes>(p, job, row, share, smem);
  }
}

}  // namespace fi::sm80
