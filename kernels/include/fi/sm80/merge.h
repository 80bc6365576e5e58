// The merge of units by the CTA that brought their last partial state: nodes ascending, then the
// request's own splits ascending.
#pragma once

#include "fi/ptx/load.h"
#include "fi/sm80/epilogue.h"

namespace fi::sm80 {

// Where the states of one row lie: state i at row first + i * stride of the partial buffers.
struct States {
  int64_t first;
  int count, stride;
};

// Adds a row's states, in order. kBatch of them are fetched at a time: one after the other would
// cost an L2 latency each.
template <class S, int kBatch, bool kSoftmax, int kQuads>
__device__ inline void add_states(const KernelParams& p, const States& states, int lane,
                                  RowMerge<kSoftmax, kQuads>& merge) {
  for (int begin = 0; begin < states.count; begin += kBatch) {
    float lse[kBatch];
    float4 o[kBatch][kQuads];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      // Past the last one: the last one again, and not used.
      const int state = min_i32(begin + i, states.count - 1);
      const int64_t at = states.first + static_cast<int64_t>(state) * states.stride;
      lse[i] = kSoftmax ? __ldcg(p.partial_lse + at) : 0.0f;
      const float4* row = reinterpret_cast<const float4*>(p.partial_o + at * S::kHeadDimVo);
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        o[i][q] = __ldcg(row + min_i32(lane + q * kLanesOfRow<S, kQuads>, S::kHeadDimVo / 4 - 1));
      }
    }
    ptx::finish_loads();
    merge.add(lse, o, states.count - begin);
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

// How many merge units an item completed, and the rows of the largest.
struct CompletedUnits {
  int count, most_rows;
};

// A row of a merge unit.
struct UnitRow {
  const MergeUnit* unit;
  const PlannedRequest* request;
  int kv_head;
  int row;     // of the unit
  int packed;  // of the request
};

// All states of a row, kQuads times four components a lane: with few of them a lane has registers
// for many states at once.
template <class S, class V, int kQuads, int kBatch, class ClassRows>
__device__ inline RowMerge<V::kSoftmax, kQuads> merge_row(const KernelParams& p,
                                                          const PlanView& plan,
                                                          ClassRows class_rows, const UnitRow& at,
                                                          int lane) {
  RowMerge<V::kSoftmax, kQuads> merge;
  for (int l = at.request->link_begin; l <= at.request->link_end; ++l) {
    States states = {at.unit->partial_row + at.row, at.unit->num_splits, at.unit->num_rows};
    if (l < at.request->link_end) {
      states = states_in_node(plan, class_rows, plan.links[l], at.kv_head, at.packed);
    }
    add_states<S, kBatch>(p, states, lane, merge);
  }
  return merge;
}

// Merges the units that an item completed, of one KV head, listed in shared memory. kMaxRows: of
// the largest tile class. kThreads: of the CTA.
template <class S, class V, int kMaxRows, int kThreads, class ClassRows>
__device__ inline void merge_units(const KernelParams& p, const PlanView& plan,
                                   ClassRows class_rows, const CompletedUnits& done,
                                   const RequestUnit* units, int kv_head) {
  // Few rows have many splits and lanes enough for all their components. Many rows have few splits,
  // and what is worked out once for a row counts: weights, the address of its output.
  constexpr int kMaxQuads = kMaxRows <= 16 ? 4 : 8;
  const int most_rows = done.most_rows, num_rows = done.count * most_rows;
  RowShare share = share_rows<S, kThreads, kMaxQuads>();
  if (num_rows <= 16) share = share_rows<S, kThreads, 4>();
  if (are_few<S, kThreads>(num_rows)) share = share_rows<S, kThreads, 1>();
  for (int at = share.row; at < num_rows; at += share.rows_at_once) {
    const int index =
        static_cast<int>(static_cast<uint32_t>(at) / static_cast<uint32_t>(most_rows));
    const int row = at - index * most_rows;
    const int unit_index = units[index].unit, request_index = units[index].request;
    const MergeUnit& unit = plan.units[unit_index];
    if (row >= unit.num_rows) continue;
    const PlannedRequest& request = plan.requests[request_index];
    const int tile_index = (unit_index - request.unit_base) - kv_head * request.num_tiles;
    const int packed = tile_index * class_rows(request.tile_class) + row;
    RowMerge<V::kSoftmax, kMaxQuads> merge;
    const UnitRow unit_row = {&unit, &request, kv_head, row, packed};
    if (share.quads == 1) {
      merge.take(merge_row<S, V, 1, 12>(p, plan, class_rows, unit_row, share.lane));
    } else if (kMaxQuads == 4 || share.quads == 4) {
      merge.take(merge_row<S, V, 4, 3>(p, plan, class_rows, unit_row, share.lane));
    } else {
      constexpr int kBatch = kMaxRows <= 64 ? 4 : 2;
      merge.take(merge_row<S, V, kMaxQuads, kBatch>(p, plan, class_rows, unit_row, share.lane));
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
