// What a printed variant function sees of the element that it is applied to, on the CPU and on a
// GPU.
#pragma once

#include "fi/attention/variant_hooks.h"
#include "fi/attention/variant_math.h"

namespace fi::variants {

// What a printed function asks of its context, answered for one element of a tile. What a
// function does not ask for is not read.
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

}  // namespace fi::variants
