// The algebra of partial states (o, lse) of one row: o is normalised, lse natural. Without softmax
// states are plain sums.
#pragma once

#include <cmath>
#include <cstdint>

namespace fi::cpu {

// Merges the states that `visit` names, in the order in which it names them: visit(f) calls
// f(const float* o, float lse) once per state. Writes o[dim], returns lse.
//   m = max lse_i;  w_i = e^(lse_i - m);  o = sum w_i o_i / sum w_i;  lse = m + log sum w_i
// States of weight 0 are not read, so what they hold cannot spoil the sum; no state at all, or only
// empty ones, give o = 0 and lse = -inf.
template <class Visit>
float merge_row(const Visit& visit, bool softmax, int64_t dim, float* out) {
  float max_lse = -INFINITY;
  if (softmax) {
    visit([&](const float*, float lse) {
      if (!(lse <= max_lse)) max_lse = lse;  // NaN is passed on
    });
  }
  for (int64_t d = 0; d < dim; ++d) out[d] = 0.0f;
  if (softmax && max_lse == -INFINITY) return max_lse;
  float total = 0.0f;
  visit([&](const float* o, float lse) {
    const float weight = softmax ? std::exp(lse - max_lse) : 1.0f;
    if (weight == 0.0f) return;
    for (int64_t d = 0; d < dim; ++d) out[d] += weight * o[d];
    total += weight;
  });
  if (!softmax) return 0.0f;
  const float inverse = 1.0f / total;
  for (int64_t d = 0; d < dim; ++d) out[d] *= inverse;
  return max_lse + std::log(total);
}

}  // namespace fi::cpu
