// The merge of units that are complete: nodes ascending, then the request's own splits ascending.
#pragma once

#include "fi/ptx/arrive.h"
#include "fi/ptx/load.h"
#include "fi/sm80/epilogue.h"

namespace fi::sm80 {

// Where the states of one row lie: state i at row first + i * stride of the partial buffers.
struct States {
  int first, count, stride;
};

// States that a merge rescales together. Whatever else merges at the same time decides how many
// lanes a row has and how many states are fetched at once, never this: bits must not depend on it.
constexpr int kMergeGroup = 4;

// States of a row on their way, this lane's components of them. What does not exist is of no weight
// and costs no access.
template <class S, int kQuads, int kCount>
struct FetchedStates {
  float lse[kCount];
  float4 o[kCount][kQuads];

  // The first states of those, which leaves the others.
  template <bool kSoftmax>
  __device__ void fetch(const KernelParams& p, States& from, int lane) {
    constexpr int kQuadsOfRow = S::kHeadDimVo / 4, kLanes = kLanesOfRow<S, kQuads>;
    const float* lse_at = p.partial_lse + from.first;
    const float4* o_at = reinterpret_cast<const float4*>(p.partial_o) +
                         static_cast<int64_t>(from.first) * kQuadsOfRow + lane;
    const int64_t next_o = static_cast<int64_t>(from.stride) * kQuadsOfRow;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      lse[i] = kSoftmax ? ptx::load_4(lse_at, i, from.count, neg_infinity()) : 0.0f;
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        const bool is_of_row = kQuadsOfRow % kQuads == 0 || lane + q * kLanes < kQuadsOfRow;
        o[i][q] = ptx::load_16(o_at + q * kLanes, i, is_of_row ? from.count : 0);
      }
      lse_at += from.stride;
      o_at += next_o;
    }
    from.first += kCount * from.stride;
    from.count -= kCount;
  }
};

// Adds a row's states, in order. kBatch of them are fetched at a time: one after the other would
// cost an L2 latency each.
template <class S, int kQuads, int kBatch, bool kSoftmax, int kMaxQuads>
__device__ inline void add_states(const KernelParams& p, States states, int lane,
                                  RowMerge<kSoftmax, kMaxQuads>& merge) {
  static_assert(kBatch % kMergeGroup == 0);
#pragma unroll 1
  while (states.count > 0) {
    const int left = states.count;
    FetchedStates<S, kQuads, kBatch> batch;
    batch.template fetch<kSoftmax>(p, states, lane);
    ptx::finish_loads();
#pragma unroll
    for (int g = 0; g < kBatch; g += kMergeGroup) {
      if (g >= left) break;
      merge.template add<kMergeGroup>(batch.lse + g, batch.o + g);
    }
  }
}

// What the merge of a unit needs to know of the plan.
struct alignas(16) MergeJob {
  MergeUnit unit;
  PlannedRequest request;
  NodeTile node_tile;   // of the unit's first row in the request's first node, if any
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
  const NodeLink link = r.first_link;
  const int num_kv_heads = p.num_qo_heads / S::kGroupSize;
  job.node_tile_index = (link.row_offset + job.first_row) >> Classes::log_rows(link.tile_class);
  job.node_tile =
      plan.node_tiles[link.tile_base + job.node_tile_index * num_kv_heads + job.kv_head];
}

// The states of the unit's row `row` in the node of link number `number` of the request.
template <class S, class Classes>
__device__ inline States states_in_node(const KernelParams& p, const MergeJob& job, int number,
                                        int row) {
  const bool is_first = number == job.request.link_begin;
  const PlanView plan = plan_of(p);
  const NodeLink link = is_first ? job.request.first_link : plan.links[number];
  const int log_rows = Classes::log_rows(link.tile_class);
  const int node_row = link.row_offset + job.first_row + row, tile = node_row >> log_rows;
  const int num_kv_heads = p.num_qo_heads / S::kGroupSize;
  const NodeTile at = is_first && tile == job.node_tile_index
                          ? job.node_tile
                          : plan.node_tiles[link.tile_base + tile * num_kv_heads + job.kv_head];
  return {at.partial_row + node_row - (tile << log_rows), at.num_splits, at.num_rows};
}

// Adds the states of a request's row: those in nodes, then its own, of which the first are on their
// way while those in nodes are looked up.
template <class S, int kMaxRows, int kQuads, int kBatch, class InNode, bool kSoftmax, int kMaxQuads>
__device__ inline void add_all_states(const KernelParams& p, const InNode& in_node,
                                      const PlannedRequest& request, States own, int lane,
                                      RowMerge<kSoftmax, kMaxQuads>& merge) {
  // Kernels without prefixes have nothing to look up meanwhile, and fewer registers.
  constexpr bool kFetchesAhead = kMaxRows > 64 && kQuads <= 4;
  FetchedStates<S, kQuads, kMergeGroup> ahead;
  if constexpr (kFetchesAhead) ahead.template fetch<kSoftmax>(p, own, lane);
  const int end = S::kDecodes ? request.link_begin : request.link_end;
#pragma unroll 1
  for (int link = request.link_begin; link <= end; ++link) {
    const bool is_own = link == end;
    if constexpr (kFetchesAhead) {
      if (is_own) merge.template add<kMergeGroup>(ahead.lse, ahead.o);
    }
    add_states<S, kQuads, kBatch>(p, is_own ? own : in_node(link), lane, merge);
  }
}

// Merge units that a CTA completed at once, and the rows of the largest.
template <int kWarps>
struct Completed {
  int count, most_rows;
  int skipped[kWarps - 1];  // slots without a unit, up to each warp
  int ends[kWarps - 1];     // units up to each warp

  // Place in CompletedUnits::slots of unit number `index`.
  __device__ int slot(int index) const {
    int slot = index;
#pragma unroll
    for (int w = 0; w < kWarps - 1; ++w) {
      if (index >= ends[w]) slot = index + skipped[w];
    }
    return slot;
  }
};

// The same, as each warp lists its own; between two lists all threads pass a barrier.
template <int kWarps>
struct CompletedUnits {
  int count[kWarps], most_rows[kWarps];
  int slots[32 * kWarps];  // from each warp's first on: threads that took a unit

  __device__ void list(bool takes, int num_rows) {
    const int x = static_cast<int>(ptx::thread_index());
    const uint32_t taken = __ballot_sync(0xffffffff, takes);
    const int rows = __reduce_max_sync(0xffffffff, takes ? num_rows : 0);
    if (takes) slots[x / 32 * 32 + __popc(taken & ((1u << x % 32) - 1))] = x;
    if (x % 32 == 0) {
      count[x / 32] = __popc(taken);
      most_rows[x / 32] = rows;
    }
  }

  __device__ Completed<kWarps> all() const {
    Completed<kWarps> sum{};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      sum.count += count[w];
      sum.most_rows = max_int(sum.most_rows, most_rows[w]);
      if (w == kWarps - 1) break;
      sum.ends[w] = sum.count;
      sum.skipped[w] = 32 * (w + 1) - sum.count;
    }
    return sum;
  }
};

// What a lane takes of few rows. Beside prefixes a CTA merges two decoded tokens at a time, mostly.
template <class Classes>
constexpr int kFewQuads = Classes::kMaxRows == 128 ? 2 : 1;

// Merges row `row` of a unit: this lane's part of it. kOneWidth: lanes take kMaxQuads, never fewer.
template <class S, class V, class Classes, bool kOneWidth, int kMaxQuads>
__device__ inline void merge_row(const KernelParams& p, const MergeJob& job, int row,
                                 const RowShare& share) {
  if (!kOneWidth && row >= job.unit.num_rows) return;  // units differ in their rows
  const PlannedRequest& request = job.request;
  RowMerge<V::kSoftmax, kMaxQuads> merge;
  const States own = {job.unit.partial_row + row, job.unit.num_splits, job.unit.num_rows};
  const auto in_node = [&](int link) { return states_in_node<S, Classes>(p, job, link, row); };
  if constexpr (kOneWidth) {
    add_states<S, kMaxQuads, 16 / kMaxQuads>(p, own, share.lane, merge);
  } else if (share.quads == kFewQuads<Classes>) {
    constexpr int kQuads = kFewQuads<Classes>;
    add_all_states<S, Classes::kMaxRows, kQuads, 8>(p, in_node, request, own, share.lane, merge);
  } else if (kMaxQuads == 4 || share.quads == 4) {
    add_all_states<S, Classes::kMaxRows, 4, 4>(p, in_node, request, own, share.lane, merge);
  } else {
    add_all_states<S, Classes::kMaxRows, kMaxQuads, 4>(p, in_node, request, own, share.lane, merge);
  }
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
template <class S, class V, class Classes>
__device__ inline void merge_unit(const KernelParams& p, const MergeJob& job) {
  constexpr int kThreads = Classes::kThreads;
  // Lanes for all components of a group's rows.
  constexpr int kQuads = are_few<S, kThreads>(S::kGroupSize)       ? 1
                         : are_few<S, 2 * kThreads>(S::kGroupSize) ? 2
                                                                   : 4;
  const int thread = static_cast<int>(ptx::thread_index());
  const RowShare share = share_rows<S, kThreads, kQuads>(thread);
#pragma unroll 1
  for (int row = share.row; row < job.unit.num_rows; row += share.rows_at_once) {
    merge_row<S, V, Classes, true, kQuads>(p, job, row, share);
  }
}

// Where shared memory is free of what tells an item's units: their jobs, a thread each.
template <class Classes>
struct MergeArea {
  MergeJob jobs[Classes::kThreads];
  CompletedUnits<Classes::kThreads / 32> done;
};

// Merges the units that a CTA completed.
template <class S, class V, class Classes>
__device__ inline void merge_units(const KernelParams& p, const MergeArea<Classes>& area,
                                   const Completed<Classes::kThreads / 32>& all) {
  constexpr int kThreads = Classes::kThreads;
  // Few rows have many splits and lanes enough for all their components. Many rows have few splits,
  // and what is worked out once for a row counts: weights, the address of its output. So it does in
  // kernels with tiles of 128 rows, but a third width of the sums would add a fifth to the time
  // that those, the largest of all, take to compile.
  constexpr int kMaxQuads = Classes::kMaxRows == 64 ? 8 : 4;
  const int most_rows = all.most_rows, num_rows = all.count * most_rows;
  const int thread = static_cast<int>(ptx::thread_index());
  RowShare share = share_rows<S, kThreads, kMaxQuads>(thread);
  if (kMaxQuads > 4 && num_rows <= 16) share = share_rows<S, kThreads, 4>(thread);
  if (are_few<S, kThreads * kFewQuads<Classes>>(num_rows)) {
    share = share_rows<S, kThreads, kFewQuads<Classes>>(thread);
  }
  for (int at = share.row; at < num_rows; at += share.rows_at_once) {
    // Mostly of a decoded token each: nothing to divide by.
    const bool are_tokens = most_rows == S::kGroupSize;
    const auto nth = static_cast<uint32_t>(at), rows = static_cast<uint32_t>(most_rows);
    const uint32_t index = are_tokens ? nth / S::kGroupSize : nth / rows;
    const int row = at - static_cast<int>(index) * most_rows;
    merge_row<S, V, Classes, false, kMaxQuads>(p, area.jobs[area.done.slots[all.slot(index)]], row,
                                               share);
  }
}

}  // namespace fi::sm80
