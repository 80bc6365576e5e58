// Partial states (o, lse): publishing them and merging them. The algebra of FlashInfer (Ye et al.,
// 2025, section 2.2); here lse is base 2 and o is normalised. Without softmax states add up.
#pragma once

#include "fi/attention/kernel_params.h"
#include "fi/core/math.h"

namespace fi {

// Weight that turns a row's normalised o into the final output, and the row's final lse.
struct FinalRow {
  float weight;
  float lse_log2;
};

// Applies the sink once: it takes probability but contributes no value. sinks null: there is none.
__device__ inline FinalRow with_sink(const float* sinks, int q_head, float lse_log2) {
  if (!sinks) return {1.0f, lse_log2};
  const float sink_log2 = __fmul_rn(sinks[q_head], kLog2E);  // not fused below: bits are equal
  const float top = fmaxf(lse_log2, sink_log2);
  if (top == neg_infinity()) return {0.0f, top};
  const float own = exp2_approx(lse_log2 - top);
  const float sum = own + exp2_approx(sink_log2 - top);
  return {own * reciprocal(sum), top + log2_approx(sum)};
}

// Running merge of one row's states, of at most kMaxQuads times four components by one lane. States
// come in groups: a group is rescaled once, and its exponentials do not wait for each other. Order
// and groups are fixed and no operation is left for the compiler to fuse, so bits are equal on
// every run.
template <bool kSoftmax, int kMaxQuads>
struct RowMerge {
  float top = neg_infinity();
  float sum = 0.0f;
  float4 total[kMaxQuads] = {};

  // A group of states. One that does not exist has an lse of -inf, and zeros.
  template <int kGroup, int kQuads>
  __device__ void add(const float* lse_log2, const float4 (*o)[kQuads]) {
    float weights[kGroup];
    rescale<kQuads>(weigh(lse_log2, weights));
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float w = weights[i];
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        float4& t = total[q];
        t = {__fmaf_rn(w, o[i][q].x, t.x), __fmaf_rn(w, o[i][q].y, t.y),
             __fmaf_rn(w, o[i][q].z, t.z), __fmaf_rn(w, o[i][q].w, t.w)};
      }
    }
  }

  // The weights of a group; returns what is left of the weight of all states before.
  template <int kGroup>
  __device__ float weigh(const float* lse_log2, float (&weights)[kGroup]) {
    float new_top = top;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      weights[i] = 1.0f;
      new_top = max_nan(new_top, lse_log2[i]);  // a NaN state shows in the result
    }
    if constexpr (!kSoftmax) return 1.0f;
    const float base = new_top == neg_infinity() ? 0.0f : new_top;  // nothing seen: weights of 0
    const float keep = exp2_approx(top - base);
    sum = __fmul_rn(sum, keep);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      weights[i] = exp2_approx(lse_log2[i] - base);
      sum = __fadd_rn(sum, weights[i]);
    }
    top = new_top;
    return keep;
  }

  template <int kQuads>
  __device__ void rescale(float keep) {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      float4& t = total[q];
      t = {__fmul_rn(t.x, keep), __fmul_rn(t.y, keep), __fmul_rn(t.z, keep), __fmul_rn(t.w, keep)};
    }
  }

  __device__ float inverse_sum() const {
    if constexpr (!kSoftmax) return 1.0f;
    return sum == 0.0f ? 0.0f : reciprocal(sum);
  }
  __device__ float lse_log2() const {
    return sum == 0.0f ? neg_infinity() : top + log2_approx(sum);
  }
};

}  // namespace fi
