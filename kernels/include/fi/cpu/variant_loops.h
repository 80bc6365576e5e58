// A printed variant function over a tile in memory. The loops are written so that the compiler
// vectorises them: one row at a time, no aliasing, no calls left after inlining.
#pragma once

#include "fi/attention/variant_hooks.h"
#include "fi/attention/variant_math.h"

namespace fi::cpu {

// What a printed function asks of its context, answered for one element of a tile.
struct ElementContext {
  const VariantRow& row;
  const VariantParam* params;
  int32_t group_head;  // KV head of the tile
  int32_t column;      // KV position, or component of the head dimension
  float value;         // logit, or output

  FI_VARIANT_FN float logit() const { return value; }
  FI_VARIANT_FN float out() const { return value; }
  FI_VARIANT_FN int32_t kv_pos() const { return column; }
  FI_VARIANT_FN int32_t dim() const { return column; }
  FI_VARIANT_FN int32_t q_pos() const { return row.q_pos; }
  FI_VARIANT_FN int32_t q_len() const { return row.q_len; }
  FI_VARIANT_FN int32_t kv_len() const { return row.kv_len; }
  FI_VARIANT_FN int32_t q_head() const { return row.q_head; }
  FI_VARIANT_FN int32_t kv_head() const { return group_head; }
  FI_VARIANT_FN int32_t token() const { return row.token; }
  FI_VARIANT_FN int32_t request() const { return row.request; }

  template <class T>
  FI_VARIANT_FN T scalar(int32_t index) const {
    return static_cast<T>(params[index].scalar);
  }

  // 0 where the surrounding `and`, `or`, `if` or where() does not ask for the element, which may
  // then lie outside the tensor.
  template <class T, class... Indices>
  FI_VARIANT_FN auto load(int32_t index, bool wanted, Indices... at) const {
    const VariantParam& param = params[index];
    const T* base = static_cast<const T*>(param.data);
    int64_t offset = 0;
    int32_t axis = 0;
    ((offset += at * param.strides[axis++]), ...);
    return widen(wanted ? base[offset] : T{0});
  }

  FI_VARIANT_FN static float widen(float x) { return x; }
  FI_VARIANT_FN static bool widen(bool x) { return x; }
  template <class T>
  FI_VARIANT_FN static int32_t widen(T x) {
    return static_cast<int32_t>(x);
  }
};

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
