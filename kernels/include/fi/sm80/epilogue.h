// From a finished item to memory: the final output or a partial state.
#pragma once

#include "fi/attention/partial_state.h"
#include "fi/sm80/main_loop.h"

namespace fi::sm80 {

// kCount consecutive components of a row, in the type of `out`.
template <class S, int kCount>
__device__ inline void store_elements(typename S::Element* to, const float (&x)[kCount]) {
  using Ops = ElementOps<typename S::Element>;
  if constexpr (S::kAligned) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      reinterpret_cast<uint32_t*>(to)[i / 2] = Ops::pack(x[i], x[i + 1]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = Ops::from_float(x[i]);
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

  // Components d, d + 1, ... of the row's o become those of the output.
  template <int kCount>
  __device__ void finish(int d, float (&x)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      x[i] *= factor_;
      if constexpr (V::Outputs::kCount > 0) {
        if (!p_.is_partial) {
          x[i] = apply_all(typename V::Outputs{}, p_, row_, kv_head_, d + i, x[i]);
        }
      }
    }
  }

  // Finished components to memory.
  template <int kCount>
  __device__ void store(int d, const float (&x)[kCount]) const {
    if (p_.out_is_float32) {
      float* out = static_cast<float*>(p_.out) + at_ + d;
#pragma unroll
      for (int i = 0; i < kCount; ++i) out[i] = x[i];
    } else {
      store_elements<S>(static_cast<typename S::Element*>(p_.out) + at_ + d, x);
    }
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

// Whether finished rows can pass through the place of their queries, which are as wide and of the
// same type, and which their warp alone has read.
template <class S>
constexpr bool kStagesRows = S::kAligned && S::kHeadDimVo <= S::kHeadDimQk;

// Rows of a warp from the place of their queries to `out`, 16 bytes a lane: a lane's own components
// are too short to fill sectors of memory.
template <class S, class T>
__device__ inline void copy_rows(const KernelParams& p, const VariantRow* rows, int first_row,
                                 int num_rows, const char* smem_q) {
  constexpr int kChunks = S::kHeadDimVo / 8;
  constexpr int kCount = T::kRowBlocks * 16 * kChunks;
  __syncwarp();
#pragma unroll 8
  for (int i = ptx::thread_index() % 32; i < kCount; i += 32) {
    const int row = first_row + i / kChunks, chunk = i % kChunks;
    auto* out = static_cast<typename S::Element*>(p.out) + rows[row].token * p.out_stride_token +
                rows[row].q_head * p.out_stride_head;
    const uint4 x = reinterpret_cast<const uint4*>(smem_q + row * kShared<S, T>.pitch_q)[chunk];
    if (row < num_rows) reinterpret_cast<uint4*>(out)[chunk] = x;
  }
}

// A partial state: o to `o`, whose rows are `pitch` floats apart, lse_log2 to `lse`.
template <class S, class V, class T>
__device__ inline void write_state(int first_row, int num_rows, const WarpState<S, T>& state,
                                   float* o, int pitch, float* lse) {
  const int lane = ptx::thread_index() % 32;
#pragma unroll
  for (int b = 0; b < T::kRowBlocks; ++b) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + b * 16 + half * 8 + lane / 4;
      const RowSum done = finish_row<V>(state.row_max[b][half], state.row_sum[b][half]);
      if (row >= num_rows) continue;
      if (V::kSoftmax && lane % 4 == 0) lse[row] = done.lse_log2;
      for_each_run<S>(state.o[b], half, [&](int d, float (&x)[kRun<S>]) {
        for (float& value : x) value *= done.inverse;
        store_floats(o + row * pitch + d, x);
      });
    }
  }
}

// Final output of whole rows; kStaged: through the place of their queries. Rows past num_rows are
// worked out too, as those of row 0: without branches the rows of a lane overlap.
template <bool kStaged, class S, class V, class T>
__device__ inline void write_output(const KernelParams& p, const WorkItem& item,
                                    const VariantRow* rows, int first_row, char* smem_q,
                                    const WarpState<S, T>& state) {
  const int lane = ptx::thread_index() % 32;
#pragma unroll
  for (int b = 0; b < T::kRowBlocks; ++b) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + b * 16 + half * 8 + lane / 4;
      const RowSum done = finish_row<V>(state.row_max[b][half], state.row_sum[b][half]);
      const RowWriter<S, V> writer(p, rows[row], item.kv_head, done.lse_log2, done.inverse);
      const bool exists = row < item.num_rows;
      if (exists && lane % 4 == 0) writer.write_lse();
      auto* to = reinterpret_cast<typename S::Element*>(smem_q + row * kShared<S, T>.pitch_q);
      for_each_run<S>(state.o[b], half, [&](int d, float (&x)[kRun<S>]) {
        writer.finish(d, x);
        if constexpr (kStaged) {
          store_elements<S>(to + d, x);
        } else {
          if (exists) writer.store(d, x);
        }
      });
    }
  }
  if constexpr (kStaged) copy_rows<S, T>(p, rows, first_row, item.num_rows, smem_q);
}

// Warps that split rows only: each holds whole rows in registers.
template <class S, class V, class T>
__device__ inline void write_rows(const KernelParams& p, const WorkItem& item,
                                  const VariantRow* rows, int first_row, char* smem_q,
                                  const WarpState<S, T>& state) {
  if (item.partial_row >= 0) {
    const int64_t at = item.partial_row;
    write_state<S, V, T>(first_row, item.num_rows, state, p.partial_o + at * S::kHeadDimVo,
                         S::kHeadDimVo, p.partial_lse + at);
  } else if (kStagesRows<S> && !p.out_is_float32) {
    write_output<kStagesRows<S>, S, V, T>(p, item, rows, first_row, smem_q, state);
  } else {
    write_output<false, S, V, T>(p, item, rows, first_row, smem_q, state);
  }
}

// Lanes that share a row where each takes kQuads times four of its components: those that lie
// kLanes quads apart, so that neighbours read side by side.
template <class S, int kQuads>
constexpr int kLanesOfRow = (S::kHeadDimVo / 4 + kQuads - 1) / kQuads;

// The final output of a lane's part of a row.
template <class S, class V, int kQuads>
__device__ inline void write_merged(const KernelParams& p, const VariantRow& row, int kv_head,
                                    int lane, const RowMerge<V::kSoftmax, kQuads>& merge) {
  const RowWriter<S, V> writer(p, row, kv_head, merge.lse_log2(), merge.inverse_sum());
  if (lane == 0) writer.write_lse();
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const int d = (lane + q * kLanesOfRow<S, kQuads>)*4;
    if (S::kHeadDimVo / 4 % kQuads != 0 && d >= S::kHeadDimVo) continue;
    float x[4] = {merge.total[q].x, merge.total[q].y, merge.total[q].z, merge.total[q].w};
    writer.finish(d, x);
    writer.store(d, x);
  }
}

// The states of warps that split the KV tokens, rows of which lie kPitch floats apart in shared
// memory, [kWarpsN][kRows]: to one state, or the output.
template <class S, class V, class T, int kQuads, int kPitch>
__device__ inline void merge_shared(const KernelParams& p, const WorkItem& item,
                                    const VariantRow* rows, const float* o, const float* lses) {
  constexpr int kLanes = kLanesOfRow<S, kQuads>;
  const int lane = ptx::thread_index() % kLanes;
  for (int row = ptx::thread_index() / kLanes; row < item.num_rows; row += T::kThreads / kLanes) {
    if (T::kThreads % kLanes != 0 && ptx::thread_index() >= T::kThreads / kLanes * kLanes) return;
    RowMerge<V::kSoftmax, kQuads> merge;
    float lse[T::kWarpsN];
    float4 states[T::kWarpsN][kQuads];
#pragma unroll
    for (int w = 0; w < T::kWarpsN; ++w) {
      lse[w] = lses[w * T::kRows + row];
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        const int quad = min_i32(lane + q * kLanes, S::kHeadDimVo / 4 - 1);
        states[w][q] =
            *reinterpret_cast<const float4*>(o + (w * T::kRows + row) * kPitch + quad * 4);
      }
    }
    merge.add(lse, states, T::kWarpsN);
    if (item.partial_row < 0) {
      write_merged<S, V, kQuads>(p, rows[row], item.kv_head, lane, merge);
      continue;
    }
    const int64_t at = item.partial_row + row;
    if (V::kSoftmax && lane == 0) p.partial_lse[at] = merge.lse_log2();
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const int d = (lane + q * kLanes) * 4;
      if (S::kHeadDimVo / 4 % kQuads != 0 && d >= S::kHeadDimVo) continue;
      const float inverse = merge.inverse_sum();
      const float x[4] = {merge.total[q].x * inverse, merge.total[q].y * inverse,
                          merge.total[q].z * inverse, merge.total[q].w * inverse};
      store_floats(p.partial_o + at * S::kHeadDimVo + d, x);
    }
  }
}

// Warps that split the KV tokens: their states of the same rows meet in shared memory.
template <class S, class V, class T>
__device__ inline void merge_warps(const KernelParams& p, const WorkItem& item,
                                   const VariantRow* rows, int first_row, bool is_idle, char* smem,
                                   const WarpState<S, T>& state) {
  // floats; rows r and r + 1 of a lane group: no conflict
  constexpr int kPitch = S::kHeadDimVo + 4;
  float* o = reinterpret_cast<float*>(smem);  // [kWarpsN][kRows][kPitch]
  float* lses = o + T::kWarpsN * T::kRows * kPitch;
  const int place = static_cast<int>(ptx::thread_index() / 32 % T::kWarpsN) * T::kRows;
  write_state<S, V, T>(first_row, is_idle ? 0 : item.num_rows, state, o + place * kPitch, kPitch,
                       lses + place);
  __syncthreads();
  // Few rows: all lanes on one pass. More: a row's weights once for several components.
  if (item.num_rows * (S::kHeadDimVo / 4) <= T::kThreads) {
    merge_shared<S, V, T, 1, kPitch>(p, item, rows, o, lses);
  } else {
    merge_shared<S, V, T, 4, kPitch>(p, item, rows, o, lses);
  }
}

}  // namespace fi::sm80
