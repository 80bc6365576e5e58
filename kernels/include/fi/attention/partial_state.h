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

// Applies the sink once: it takes probability but contributes no value.
__device__ inline FinalRow with_sink(const KernelParams& p, int q_head, float lse_log2) {
  if (!p.sinks || p.is_partial) return {1.0f, lse_log2};
  const float sink_log2 = p.sinks[q_head] * kLog2E;
  const float top = fmaxf(lse_log2, sink_log2);
  if (top == neg_infinity()) return {0.0f, top};
  const float own = exp2_approx(lse_log2 - top);
  const float sum = own + exp2_approx(sink_log2 - top);
  return {own * reciprocal(sum), top + log2_approx(sum)};
}

__device__ inline void write_lse(const KernelParams& p, int token, int q_head, float lse_log2) {
  if (p.lse) p.lse[static_cast<int64_t>(token) * p.num_qo_heads + q_head] = lse_log2 * kLn2;
}

// Adds an arrival to a merge unit; true for the arrival that completes it, which resets the counter
// for the next launch. Call from one thread after a CTA barrier; the CTA barrier that follows makes
// every partial state visible to the whole CTA (release and acquire at gpu scope).
__device__ inline bool arrive(int32_t* counter, int32_t expected) {
  int32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(counter)
               : "memory");
  if (before + 1 != expected) return false;
  *counter = 0;
  return true;
}

// Running merge of one row's states, four components by one lane: fixed order, so equal bits on
// every run.
template <bool kSoftmax>
struct RowMerge {
  float top = neg_infinity();
  float sum = 0.0f;
  float4 total = {0.0f, 0.0f, 0.0f, 0.0f};

  __device__ void add(float lse_log2, float4 o) {
    float keep = 1.0f, take = 1.0f;
    if constexpr (kSoftmax) {
      const float new_top = max_nan(top, lse_log2);  // a NaN state shows in the result
      if (new_top == neg_infinity()) return;
      keep = exp2_approx(top - new_top);
      take = exp2_approx(lse_log2 - new_top);
      sum = sum * keep + take;
      top = new_top;
    }
    total = {total.x * keep + o.x * take, total.y * keep + o.y * take, total.z * keep + o.z * take,
             total.w * keep + o.w * take};
  }

  __device__ float inverse_sum() const {
    if constexpr (!kSoftmax) return 1.0f;
    return sum == 0.0f ? 0.0f : reciprocal(sum);
  }
  __device__ float lse_log2() const {
    return sum == 0.0f ? neg_infinity() : top + log2_approx(sum);
  }
};

// Adds `count` states to each of kPairs rows, in order: state i of pair j lies at row
// first[j] + i * stride of the partial buffers. kPairs * kBatch are fetched at a time: one after
// the other would cost an L2 latency each.
template <int kPairs, int kBatch, int kHeadDimVo, bool kSoftmax>
__device__ inline void add_states(const KernelParams& p, const int64_t (&first)[kPairs], int count,
                                  int stride, const int (&d)[kPairs],
                                  RowMerge<kSoftmax> (&merge)[kPairs]) {
  for (int begin = 0; begin < count; begin += kBatch) {
    float lse[kBatch][kPairs];
    float4 o[kBatch][kPairs];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        // Past the last one: the last one again, and not used.
        const int64_t at = first[j] + static_cast<int64_t>(min_i32(begin + i, count - 1)) * stride;
        lse[i][j] = kSoftmax ? __ldcg(p.partial_lse + at) : 0.0f;
        o[i][j] = __ldcg(reinterpret_cast<const float4*>(p.partial_o + at * kHeadDimVo + d[j]));
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        if (begin + i < count) merge[j].add(lse[i][j], o[i][j]);
      }
    }
  }
}

}  // namespace fi
