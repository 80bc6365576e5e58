// Partial states (o, lse): publishing them and merging them. The algebra of FlashInfer (Ye et al.,
// 2025, section 2.2); here lse is base 2 and o is normalised.
#pragma once

#include "fi/attention/kernel_params.h"
#include "fi/core/elements.h"
#include "fi/core/math.h"

namespace fi {

// Weight that turns a row's normalised o into the final output, and the row's final lse.
struct FinalRow {
  float weight;
  float lse_log2;
};

// Applies the sink once: it takes probability but contributes no value.
__device__ inline FinalRow with_sink(const KernelParams& p, int q_head, float lse_log2) {
  if (!p.sinks) return {1.0f, lse_log2};
  const float sink_log2 = p.sinks[q_head] * kLog2E;
  const float top = fmaxf(lse_log2, sink_log2);
  if (top == neg_infinity()) return {0.0f, top};
  const float own = exp2_approx(lse_log2 - top);
  const float sum = own + exp2_approx(sink_log2 - top);
  return {own / sum, top + log2_approx(sum)};
}

__device__ inline void write_lse(const KernelParams& p, int token, int q_head, float lse_log2) {
  if (p.lse) p.lse[static_cast<int64_t>(token) * p.num_qo_heads + q_head] = lse_log2 * kLn2;
}

// Adds `count` arrivals to a merge unit; true for the arrival that completes it, which resets the
// counter for the next launch. Call from one thread after a CTA barrier; the CTA barrier that
// follows makes every partial state visible to the whole CTA (release and acquire at gpu scope).
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

// Running merge of one row's states by one lane: fixed order, so equal bits on every run.
struct RowMerge {
  float top = neg_infinity();
  float sum = 0.0f;

  // Returns {factor for what was accumulated, factor for the new state}.
  __device__ float2 add(float lse_log2) {
    const float new_top = fmaxf(top, lse_log2);
    if (new_top == neg_infinity()) return {1.0f, 0.0f};
    const float keep = exp2_approx(top - new_top);
    const float take = exp2_approx(lse_log2 - new_top);
    sum = sum * keep + take;
    top = new_top;
    return {keep, take};
  }
  __device__ float lse_log2() const { return sum > 0.0f ? top + log2_approx(sum) : neg_infinity(); }
};

}  // namespace fi
