// From a finished item to memory: the final output, a partial state, or a merge.
#pragma once

#include "fi/attention/partial_state.h"
#include "fi/sm80/main_loop.h"

namespace fi::sm80 {

// kCount consecutive components of a row of `out`, the first at element `at`.
template <class S, int kCount>
__device__ inline void store_out(const KernelParams& p, int64_t at, const float (&x)[kCount]) {
  using Element = typename S::Element;
  if (p.out_is_float32) {
    float* out = static_cast<float*>(p.out) + at;
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = x[i];
    return;
  }
  Element* out = static_cast<Element*>(p.out) + at;
  if constexpr (S::kAligned) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      reinterpret_cast<uint32_t*>(out)[i / 2] = ElementOps<Element>::pack(x[i], x[i + 1]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = ElementOps<Element>::from_float(x[i]);
  }
}

// The last step of a row: sinks, v scale, the variant's output functions, memory.
template <class S, class V>
class RowWriter {
 public:
  __device__ RowWriter(const KernelParams& p, const VariantRow& row, int kv_head, float lse_log2,
                       float inverse_sum)
      : p_(p), row_(row), kv_head_(kv_head) {
    final_ = V::kSoftmax ? with_sink(p, row.q_head, lse_log2) : FinalRow{1.0f, 0.0f};
    factor_ = inverse_sum * final_.weight * scale_of(p.v_scale, kv_head);
    at_ = row.token * p.out_stride_token + row.q_head * p.out_stride_head;
  }

  __device__ void write_lse() const {
    if constexpr (V::kSoftmax) fi::write_lse(p_, row_.token, row_.q_head, final_.lse_log2);
  }

  // Components d, d + 1, ... of the row's o.
  template <int kCount>
  __device__ void write(int d, float (&x)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      x[i] *= factor_;
      if constexpr (V::Outputs::kCount > 0) {
        if (!p_.is_partial) {
          x[i] = apply_all(typename V::Outputs{}, p_, row_, kv_head_, d + i, x[i]);
        }
      }
    }
    store_out<S>(p_, at_ + d, x);
  }

 private:
  const KernelParams& p_;
  const VariantRow& row_;
  int kv_head_;
  FinalRow final_;
  float factor_;
  int64_t at_;
};

// Consecutive components of a row that a lane holds: pairs, and fours with an fp8 cache
// (main_loop.h, pv).
template <class S>
constexpr int kRun = S::kFp8 ? 4 : 2;

// Calls visit(d, x) for every run of components of a row that this lane holds.
template <class S, class Visit>
__device__ inline void for_each_run(const float (&o)[S::kHeadDimVo / 8][4], int half, Visit visit) {
  const int lane = ptx::thread_index() % 4;
  if constexpr (S::kFp8) {
#pragma unroll
    for (int n = 0; n < S::kHeadDimVo / 8; n += 2) {
      float x[4] = {o[n][half * 2], o[n + 1][half * 2], o[n][half * 2 + 1], o[n + 1][half * 2 + 1]};
      visit(n * 8 + lane * 4, x);
    }
  } else {
#pragma unroll
    for (int n = 0; n < S::kHeadDimVo / 8; ++n) {
      float x[2] = {o[n][half * 2], o[n][half * 2 + 1]};
      visit(n * 8 + lane * 2, x);
    }
  }
}

template <int kCount>
__device__ inline void store_floats(float* to, const float (&x)[kCount]) {
  if constexpr (kCount == 4) {
    *reinterpret_cast<float4*>(to) = {x[0], x[1], x[2], x[3]};
  } else {
    *reinterpret_cast<float2*>(to) = {x[0], x[1]};
  }
}

// A row's state as its lanes hold it, the row's sum gathered from them.
struct RowSum {
  float inverse, lse_log2;
};

template <class V>
__device__ inline RowSum finish_row(float row_max, float row_sum) {
  if constexpr (!V::kSoftmax) return {1.0f, 0.0f};
  row_sum += __shfl_xor_sync(0xffffffff, row_sum, 1);
  row_sum += __shfl_xor_sync(0xffffffff, row_sum, 2);
  if (row_sum == 0.0f) return {0.0f, neg_infinity()};
  return {reciprocal(row_sum), row_max + log2_approx(row_sum)};  // NaN stays NaN
}

// Warps that split rows only: each holds whole rows in registers.
template <class S, class V, class T>
__device__ inline void write_rows(const KernelParams& p, const WorkItem& item,
                                  const VariantRow* rows, int first_row,
                                  const WarpState<S, T>& state) {
  const int lane = ptx::thread_index() % 32;
#pragma unroll
  for (int b = 0; b < T::kRowBlocks; ++b) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + b * 16 + half * 8 + lane / 4;
      const RowSum done = finish_row<V>(state.row_max[b][half], state.row_sum[b][half]);
      if (row >= item.num_rows) continue;
      if (item.partial_row >= 0) {
        const int64_t at = item.partial_row + row;
        if (V::kSoftmax && lane % 4 == 0) p.partial_lse[at] = done.lse_log2;
        for_each_run<S>(state.o[b], half, [&](int d, float (&x)[kRun<S>]) {
          for (float& value : x) value *= done.inverse;
          store_floats(p.partial_o + at * S::kHeadDimVo + d, x);
        });
        continue;
      }
      const RowWriter<S, V> writer(p, rows[row], item.kv_head, done.lse_log2, done.inverse);
      if (lane % 4 == 0) writer.write_lse();
      for_each_run<S>(state.o[b], half, [&](int d, float (&x)[kRun<S>]) { writer.write(d, x); });
    }
  }
}

// Warps that split the KV tokens: their states of the same rows meet in shared memory.
template <class S, class V, class T>
__device__ inline void merge_warps(const KernelParams& p, const WorkItem& item,
                                   const VariantRow* rows, int first_row, bool is_idle, char* smem,
                                   const WarpState<S, T>& state) {
  constexpr int kPitch =
      S::kHeadDimVo + 4;  // floats; rows r and r + 1 of a lane group: no conflict
  float* o = reinterpret_cast<float*>(smem);  // [kWarpsN][kRows][kPitch]
  float* lses = o + T::kWarpsN * T::kRows * kPitch;
  const uint32_t thread = ptx::thread_index();
  const int lane = thread % 32;
  const int place = thread / 32 % T::kWarpsN * T::kRows;
#pragma unroll
  for (int b = 0; b < T::kRowBlocks; ++b) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + b * 16 + half * 8 + lane / 4;
      const RowSum done = finish_row<V>(state.row_max[b][half], state.row_sum[b][half]);
      if (is_idle || row >= item.num_rows) continue;
      if (lane % 4 == 0) lses[place + row] = done.lse_log2;
      for_each_run<S>(state.o[b], half, [&](int d, float (&x)[kRun<S>]) {
        for (float& value : x) value *= done.inverse;
        store_floats(o + (place + row) * kPitch + d, x);
      });
    }
  }
  __syncthreads();
  constexpr int kQuads = S::kHeadDimVo / 4;
  for (int i = ptx::thread_index(); i < item.num_rows * kQuads; i += T::kThreads) {
    const int row = i / kQuads, d = i % kQuads * 4;
    RowMerge<V::kSoftmax> merge;
#pragma unroll
    for (int w = 0; w < T::kWarpsN; ++w) {
      const int at = w * T::kRows + row;
      merge.add(lses[at], *reinterpret_cast<const float4*>(o + at * kPitch + d));
    }
    float x[4] = {merge.total.x, merge.total.y, merge.total.z, merge.total.w};
    if (item.partial_row >= 0) {
      const int64_t at = item.partial_row + row;
      if (V::kSoftmax && d == 0) p.partial_lse[at] = merge.lse_log2();
      for (float& value : x) value *= merge.inverse_sum();
      store_floats(p.partial_o + at * S::kHeadDimVo + d, x);
      continue;
    }
    const RowWriter<S, V> writer(p, rows[row], item.kv_head, merge.lse_log2(), merge.inverse_sum());
    if (d == 0) writer.write_lse();
    writer.write(d, x);
  }
}

// A request tile whose states are merged.
struct MergeTile {
  MergeUnit unit;
  PlannedRequest request;
  int request_index, kv_head, row_begin;
};

// Merges the tile's states, nodes ascending, then its own splits ascending. A lane takes four
// components of kPairs rows at a time.
template <class S, class V, int kPairs, int kBatch, class ClassRows>
__device__ inline void merge_rows(const KernelParams& p, const PlanView& plan, ClassRows class_rows,
                                  const MergeTile& tile) {
  constexpr int kQuads = S::kHeadDimVo / 4;
  const PlannedRequest& request = tile.request;
  const int count = tile.unit.num_rows * kQuads;
  for (int begin = ptx::thread_index(); begin < count; begin += blockDim.x * kPairs) {
    int row[kPairs], d[kPairs];
    int64_t first[kPairs];
    RowMerge<V::kSoftmax> merge[kPairs];
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int i = min_i32(begin + j * static_cast<int>(blockDim.x), count - 1);
      row[j] = i / kQuads;
      d[j] = i % kQuads * 4;
    }
    for (int l = request.link_begin; l < request.link_end; ++l) {
      const PlannedNode& node = plan.nodes[plan.links[l].node];
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        const int node_row = plan.links[l].row_offset + tile.row_begin + row[j];
        const int node_tile = node_row / class_rows(node.tile_class);
        const NodeTile& record =
            plan.node_tiles[node.tile_base + tile.kv_head * node.num_tiles + node_tile];
        const int in_tile = node_row - node_tile * class_rows(node.tile_class);
        const int64_t one_first[1] = {record.partial_row + in_tile};
        const int one_d[1] = {d[j]};
        RowMerge<V::kSoftmax> one[1] = {merge[j]};
        add_states<1, kBatch, S::kHeadDimVo>(p, one_first, record.num_splits, record.num_rows,
                                             one_d, one);
        merge[j] = one[0];
      }
    }
#pragma unroll
    for (int j = 0; j < kPairs; ++j) first[j] = tile.unit.partial_row + row[j];
    add_states<kPairs, kBatch, S::kHeadDimVo>(p, first, tile.unit.num_splits, tile.unit.num_rows, d,
                                              merge);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      if (begin + j * static_cast<int>(blockDim.x) >= count) continue;
      const int packed = tile.row_begin + row[j], local = packed / S::kGroupSize;
      const VariantRow who = {request.kv_len - request.q_len + local,
                              request.qo_begin + local,
                              tile.kv_head * S::kGroupSize + packed % S::kGroupSize,
                              tile.request_index,
                              request.q_len,
                              request.kv_len};
      const RowWriter<S, V> writer(p, who, tile.kv_head, merge[j].lse_log2(),
                                   merge[j].inverse_sum());
      if (d[j] == 0) writer.write_lse();
      float x[4] = {merge[j].total.x, merge[j].total.y, merge[j].total.z, merge[j].total.w};
      writer.write(d[j], x);
    }
  }
}

template <class S, class V, class ClassRows>
__device__ inline void merge_unit(const KernelParams& p, const PlanView& plan, ClassRows class_rows,
                                  int unit_index, int request_index, int kv_head) {
  MergeTile tile = {plan.units[unit_index], plan.requests[request_index], request_index, kv_head,
                    0};
  const int tile_index = (unit_index - tile.request.unit_base) - kv_head * tile.request.num_tiles;
  tile.row_begin = tile_index * class_rows(tile.request.tile_class);
  // Few rows have many splits, many rows have few.
  if (tile.unit.num_rows <= 16) {
    merge_rows<S, V, 1, 8>(p, plan, class_rows, tile);
  } else {
    merge_rows<S, V, 4, 2>(p, plan, class_rows, tile);
  }
}

}  // namespace fi::sm80
