// merge_states: partial states of the same rows over disjoint KV positions -> one state. The
// algebra of FlashInfer (Ye et al., 2025, section 2.2); kernels/cpu/merge.h is the same on the CPU.
#pragma once

#include "fi/common/merge_params.h"
#include "fi/core/math.h"

namespace fi {

// States whose loads are in flight together.
constexpr int kMergeBatch = 4;

// What a thread merges of a row: kParts vectors of kWidth elements, one from every kLanes vectors.
template <int kDim, bool kAligned>
struct MergeShape {
  static constexpr int kWidth = merge_width(kAligned);
  static constexpr int kParts = merge_parts(kDim, kAligned);
  static constexpr int kLanes = merge_lanes(kDim, kAligned);
  static constexpr int kCount = kWidth * kParts;
  static constexpr int kStep = kWidth * kLanes;  // elements between the parts
  static_assert(kLanes * kCount == kDim, "aligned rows are whole vectors");
};

template <class Shape>
struct MergePart {
  float at[Shape::kCount];
};

template <class Shape>
__device__ inline MergePart<Shape> load_part(const float* from) {
  MergePart<Shape> part;
#pragma unroll
  for (int i = 0; i < Shape::kParts; ++i) {
    if constexpr (Shape::kWidth == 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + i * Shape::kStep);
      part.at[4 * i] = four.x;
      part.at[4 * i + 1] = four.y;
      part.at[4 * i + 2] = four.z;
      part.at[4 * i + 3] = four.w;
    } else {
      part.at[i] = from[i * Shape::kStep];
    }
  }
  return part;
}

template <class Shape>
__device__ inline void store_part(float* to, const MergePart<Shape>& part) {
#pragma unroll
  for (int i = 0; i < Shape::kParts; ++i) {
    if constexpr (Shape::kWidth == 4) {
      *reinterpret_cast<float4*>(to + i * Shape::kStep) = {part.at[4 * i], part.at[4 * i + 1],
                                                           part.at[4 * i + 2], part.at[4 * i + 3]};
    } else {
      to[i * Shape::kStep] = part.at[i];
    }
  }
}

// Of a batch of states what a thread merges.
template <class Shape>
struct MergeBatch {
  MergePart<Shape> o[kMergeBatch];
  float lse[kMergeBatch];
};

// The states from `begin` on; lse is -inf past the last one.
__device__ inline void load_lse(const MergeKernelParams& p, int64_t row, int begin,
                                float (&lse)[kMergeBatch]) {
  const float* from = p.lse + begin * p.rows + row;
#pragma unroll
  for (int i = 0; i < kMergeBatch; ++i) {
    lse[i] = begin + i < p.num_states ? *from : neg_infinity();
    from += p.rows;
  }
}

template <int kDim, class Shape>
__device__ inline void load_states(const MergeKernelParams& p, int64_t row, int first, int begin,
                                   MergePart<Shape> (&o)[kMergeBatch]) {
  const float* from = p.o + (begin * p.rows + row) * kDim + first;
#pragma unroll
  for (int i = 0; i < kMergeBatch; ++i) {
    if (begin + i < p.num_states) o[i] = load_part<Shape>(from);
    from += p.rows * kDim;
  }
}

// The larger of `top` and the lse of a batch. NaN is passed on, as the CPU does.
__device__ inline float largest_lse(const MergeKernelParams& p, int begin, float top,
                                    const float (&lse)[kMergeBatch]) {
#pragma unroll
  for (int i = 0; i < kMergeBatch; ++i) {
    if (begin + i < p.num_states && !(lse[i] <= top)) top = lse[i];
  }
  return top;
}

template <bool kSoftmax, class Shape>
__device__ inline void add_states(const MergeKernelParams& p, int begin, float top,
                                  const MergeBatch<Shape>& batch, MergePart<Shape>& sum,
                                  float& total) {
#pragma unroll
  for (int i = 0; i < kMergeBatch; ++i) {
    const float weight = kSoftmax ? exp2_approx((batch.lse[i] - top) * kLog2E) : 1.0f;
    if (weight == 0.0f || begin + i >= p.num_states) continue;
#pragma unroll
    for (int e = 0; e < Shape::kCount; ++e) sum.at[e] += weight * batch.o[i].at[e];
    total += weight;
  }
}

// m = max lse_i;  w_i = e^(lse_i - m);  o = sum w_i o_i / sum w_i;  lse = m + log sum w_i, by
// ascending i: equal bits on every run. States of weight 0 do not count, whatever they hold.
// Without softmax: sums.
template <int kDim, bool kAligned, bool kSoftmax>
__device__ void merge_states(const MergeKernelParams& p) {
  using Shape = MergeShape<kDim, kAligned>;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x;
  const int64_t row = index / Shape::kLanes;
  if (row >= p.rows) return;
  const int first = static_cast<int>(index - row * Shape::kLanes) * Shape::kWidth;
  // On its way while the largest lse is found: few states would wait for memory twice.
  MergeBatch<Shape> batch;
  load_states<kDim>(p, row, first, 0, batch.o);
  float top = 0.0f;
  if constexpr (kSoftmax) {
    load_lse(p, row, 0, batch.lse);
    top = largest_lse(p, 0, neg_infinity(), batch.lse);
#pragma unroll 1
    for (int begin = kMergeBatch; begin < p.num_states; begin += kMergeBatch) {
      float lse[kMergeBatch];
      load_lse(p, row, begin, lse);
      top = largest_lse(p, begin, top, lse);
    }
  }
  const bool is_empty = top == neg_infinity();
  MergePart<Shape> sum{};
  float total = 0.0f;
  if (!is_empty) {
    add_states<kSoftmax>(p, 0, top, batch, sum, total);
#pragma unroll 1
    for (int begin = kMergeBatch; begin < p.num_states; begin += kMergeBatch) {
      load_states<kDim>(p, row, first, begin, batch.o);
      if constexpr (kSoftmax) load_lse(p, row, begin, batch.lse);
      add_states<kSoftmax>(p, begin, top, batch, sum, total);
    }
  }
  if (kSoftmax && !is_empty) {
    const float inverse = 1.0f / total;
#pragma unroll
    for (int e = 0; e < Shape::kCount; ++e) sum.at[e] *= inverse;
  }
  store_part<Shape>(p.out_o + row * kDim + first, sum);
  if (first > 0) return;
  p.out_lse[row] = !kSoftmax || is_empty ? top : top + log2_approx(total) * kLn2;
}

}  // namespace fi
