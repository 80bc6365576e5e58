// A variant inside a GPU kernel: the types that the JIT's generated line names.
#pragma once

#include "fi/attention/element_context.h"
#include "fi/attention/interval.h"
#include "fi/attention/kernel_params.h"
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

// RoPE inside attention (Rotation of variant_hooks.h), as far as a kernel is compiled for it.
struct NoTurns {
  static constexpr bool kTurns = false, kIsInterleaved = false, kRolls = false, kMultiples = false;
};
template <bool kIsInterleaved_, bool kRolls_, bool kMultiples_>
struct Turns {
  static constexpr bool kTurns = true, kIsInterleaved = kIsInterleaved_;
  static constexpr bool kRolls = kRolls_;          // slots roll with a window
  static constexpr bool kMultiples = kMultiples_;  // angles of a slot are multiples of slot 1's
};

// What happens to logits and output: q and K turn, all of Logits in order, all of Masks, softmax
// (or not), Outputs.
template <bool kSoftmax_, class Logits_, class Masks_, class Outputs_, class Turns_ = NoTurns>
struct Variant : Turns_ {
  using Logits = Logits_;
  using Masks = Masks_;
  using Outputs = Outputs_;
  static constexpr bool kSoftmax = kSoftmax_;
  static constexpr bool kHasLogits = Logits::kCount > 0;
  static constexpr bool kHasMasks = Masks::kCount > 0;
  // The logits are only scaled: the scale folds into the base-2 exponent.
  static constexpr bool kFoldsScale = kSoftmax && !kHasLogits;
};

template <class... Bounds>
__device__ inline float apply_all(Functions<Bounds...>, const KernelParams& p,
                                  const VariantRow& row, int kv_head, int column, float x) {
  ((x = Bounds::Fn::apply(
        variants::ElementContext{row, p.variant_params + Bounds::kFirstParam, kv_head, column, x})),
   ...);
  return x;
}

template <class... Bounds>
__device__ inline bool all_visible(Functions<Bounds...>, const KernelParams& p,
                                   const VariantRow& row, int kv_head, int column, float x) {
  bool visible = true;
  ((visible &= Bounds::Fn::apply(
        variants::ElementContext{row, p.variant_params + Bounds::kFirstParam, kv_head, column, x})),
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
