// The merge of units by the CTA that brought their last partial state: nodes ascending, then the
// request's own splits ascending.
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

// Fetches kBatch states from state `first` on, or the last one again, and their lse.
template <class S, bool kSoftmax, int kBatch, int kQuads>
__device__ inline void fetch_states(const KernelParams& p, const States& states, int first,
                                    int lane, float (&lse)[kBatch], float4 (&o)[kBatch][kQuads]) {
  constexpr int kQuadsOfRow = S::kHeadDimVo / 4, kLanes = kLanesOfRow<S, kQuads>;
  const float4* part = reinterpret_cast<const float4*>(p.partial_o) + lane;
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    const int state = min_i32(first + i, states.count - 1);
    const uint32_t at = states.first + state * states.stride;
    lse[i] = kSoftmax ? __ldcg(p.partial_lse + at) : 0.0f;
    const float4* quad = part + static_cast<uint64_t>(at) * kQuadsOfRow;
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      // Past the row's end, where it does not divide: the last one, and not used.
      const bool exists = kQuadsOfRow % kQuads == 0 || lane + q * kLanes < kQuadsOfRow;
      o[i][q] = __ldcg(quad + (exists ? q * kLanes : kQuadsOfRow - 1 - lane));
    }
  }
  ptx::finish_loads();
}

// Adds a row's states, in order. kBatch of them are fetched at a time: one after the other would
// cost an L2 latency each.
template <class S, int kQuads, int kBatch, bool kSoftmax, int kMaxQuads>
__device__ inline void add_states(const KernelParams& p, const States& states, int lane,
                                  RowMerge<kSoftmax, kMaxQuads>& merge) {
  static_assert(kBatch % kMergeGroup == 0);
  for (int begin = 0; begin < states.count; begin += kBatch) {
    float lse[kBatch];
    float4 o[kBatch][kQuads];
    fetch_states<S, kSoftmax>(p, states, begin, lane, lse, o);
#pragma unroll
    for (int g = 0; g < kBatch; g += kMergeGroup) {
      const int count = states.count - begin - g;
      if (count <= 0) break;
      float group_lse[kMergeGroup];
      float4 group_o[kMergeGroup][kQuads];
#pragma unroll
      for (int i = 0; i < kMergeGroup; ++i) {
        group_lse[i] = lse[g + i];
#pragma unroll
        for (int q = 0; q < kQuads; ++q) group_o[i][q] = o[g + i][q];
      }
      merge.add(group_lse, group_o, count);
    }
  }
}

// A request's packed row `packed` in node `link`.
template <class ClassRows>
__device__ inline States states_in_node(const PlanView& plan, ClassRows class_rows,
                                        const NodeLink& link, int kv_head, int packed) {
  const PlannedNode& node = plan.nodes[link.node];
  const int tile_rows = class_rows(node.tile_class), node_row = link.row_offset + packed;
  const NodeTile& at =
      plan.node_tiles[node.tile_base + kv_head * node.num_tiles + node_row / tile_rows];
  return {at.partial_row + node_row % tile_rows, at.num_splits, at.num_rows};
}

// A merge unit and the request whose it is.
struct RequestUnit {
  int unit, request;
};

// How many merge units a CTA completed at once, and the rows of the largest.
struct CompletedUnits {
  int count, most_rows;
};

// Merges the units that a CTA completed, listed in shared memory. kMaxRows: of the largest tile
// class. kThreads: of the CTA.
template <class S, class V, int kMaxRows, int kThreads, class ClassRows>
__device__ inline void merge_units(const KernelParams& p, const PlanView& plan,
                                   ClassRows class_rows, const CompletedUnits& done,
                                   const RequestUnit* units) {
  // Few rows have many splits and lanes enough for all their components. Many rows have few splits,
  // and what is worked out once for a row counts: weights, the address of its output. So it does in
  // kernels with tiles of 128 rows, but a third width of the sums would add a fifth to the time
  // that those, the largest of all, take to compile. Of a decode, all rows are few.
  constexpr int kMaxQuads = S::kDecodes && are_few<S, kThreads>(S::kGroupSize) ? 1
                            : kMaxRows == 64                                   ? 8
                                                                               : 4;
  const int most_rows = done.most_rows, num_rows = done.count * most_rows;
  RowShare share = share_rows<S, kThreads, kMaxQuads>();
  if (kMaxQuads > 4 && num_rows <= 16) share = share_rows<S, kThreads, 4>();
  if (are_few<S, kThreads>(num_rows)) share = share_rows<S, kThreads, 1>();
  for (int at = share.row; at < num_rows; at += share.rows_at_once) {
    const int index =
        static_cast<int>(static_cast<uint32_t>(at) / static_cast<uint32_t>(most_rows));
    const int row = at - index * most_rows;
    const auto [unit_index, request_index] = units[index];
    const MergeUnit& unit = plan.units[unit_index];
    if (row >= unit.num_rows) continue;
    const PlannedRequest& request = plan.requests[request_index];
    const uint32_t index_in_request = unit_index - request.unit_base;
    const int kv_head = index_in_request / static_cast<uint32_t>(request.num_tiles);
    const int tile_index = index_in_request - kv_head * request.num_tiles;
    const int packed = tile_index * class_rows(request.tile_class) + row;
    RowMerge<V::kSoftmax, kMaxQuads> merge;
    const int last = S::kDecodes ? request.link_begin : request.link_end;
    for (int l = request.link_begin; l <= last; ++l) {
      States states = {unit.partial_row + row, unit.num_splits, unit.num_rows};
      if (!S::kDecodes && l < last) {
        states = states_in_node(plan, class_rows, plan.links[l], kv_head, packed);
      }
      if (kMaxQuads == 1 || share.quads == 1) {
        add_states<S, 1, 16>(p, states, share.lane, merge);
      } else if (kMaxQuads == 4 || share.quads == 4) {
        add_states<S, 4, 4>(p, states, share.lane, merge);
      } else {
        add_states<S, kMaxQuads, 4>(p, states, share.lane, merge);
      }
    }
    const int local = packed / S::kGroupSize;
    const VariantRow who = {request.kv_len - request.q_len + local,
                            request.qo_begin + local,
                            kv_head * S::kGroupSize + packed % S::kGroupSize,
                            request_index,
                            request.q_len,
                            request.kv_len};
    write_merged<S, V>(RowTarget<S, V>(p, kv_head, -1), row, who, share, merge);
  }
}

}  // namespace fi::sm80
