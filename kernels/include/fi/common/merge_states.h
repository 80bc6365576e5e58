// merge_states: partial states of the same rows over disjoint KV positions -> one state. The
// algebra of FlashInfer (Ye et al., 2025, section 2.2); kernels/cpu/merge.h is the same on the CPU.
#pragma once

#include "fi/common/merge_params.h"
#include "fi/core/math.h"

namespace fi {

// States whose loads are in flight together.
constexpr int kMergeBatch = 4;

template <int kWidth>
struct MergeChunk {
  float at[kWidth];
};

template <int kWidth>
__device__ inline MergeChunk<kWidth> load_floats(const float* from) {
  if constexpr (kWidth == 4) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    return {four.x, four.y, four.z, four.w};
  } else {
    return {*from};
  }
}

template <int kWidth>
__device__ inline void store_floats(float* to, const MergeChunk<kWidth>& chunk) {
  if constexpr (kWidth == 4) {
    *reinterpret_cast<float4*>(to) = {chunk.at[0], chunk.at[1], chunk.at[2], chunk.at[3]};
  } else {
    *to = chunk.at[0];
  }
}

// The lse of a batch of states, -inf past the last one.
__device__ inline void load_lse(const MergeKernelParams& p, int64_t row, int64_t begin,
                                float (&lse)[kMergeBatch]) {
#pragma unroll
  for (int i = 0; i < kMergeBatch; ++i) {
    lse[i] = begin + i < p.num_states ? p.lse[(begin + i) * p.rows + row] : neg_infinity();
  }
}

// The largest lse of a row. NaN is passed on, as the CPU does.
__device__ inline float largest_lse(const MergeKernelParams& p, int64_t row) {
  float top = neg_infinity();
  for (int64_t begin = 0; begin < p.num_states; begin += kMergeBatch) {
    float lse[kMergeBatch];
    load_lse(p, row, begin, lse);
#pragma unroll
    for (int i = 0; i < kMergeBatch; ++i) {
      if (begin + i < p.num_states && !(lse[i] <= top)) top = lse[i];
    }
  }
  return top;
}

template <int kDim, int kWidth>
__device__ inline void load_states(const MergeKernelParams& p, int64_t row, int first,
                                   int64_t begin, MergeChunk<kWidth> (&o)[kMergeBatch]) {
#pragma unroll
  for (int i = 0; i < kMergeBatch; ++i) {
    if (begin + i >= p.num_states) continue;
    o[i] = load_floats<kWidth>(p.o + ((begin + i) * p.rows + row) * kDim + first);
  }
}

// m = max lse_i;  w_i = e^(lse_i - m);  o = sum w_i o_i / sum w_i;  lse = m + log sum w_i, by
// ascending i: equal bits on every run. States of weight 0 do not count, whatever they hold.
// Without softmax: sums.
template <int kDim, bool kAligned, bool kSoftmax>
__device__ void merge_states(const MergeKernelParams& p) {
  constexpr int kWidth = merge_width(kAligned);
  constexpr int kLanes = kDim / kWidth;
  static_assert(kDim % kWidth == 0, "aligned rows are whole vectors");
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x;
  const int64_t row = index / kLanes;
  if (row >= p.rows) return;
  const int first = static_cast<int>(index - row * kLanes) * kWidth;
  // On their way while the largest lse is found: few states would wait for memory twice.
  MergeChunk<kWidth> o[kMergeBatch];
  load_states<kDim, kWidth>(p, row, first, 0, o);
  const float top = kSoftmax ? largest_lse(p, row) : 0.0f;
  const bool is_empty = top == neg_infinity();
  MergeChunk<kWidth> sum{};
  float total = 0.0f;
  for (int64_t begin = 0; begin < p.num_states && !is_empty; begin += kMergeBatch) {
    if (begin > 0) load_states<kDim, kWidth>(p, row, first, begin, o);
    float lse[kMergeBatch];
    if constexpr (kSoftmax) load_lse(p, row, begin, lse);
#pragma unroll
    for (int i = 0; i < kMergeBatch; ++i) {
      const float weight = kSoftmax ? exp2_approx((lse[i] - top) * kLog2E) : 1.0f;
      if (weight == 0.0f || begin + i >= p.num_states) continue;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) sum.at[e] += weight * o[i].at[e];
      total += weight;
    }
  }
  if (kSoftmax && !is_empty) {
    const float inverse = 1.0f / total;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) sum.at[e] *= inverse;
  }
  store_floats(p.out_o + row * kDim + first, sum);
  if (first > 0) return;
  p.out_lse[row] = !kSoftmax || is_empty ? top : top + log2_approx(total) * kLn2;
}

}  // namespace fi
