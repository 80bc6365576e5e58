// From a finished item to memory: the final output, a partial state, or a merge.
#pragma once

#include "fi/attention/partial_state.h"
#include "fi/sm80/main_loop.h"

namespace fi::sm80 {

template <class S>
__device__ inline int q_head_of(const WorkItem& item, int row) {
  return item.kv_head * S::kGroupSize + (item.row_begin + row) % S::kGroupSize;
}

// One row of o, `o[0..3]` at component d: to the output (bf16/fp16) or to a partial state.
template <class S>
__device__ inline void store4(const KernelParams& p, int64_t at, float4 o) {
  using Element = typename S::Element;
  uint2 packed = {ElementOps<Element>::pack(o.x, o.y), ElementOps<Element>::pack(o.z, o.w)};
  *reinterpret_cast<uint2*>(static_cast<Element*>(p.out) + at) = packed;
}

// 64 and 128 rows: each warp holds whole rows in registers.
template <class S, class T>
__device__ inline void write_rows(const KernelParams& p, const WorkItem& item, const RowInfo* rows,
                                  int first_row, const WarpState<S, T>& state) {
  const int lane = threadIdx.x % 32;
  const float v_scale = scale_of(p.v_scale, item.kv_head);
#pragma unroll
  for (int b = 0; b < T::kRowBlocks; ++b) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + b * 16 + half * 8 + lane / 4;
      float sum = state.row_sum[b][half];
      sum += __shfl_xor_sync(0xffffffff, sum, 1);
      sum += __shfl_xor_sync(0xffffffff, sum, 2);
      if (row >= item.num_rows) continue;
      const float lse = sum > 0.0f ? state.row_max[b][half] + log2_approx(sum) : neg_infinity();
      const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
      if (item.partial_row >= 0) {
        const int64_t at = item.partial_row + row;
        if (lane % 4 == 0) p.partial_lse[at] = lse;
#pragma unroll
        for (int n = 0; n < S::kHeadDimVo / 8; ++n) {
          float2 o = {state.o[b][n][half * 2] * inverse, state.o[b][n][half * 2 + 1] * inverse};
          *reinterpret_cast<float2*>(p.partial_o + at * S::kHeadDimVo + n * 8 + lane % 4 * 2) = o;
        }
        continue;
      }
      const int token = rows[row].token, q_head = q_head_of<S>(item, row);
      const FinalRow final = with_sink(p, q_head, lse);
      if (lane % 4 == 0) write_lse(p, token, q_head, final.lse_log2);
      const float factor = inverse * final.weight * v_scale;
      const int64_t at = token * p.out_stride_token + q_head * p.out_stride_head;
#pragma unroll
      for (int n = 0; n < S::kHeadDimVo / 8; ++n) {
        const uint32_t pair = ElementOps<typename S::Element>::pack(
            state.o[b][n][half * 2] * factor, state.o[b][n][half * 2 + 1] * factor);
        *reinterpret_cast<uint32_t*>(static_cast<typename S::Element*>(p.out) + at + n * 8 +
                                     lane % 4 * 2) = pair;
      }
    }
  }
}

// 16 rows: the warps' states of the same rows meet in shared memory.
template <class S, class T>
__device__ inline void merge_warps(const KernelParams& p, const WorkItem& item, const RowInfo* rows,
                                   char* smem, const WarpState<S, T>& state) {
  constexpr int kPitch =
      S::kHeadDimVo + 4;  // floats; rows r and r + 1 of a lane group: no conflict
  float* o = reinterpret_cast<float*>(smem);
  float* lses = o + kWarps * 16 * kPitch;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = half * 8 + lane / 4;
    float sum = state.row_sum[0][half];
    sum += __shfl_xor_sync(0xffffffff, sum, 1);
    sum += __shfl_xor_sync(0xffffffff, sum, 2);
    if (row >= item.num_rows) continue;
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    if (lane % 4 == 0) {
      lses[warp * 16 + row] =
          sum > 0.0f ? state.row_max[0][half] + log2_approx(sum) : neg_infinity();
    }
#pragma unroll
    for (int n = 0; n < S::kHeadDimVo / 8; ++n) {
      float2 pair = {state.o[0][n][half * 2] * inverse, state.o[0][n][half * 2 + 1] * inverse};
      *reinterpret_cast<float2*>(o + (warp * 16 + row) * kPitch + n * 8 + lane % 4 * 2) = pair;
    }
  }
  __syncthreads();
  constexpr int kQuads = S::kHeadDimVo / 4;
  const float v_scale = scale_of(p.v_scale, item.kv_head);
  for (int i = threadIdx.x; i < item.num_rows * kQuads; i += kThreads) {
    const int row = i / kQuads, d = i % kQuads * 4;
    RowMerge merge;
    float4 total = {0, 0, 0, 0};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 f = merge.add(lses[w * 16 + row]);
      const float4 x = *reinterpret_cast<const float4*>(o + (w * 16 + row) * kPitch + d);
      total = {total.x * f.x + x.x * f.y, total.y * f.x + x.y * f.y, total.z * f.x + x.z * f.y,
               total.w * f.x + x.w * f.y};
    }
    const float lse = merge.lse_log2();
    float factor = merge.sum > 0.0f ? 1.0f / merge.sum : 0.0f;
    if (item.partial_row >= 0) {
      const int64_t at = item.partial_row + row;
      if (d == 0) p.partial_lse[at] = lse;
      total = {total.x * factor, total.y * factor, total.z * factor, total.w * factor};
      *reinterpret_cast<float4*>(p.partial_o + at * S::kHeadDimVo + d) = total;
      continue;
    }
    const int token = rows[row].token, q_head = q_head_of<S>(item, row);
    const FinalRow final = with_sink(p, q_head, lse);
    if (d == 0) write_lse(p, token, q_head, final.lse_log2);
    factor *= final.weight * v_scale;
    store4<S>(p, token * p.out_stride_token + q_head * p.out_stride_head + d,
              {total.x * factor, total.y * factor, total.z * factor, total.w * factor});
  }
}

// The last arriver merges a request tile's states: nodes ascending, then its own splits ascending.
template <class S, class ClassRows>
__device__ inline void merge_unit(const KernelParams& p, const PlanView& plan, ClassRows class_rows,
                                  int unit_index, int request_index, int kv_head) {
  const MergeUnit unit = plan.units[unit_index];
  const PlannedRequest request = plan.requests[request_index];
  const int tile = (unit_index - request.unit_base) - kv_head * request.num_tiles;
  const int row_begin = tile * class_rows(request.tile_class);
  constexpr int kQuads = S::kHeadDimVo / 4;
  const float v_scale = scale_of(p.v_scale, kv_head);
  for (int i = threadIdx.x; i < unit.num_rows * kQuads; i += kThreads) {
    const int row = i / kQuads, d = i % kQuads * 4;
    RowMerge merge;
    float4 total = {0, 0, 0, 0};
    const auto take = [&](int64_t at) {
      const float2 f = merge.add(__ldcg(p.partial_lse + at));
      const float4 x =
          __ldcg(reinterpret_cast<const float4*>(p.partial_o + at * S::kHeadDimVo + d));
      total = {total.x * f.x + x.x * f.y, total.y * f.x + x.y * f.y, total.z * f.x + x.z * f.y,
               total.w * f.x + x.w * f.y};
    };
    for (int l = request.link_begin; l < request.link_end; ++l) {
      const PlannedNode& node = plan.nodes[plan.links[l].node];
      const int node_row = plan.links[l].row_offset + row_begin + row;
      const int node_tile = node_row / class_rows(node.tile_class);
      const NodeTile& record =
          plan.node_tiles[node.tile_base + kv_head * node.num_tiles + node_tile];
      const int in_tile = node_row - node_tile * class_rows(node.tile_class);
      for (int s = 0; s < record.num_splits; ++s) {
        take(record.partial_row + s * record.num_rows + in_tile);
      }
    }
    for (int s = 0; s < unit.num_splits; ++s) take(unit.partial_row + s * unit.num_rows + row);
    const int token = request.qo_begin + (row_begin + row) / S::kGroupSize;
    const int q_head = kv_head * S::kGroupSize + (row_begin + row) % S::kGroupSize;
    const FinalRow final = with_sink(p, q_head, merge.lse_log2());
    if (d == 0) write_lse(p, token, q_head, final.lse_log2);
    const float factor = merge.sum > 0.0f ? final.weight * v_scale / merge.sum : 0.0f;
    store4<S>(p, token * p.out_stride_token + q_head * p.out_stride_head + d,
              {total.x * factor, total.y * factor, total.z * factor, total.w * factor});
  }
}

}  // namespace fi::sm80
