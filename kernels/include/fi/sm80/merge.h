// The merge of a unit by the CTA that brought its last partial state: nodes ascending, then the
// request's own splits ascending.
#pragma once

#include "fi/sm80/epilogue.h"

namespace fi::sm80 {

// A request tile whose states are merged.
struct MergeTile {
  MergeUnit unit;
  PlannedRequest request;
  int request_index, kv_head, row_begin;
};

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
    merge.add(lse, o, states.count - begin);
  }
}

// Packed row `row` of the tile in node `link`.
template <class ClassRows>
__device__ inline States states_in_node(const PlanView& plan, ClassRows class_rows,
                                        const MergeTile& tile, const NodeLink& link, int row) {
  const PlannedNode& node = plan.nodes[link.node];
  const int tile_rows = class_rows(node.tile_class);
  const int node_row = link.row_offset + tile.row_begin + row;
  const NodeTile& at =
      plan.node_tiles[node.tile_base + tile.kv_head * node.num_tiles + node_row / tile_rows];
  return {at.partial_row + node_row % tile_rows, at.num_splits, at.num_rows};
}

template <class S, class V, int kThreads, int kQuads, int kBatch, class ClassRows>
__device__ inline void merge_rows(const KernelParams& p, const PlanView& plan, ClassRows class_rows,
                                  const MergeTile& tile) {
  constexpr int kLanes = kLanesOfRow<S, kQuads>;
  const int thread = static_cast<int>(ptx::thread_index()), lane = thread % kLanes;
  constexpr int kRowsAtOnce = kThreads / kLanes;
  if (thread >= kRowsAtOnce * kLanes) return;
  const PlannedRequest& request = tile.request;
  for (int row = thread / kLanes; row < tile.unit.num_rows; row += kRowsAtOnce) {
    RowMerge<V::kSoftmax, kQuads> merge;
    for (int l = request.link_begin; l <= request.link_end; ++l) {
      States states = {tile.unit.partial_row + row, tile.unit.num_splits, tile.unit.num_rows};
      if (l < request.link_end) {
        states = states_in_node(plan, class_rows, tile, plan.links[l], row);
      }
      add_states<S, kBatch>(p, states, lane, merge);
    }
    const int packed = tile.row_begin + row, local = packed / S::kGroupSize;
    const VariantRow who = {request.kv_len - request.q_len + local,
                            request.qo_begin + local,
                            tile.kv_head * S::kGroupSize + packed % S::kGroupSize,
                            tile.request_index,
                            request.q_len,
                            request.kv_len};
    write_merged<S, V, kQuads>(p, who, tile.kv_head, lane, merge);
  }
}

// kMaxRows: of the largest tile class. kThreads: of the CTA.
template <class S, class V, int kMaxRows, int kThreads, class ClassRows>
__device__ inline void merge_unit(const KernelParams& p, const PlanView& plan, ClassRows class_rows,
                                  int unit_index, int request_index, int kv_head) {
  MergeTile tile = {plan.units[unit_index], plan.requests[request_index], request_index, kv_head,
                    0};
  const int tile_index = (unit_index - tile.request.unit_base) - kv_head * tile.request.num_tiles;
  tile.row_begin = tile_index * class_rows(tile.request.tile_class);
  // Few rows have many splits and lanes enough for all their components. Many rows have few splits,
  // and what is worked out once for a row counts: weights, the address of its output.
  if (tile.unit.num_rows * (S::kHeadDimVo / 4) <= kThreads) {
    merge_rows<S, V, kThreads, 1, 12>(p, plan, class_rows, tile);
  } else if (kMaxRows <= 16 || tile.unit.num_rows <= 16) {
    merge_rows<S, V, kThreads, 4, 3>(p, plan, class_rows, tile);
  } else {
    merge_rows<S, V, kThreads, 8, 2>(p, plan, class_rows, tile);
  }
}

}  // namespace fi::sm80
