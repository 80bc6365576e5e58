// A variant inside a GPU kernel: the types that the JIT's generated line names, and what a printed
// function sees of the element it is applied to.
#pragma once

#include "fi/attention/interval.h"
#include "fi/attention/kernel_params.h"
#include "fi/attention/variant_math.h"
#include "fi/core/math.h"

namespace fi {

// A printed function whose parameters begin at variant_params[kFirstParam].
template <class Function, int kFirstParam_>
struct Bound {
  using Fn = Function;
  static constexpr int kFirstParam = kFirstParam_;
};

template <class... Bounds>
struct Functions {
  static constexpr int kCount = sizeof...(Bounds);
};

// What happens to logits and output: all of Logits in order, all of Masks, softmax (or not),
// Outputs.
template <bool kSoftmax_, class Logits_, class Masks_, class Outputs_>
struct Variant {
  using Logits = Logits_;
  using Masks = Masks_;
  using Outputs = Outputs_;
  static constexpr bool kSoftmax = kSoftmax_;
  static constexpr bool kHasLogits = Logits::kCount > 0;
  static constexpr bool kHasMasks = Masks::kCount > 0;
  // The logits are only scaled: the scale folds into the base-2 exponent.
  static constexpr bool kFoldsScale = kSoftmax && !kHasLogits;
};

namespace variants {

// Answers a printed function for one element. Rows lie in shared memory, so that what a function
// does not ask for costs nothing.
struct DeviceContext {
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
    int64_t offset = 0;
    int32_t axis = 0;
    ((offset += at * param.strides[axis++]), ...);
    return widen(wanted ? static_cast<const T*>(param.data)[offset] : T{0});
  }

  FI_VARIANT_FN static float widen(float x) { return x; }
  FI_VARIANT_FN static bool widen(bool x) { return x; }
  template <class T>
  FI_VARIANT_FN static int32_t widen(T x) {
    return static_cast<int32_t>(x);
  }
};

}  // namespace variants

template <class... Bounds>
__device__ inline float apply_all(Functions<Bounds...>, const KernelParams& p,
                                  const VariantRow& row, int kv_head, int column, float x) {
  ((x = Bounds::Fn::apply(
        variants::DeviceContext{row, p.variant_params + Bounds::kFirstParam, kv_head, column, x})),
   ...);
  return x;
}

template <class... Bounds>
__device__ inline bool all_visible(Functions<Bounds...>, const KernelParams& p,
                                   const VariantRow& row, int kv_head, int column, float x) {
  bool visible = true;
  ((visible &= Bounds::Fn::apply(
        variants::DeviceContext{row, p.variant_params + Bounds::kFirstParam, kv_head, column, x})),
   ...);
  return visible;
}

// What all masks together do to a box of elements.
template <class... Bounds>
__device__ inline MaskKind mask_kind_of_box(Functions<Bounds...>, const KernelParams& p,
                                            const VariantBox& box) {
  MaskKind kind = MaskKind::kFull;
  const auto combine = [&](MaskKind one) {
    if (one == MaskKind::kEmpty || kind == MaskKind::kEmpty) {
      kind = MaskKind::kEmpty;
    } else if (one == MaskKind::kMixed) {
      kind = MaskKind::kMixed;
    }
  };
  (combine(
       variants::mask_kind_of<typename Bounds::Fn>(box, p.variant_params + Bounds::kFirstParam)),
   ...);
  return kind;
}

}  // namespace fi
