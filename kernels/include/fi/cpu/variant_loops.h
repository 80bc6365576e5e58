// A printed variant function over a tile in memory. The loops are written so that the compiler
// vectorises them: one row at a time, no aliasing, no calls left after inlining.
#pragma once

#include "fi/attention/element_context.h"

namespace fi::cpu {

using variants::ElementContext;

// Copies what the loop reads, so that the compiler can keep it in registers across stores.
template <int32_t kCount>
struct LocalParams {
  VariantParam values[kCount > 0 ? kCount : 1];

  FI_VARIANT_FN explicit LocalParams(const VariantParam* params) {
    for (int32_t i = 0; i < kCount; ++i) values[i] = params[i];
  }
};

template <class Function>
FI_VARIANT_FN void edit_logits(const VariantTile& tile, float* logits) {
  const LocalParams<Function::kNumParams> params(tile.params);
  const int32_t head = tile.kv_head, kv_begin = tile.kv_begin, num_cols = tile.num_cols;
  for (int32_t i = 0; i < tile.num_rows; ++i) {
    const VariantRow row = tile.rows[i];
    float* __restrict x = logits + i * tile.row_stride;
    for (int32_t j = 0; j < num_cols; ++j) {
      x[j] = Function::apply(ElementContext{row, params.values, head, kv_begin + j, x[j]});
    }
  }
}

template <class Function>
FI_VARIANT_FN void mask_logits(const VariantTile& tile, float* logits) {
  const LocalParams<Function::kNumParams> params(tile.params);
  const int32_t head = tile.kv_head, kv_begin = tile.kv_begin, num_cols = tile.num_cols;
  const float masked = tile.masked_value;
  for (int32_t i = 0; i < tile.num_rows; ++i) {
    const VariantRow row = tile.rows[i];
    float* __restrict x = logits + i * tile.row_stride;
    for (int32_t j = 0; j < num_cols; ++j) {
      const float logit = x[j];
      x[j] = Function::apply(ElementContext{row, params.values, head, kv_begin + j, logit})
                 ? logit
                 : masked;
    }
  }
}

template <class Function>
FI_VARIANT_FN void edit_output(const VariantTile& tile, float* output) {
  const LocalParams<Function::kNumParams> params(tile.params);
  const int32_t head = tile.kv_head, num_cols = tile.num_cols;
  for (int32_t i = 0; i < tile.num_rows; ++i) {
    const VariantRow row = tile.rows[i];
    float* __restrict x = output + i * tile.row_stride;
    for (int32_t j = 0; j < num_cols; ++j) {
      x[j] = Function::apply(ElementContext{row, params.values, head, j, x[j]});
    }
  }
}

}  // namespace fi::cpu
