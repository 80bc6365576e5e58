// From a finished item to memory: the final output or a partial state.
#pragma once

#include "fi/attention/partial_state.h"
#include "fi/sm80/narrow_loop.h"

namespace fi::sm80 {

// kCount consecutive components of a row, in the type of `out`.
template <class S, int kCount>
__device__ inline void store_elements(typename S::Element* to, const float (&x)[kCount]) {
  using Ops = ElementOps<typename S::Element>;
  if constexpr (S::kAligned && kCount == 4) {
    *reinterpret_cast<uint2*>(to) = {Ops::pack(x[0], x[1]), Ops::pack(x[2], x[3])};
  } else if constexpr (S::kAligned) {
    *reinterpret_cast<uint32_t*>(to) = Ops::pack(x[0], x[1]);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = Ops::from_float(x[i]);
  }
}

// The same in fp32. Rows of an fp32 `out` are aligned where the kernel is.
template <bool kAligned, int kCount>
__device__ inline void store_floats(float* to, const float (&x)[kCount]) {
  if constexpr (!kAligned) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = x[i];
  } else if constexpr (kCount == 4) {
    *reinterpret_cast<float4*>(to) = {x[0], x[1], x[2], x[3]};
  } else {
    *reinterpret_cast<float2*>(to) = {x[0], x[1]};
  }
}

// A row's state without its components, as a warp leaves it: the largest logit, base 2, and the sum
// of powers relative to it.
struct alignas(8) RowPart {
  float top, sum;
};
// Floats between rows of states that meet; rows r and r + 1 of a lane group do not conflict.
template <class S>
constexpr int kMeetingPitch = S::kHeadDimVo + 4;

// What finishes a row, its sum gathered from those who hold parts of it.
struct RowSum {
  float inverse, lse_log2;
};

// Where an item's rows go: to a partial state, or to the output by way of sinks, v scale and the
// variant's output functions. A partial state takes the same way, its factors 1: code for either
// would double what a tile class compiles to.
template <class S, class V>
class RowTarget {
 public:
  // partial_row: of the first row; negative: the output.
  __device__ RowTarget(const KernelParams& p, int kv_head, int partial_row)
      : p_(p), kv_head_(kv_head), partial_row_(partial_row) {
    sinks_ = is_state() || p.is_partial ? nullptr : p.sinks;
    v_scale_ = is_state() ? 1.0f : scale_of(p.v_scale, kv_head);
    lse_ = is_state() ? p.partial_lse + partial_row : p.lse;
    lse_unit_ = is_state() ? 1.0f : kLn2;
  }

  __device__ bool is_float32() const { return is_state() || p_.out_is_float32; }

  // Writes the lse of row `row`, who is `who`, if asked; returns the factor of its components.
  __device__ float finish_row(int row, const VariantRow& who, RowSum sum, bool writes_lse) const {
    if constexpr (!V::kSoftmax) return sum.inverse * v_scale_;
    const FinalRow final = with_sink(sinks_, who.q_head, sum.lse_log2);
    const int64_t at = static_cast<int64_t>(who.token) * p_.num_qo_heads + who.q_head;
    if (writes_lse && lse_) lse_[is_state() ? row : at] = final.lse_log2 * lse_unit_;
    return sum.inverse * final.weight * v_scale_;
  }

  // Component d of a row, multiplied by its factor, through the output functions.
  __device__ float finish(const VariantRow& who, int d, float x) const {
    if constexpr (V::Outputs::kCount > 0) {
      if (!is_state() && !p_.is_partial) {
        return apply_all(typename V::Outputs{}, p_, who, kv_head_, d, x);
      }
    }
    return x;
  }

  // Where finished components go.
  __device__ float* float_row(int row, const VariantRow& who) const {
    if (!is_state()) return static_cast<float*>(p_.out) + at(who);
    return p_.partial_o + (static_cast<int64_t>(partial_row_) + row) * S::kHeadDimVo;
  }
  __device__ typename S::Element* element_row(const VariantRow& who) const {
    return static_cast<typename S::Element*>(p_.out) + at(who);
  }

 private:
  __device__ bool is_state() const { return partial_row_ >= 0; }
  __device__ int64_t at(const VariantRow& who) const {
    return who.token * p_.out_stride_token + who.q_head * p_.out_stride_head;
  }

  const KernelParams& p_;
  int kv_head_, partial_row_;
  const float* sinks_;
  float v_scale_;
  float* lse_;
  float lse_unit_;  // of a state base 2, of the output natural
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

// Calls visit(b, half, row) for every row that this lane holds a part of.
template <class T, class Visit>
__device__ inline void for_each_row(int first_row, Visit visit) {
  const int lane = ptx::thread_index() % 32;
#pragma unroll
  for (int b = 0; b < T::kRowBlocks; ++b) {
#pragma unroll
    for (int half = 0; half < 2; ++half) visit(b, half, first_row + b * 16 + half * 8 + lane / 4);
  }
}

// A row's sum over the four lanes that hold it.
__device__ inline float sum_of_lanes(float row_sum) {
  row_sum += __shfl_xor_sync(0xffffffff, row_sum, 1);
  return row_sum + __shfl_xor_sync(0xffffffff, row_sum, 2);
}

template <bool kSoftmax>
__device__ inline RowSum finish_sum(float row_max, float row_sum) {
  if constexpr (!kSoftmax) return {1.0f, 0.0f};
  if (row_sum == 0.0f) return {0.0f, neg_infinity()};
  return {reciprocal(row_sum), row_max + log2_approx(row_sum)};  // NaN stays NaN
}

// Whether finished rows can pass through the place of their queries, which are as wide and of the
// same type, and which all warps have left.
template <class S>
constexpr bool kStagesRows = S::kAligned && S::kHeadDimVo <= S::kHeadDimQk;

// Four components of a row, multiplied by its factor, to memory.
template <class S, class V>
__device__ inline void write_quad(const RowTarget<S, V>& target, int row, const VariantRow& who,
                                  int d, float factor, float4 o) {
  const float x[4] = {target.finish(who, d, o.x * factor), target.finish(who, d + 1, o.y * factor),
                      target.finish(who, d + 2, o.z * factor),
                      target.finish(who, d + 3, o.w * factor)};
  if (target.is_float32()) {
    store_floats<S::kAligned>(target.float_row(row, who) + d, x);
  } else {
    store_elements<S>(target.element_row(who) + d, x);
  }
}

// Four components of a partial state, and its lse by the lane that has the first.
template <class S>
__device__ inline void write_state(const KernelParams& p, int at, int d, RowSum sum, float4 o) {
  float* to = p.partial_o + static_cast<int64_t>(at) * S::kHeadDimVo + d;
  const float factor = sum.inverse;
  *reinterpret_cast<float4*>(to) = {o.x * factor, o.y * factor, o.z * factor, o.w * factor};
  if (d == 0) p.partial_lse[at] = sum.lse_log2;
}

// Rows of a warp from the place of their queries to `out`, 16 bytes a lane: a lane's own components
// are too short to fill sectors of memory.
template <class S, class T>
__device__ inline void copy_rows(const KernelParams& p, const VariantRow* rows, int first_row,
                                 int num_rows, const char* smem_q) {
  constexpr int kChunks = S::kHeadDimVo / 8;
  __syncwarp();
  const int lane = ptx::thread_index() % 32;
  for_each_part<T::kRowBlocks * 16, kChunks, 32, 4>(lane, [&](int r, int chunk) {
    const int row = first_row + r;
    auto* out = static_cast<typename S::Element*>(p.out) + rows[row].token * p.out_stride_token +
                rows[row].q_head * p.out_stride_head;
    const uint4 x = reinterpret_cast<const uint4*>(smem_q + row * kShared<S, T>.pitch_q)[chunk];
    if (row < num_rows) reinterpret_cast<uint4*>(out)[chunk] = x;
  });
}

// The factors of this lane's rows. Four lanes hold parts of the same two or four rows: each works
// out one of them, for all.
template <class S, class V, class T>
__device__ inline void finish_rows(const RowTarget<S, V>& target, const VariantRow* rows,
                                   int first_row, int num_rows, const WarpState<S, T>& state,
                                   float (&factors)[T::kRowBlocks][2]) {
  const int lane = ptx::thread_index() % 32, mine = lane % (T::kRowBlocks * 2);
  static_assert(T::kRowBlocks <= 2);
  float row_max = 0.0f, row_sum = 1.0f;
  int my_row = 0;
  for_each_row<T>(first_row, [&](int b, int half, int row) {
    const float max = state.row_max[b][half], sum = sum_of_lanes(state.row_sum[b][half]);
    const bool is_mine = mine == b * 2 + half;
    row_max = is_mine ? max : row_max;
    row_sum = is_mine ? sum : row_sum;
    my_row = is_mine ? row : my_row;
  });
  const bool writes_lse = lane % 4 == mine && my_row < num_rows;
  const RowSum sum = finish_sum<V::kSoftmax>(row_max, row_sum);
  const float factor = target.finish_row(my_row, rows[my_row], sum, writes_lse);
  for_each_row<T>(first_row, [&](int b, int half, int) {
    factors[b][half] = __shfl_sync(0xffffffff, factor, lane / 4 * 4 + b * 2 + half);
  });
}

// Warps that split rows only: each holds whole rows in registers. Rows past num_rows are worked out
// too, as those of row 0: without branches the rows of a lane overlap.
template <class S, class V, class T>
__device__ inline void write_rows(const KernelParams& p, const WorkItem& item,
                                  const VariantRow* rows, int first_row, char* smem_q,
                                  WarpState<S, T>& state) {
  const RowTarget<S, V> target(p, item.kv_head, item.partial_row);
  const int lane = ptx::thread_index() % 4, num_rows = item.num_rows;
  float factors[T::kRowBlocks][2];
  finish_rows<S, V, T>(target, rows, first_row, num_rows, state, factors);
  for_each_row<T>(first_row, [&](int b, int half, int row) {
#pragma unroll
    for (int n = 0; n < S::kHeadDimVo / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& x = state.o[b][n][half * 2 + c];
        const int d = S::kFp8 ? n / 2 * 16 + lane * 4 + c * 2 + n % 2 : n * 8 + lane * 2 + c;
        x = target.finish(rows[row], d, x * factors[b][half]);
      }
    }
  });
  if (target.is_float32()) {
    for_each_row<T>(first_row, [&](int b, int half, int row) {
      if (row >= num_rows) return;
      float* to = target.float_row(row, rows[row]);
      for_each_run<S>(state.o[b], half, [&](int d, const float (&x)[kRun<S>]) {
        store_floats<S::kAligned>(to + d, x);
      });
    });
    return;
  }
  for_each_row<T>(first_row, [&](int b, int half, int row) {
    if (!kStagesRows<S> && row >= num_rows) return;
    using Element = typename S::Element;
    Element* to = kStagesRows<S> ? reinterpret_cast<Element*>(smem_q + row * kShared<S, T>.pitch_q)
                                 : target.element_row(rows[row]);
    for_each_run<S>(state.o[b], half,
                    [&](int d, const float (&x)[kRun<S>]) { store_elements<S>(to + d, x); });
  });
  // Boxes of a class with fewer rows may land there next.
  if constexpr (kStagesRows<S> && kInBoxes<S, T>) ptx::publish_to_products();
  if constexpr (kStagesRows<S>) copy_rows<S, T>(p, rows, first_row, num_rows, smem_q);
}

// Lanes that share a row where each takes kQuads times four of its components: those that lie
// kLanes quads apart, so that neighbours read side by side.
template <class S, int kQuads>
constexpr int kLanesOfRow = (S::kHeadDimVo / 4 + kQuads - 1) / kQuads;

// A thread's part of the rows of a merge. How many quads a lane takes is not known to the compiler:
// what follows the sums is then compiled once.
struct RowShare {
  int quads, lanes, lane;  // lanes of a row
  int row, rows_at_once;   // the thread's first row; how many are taken at once
};

// The share of thread `thread` of as many.
template <class S, int kThreads, int kQuads>
__device__ inline RowShare share_rows(int thread) {
  constexpr int kLanes = kLanesOfRow<S, kQuads>, kRowsAtOnce = kThreads / kLanes;
  const bool is_spare = kThreads % kLanes != 0 && thread >= kRowsAtOnce * kLanes;
  return {kQuads, kLanes, thread % kLanes, is_spare ? 1 << 30 : thread / kLanes, kRowsAtOnce};
}

// Few rows: all lanes on one pass. More: a row's weights once for several components.
template <class S, int kThreads>
__device__ constexpr bool are_few(int num_rows) {
  return num_rows * (S::kHeadDimVo / 4) <= kThreads;
}

// Calls visit(d, x) for every four components of a row that this lane holds.
template <class S, int kMaxQuads, class Visit>
__device__ inline void for_each_quad(const float4 (&o)[kMaxQuads], const RowShare& share,
                                     Visit visit) {
#pragma unroll
  for (int q = 0; q < kMaxQuads; ++q) {
    if ((q == 1 || q == 2 || q == 4) && q == share.quads) break;
    const int d = (share.lane + q * share.lanes) * 4;
    if (S::kHeadDimVo / 4 % kMaxQuads != 0 && d >= S::kHeadDimVo) break;
    const float x[4] = {o[q].x, o[q].y, o[q].z, o[q].w};
    visit(d, x);
  }
}

// A lane's part of a merged row.
template <class S, class V, int kMaxQuads>
__device__ inline void write_merged(const RowTarget<S, V>& target, int row, const VariantRow& who,
                                    const RowShare& share,
                                    RowMerge<V::kSoftmax, kMaxQuads>& merge) {
  const RowSum sum = {merge.inverse_sum(), merge.lse_log2()};
  const float factor = target.finish_row(row, who, sum, share.lane == 0);
#pragma unroll
  for (int q = 0; q < kMaxQuads; ++q) {
    float4& o = merge.total[q];
    const int d = (share.lane + q * share.lanes) * 4;
    if (V::Outputs::kCount > 0 && d >= S::kHeadDimVo) break;  // a function may read at d
    o = {target.finish(who, d, __fmul_rn(o.x, factor)),
         target.finish(who, d + 1, __fmul_rn(o.y, factor)),
         target.finish(who, d + 2, __fmul_rn(o.z, factor)),
         target.finish(who, d + 3, __fmul_rn(o.w, factor))};
  }
  if (target.is_float32()) {
    float* to = target.float_row(row, who);
    for_each_quad<S>(merge.total, share,
                     [&](int d, const float (&x)[4]) { store_floats<S::kAligned>(to + d, x); });
  } else {
    auto* to = target.element_row(who);
    for_each_quad<S>(merge.total, share,
                     [&](int d, const float (&x)[4]) { store_elements<S>(to + d, x); });
  }
}

// Adds the states of a row that warps left in shared memory, this lane's four components of them.
// A state is its components, then the largest logit and the sum of powers relative to it.
template <class S, class T, bool kSoftmax>
__device__ inline RowSum add_warps(const float* o, int d, float4& total) {
  constexpr int kDistance = T::kRows * kMeetingPitch<S>;
  RowPart parts[T::kWarpsN];
  float4 states[T::kWarpsN];
  float top = neg_infinity();
#pragma unroll
  for (int w = 0; w < T::kWarpsN; ++w) {
    states[w] = *reinterpret_cast<const float4*>(o + w * kDistance + d);
    if constexpr (kSoftmax) {
      parts[w] = *reinterpret_cast<const RowPart*>(o + w * kDistance + S::kHeadDimVo);
      top = fmaxf(top, parts[w].top);
    }
  }
  const float base = top == neg_infinity() ? 0.0f : top;  // nothing seen: weights of 0
  float sum = 0.0f;
  total = {};
#pragma unroll
  for (int w = 0; w < T::kWarpsN; ++w) {
    const float weight = kSoftmax ? exp2_approx(parts[w].top - base) : 1.0f;
    if constexpr (kSoftmax) sum = __fmaf_rn(weight, parts[w].sum, sum);
    const float4& o = states[w];
    total = {__fmaf_rn(weight, o.x, total.x), __fmaf_rn(weight, o.y, total.y),
             __fmaf_rn(weight, o.z, total.z), __fmaf_rn(weight, o.w, total.w)};
  }
  return finish_sum<kSoftmax>(top, sum);
}

// Leaves a warp's state of num_rows rows where others find it.
template <class S, class V, class T>
__device__ inline void leave_state(const WarpState<S, T, false>& state, int first_row, int num_rows,
                                   float* own) {
  for_each_row<T>(first_row, [&](int b, int half, int row) {
    const float sum = sum_of_lanes(state.row_sum[b][half]);
    if (row >= num_rows) return;
    float* to = own + row * kMeetingPitch<S>;
    if (V::kSoftmax && ptx::thread_index() % 4 == 0) {
      *reinterpret_cast<RowPart*>(to + S::kHeadDimVo) = {state.row_max[b][half], sum};
    }
    for_each_run<S>(state.o[b], half,
                    [&](int d, const float (&x)[kRun<S>]) { store_floats<true>(to + d, x); });
  });
}
template <class S, class V, class T>
__device__ inline void leave_state(const WarpState<S, T, true>& state, int, int num_rows,
                                   float* own) {
  const int lane = ptx::thread_index() % 32;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const float sum = join_lanes(state.row_sum[c], [](float x, float y) { return x + y; });
    const int row = lane % 4 * 2 + c;
    if (row >= num_rows) continue;
    float* to = own + row * kMeetingPitch<S>;
    if (V::kSoftmax && lane < 4) {
      *reinterpret_cast<RowPart*>(to + S::kHeadDimVo) = {state.row_max[c], sum};
    }
#pragma unroll
    for (int m = 0; m < S::kHeadDimVo / 16; ++m) {
      to[m * 16 + lane / 4] = state.o[m][c];
      to[m * 16 + lane / 4 + 8] = state.o[m][2 + c];
    }
  }
}

// Warps that split the KV tokens: their states of the same rows meet in shared memory.
template <class S, class V, class T>
__device__ inline void merge_warps(const KernelParams& p, const WorkItem& item,
                                   const VariantRow* rows, int first_row, bool is_idle, char* smem,
                                   const WarpState<S, T>& state) {
  constexpr int kPitch = kMeetingPitch<S>, kQuads = S::kHeadDimVo / 4;
  float* o = reinterpret_cast<float*>(smem);  // [kWarpsN][kRows][kPitch]
  const int thread = static_cast<int>(ptx::thread_index());
  const int num_rows = is_idle ? 0 : item.num_rows;
  float* own = o + thread / 32 % T::kWarpsN * T::kRows * kPitch;
  leave_state<S, V, T>(state, first_row, num_rows, own);
  // Boxes may land there next. Behind the stores to memory, which it would wait for, this is slow.
  if constexpr (kInBoxes<S, T>) ptx::publish_to_products();
  __syncthreads();
#pragma unroll 1
  for (int at = thread; at < item.num_rows * kQuads; at += T::kThreads) {
    const int row = at / kQuads, d = at % kQuads * 4;
    float4 total;
    const RowSum sum = add_warps<S, T, V::kSoftmax>(o + row * kPitch, d, total);
    if (item.partial_row >= 0) {
      write_state<S>(p, item.partial_row + row, d, sum, total);
    } else {
      const RowTarget<S, V> target(p, item.kv_head, -1);
      const float factor = target.finish_row(row, rows[row], sum, d == 0);
      write_quad<S, V>(target, row, rows[row], d, factor, total);
    }
  }
}

}  // namespace fi::sm80
