// Rotary embedding of rows that threads hold in units: which elements a unit has, and turning them.
#pragma once

#include "fi/common/chunk.h"

namespace fi {

struct NoRope {
  using CosSin = float;
  static constexpr int kRotaryDim = 0;
  static constexpr bool kIsInterleaved = false;
  static constexpr int kAngles = 4;
};

template <class CosSinElement, int kDim, bool kInterleaved>
struct Rope {
  using CosSin = CosSinElement;
  static constexpr int kRotaryDim = kDim;
  static constexpr bool kIsInterleaved = kInterleaved;
  static constexpr int kAngles = kInterleaved ? kChunk / 2 : kChunk;  // pairs of a unit
};

// `count` elements from `first` on; with a partner also those from `partner` on. Rotation turns the
// two pairwise.
struct Unit {
  int first;
  int partner;  // 0: none
  int count;
  int angles;  // pairs to rotate
  int angle;   // the first of them
};

// Unit `index` of a row. Rotary dim 24 of 32: units (0..7, 12..19), (8..11, 20..23) and (24..31).
template <class R, int kDim>
__device__ inline Unit unit_of(int index) {
  constexpr int kHalf = R::kRotaryDim / 2;
  if constexpr (R::kRotaryDim == 0) {
    return {kChunk * index, has_halves(kDim) ? kDim / 2 + kChunk * index : 0, kChunk, 0, 0};
  } else if constexpr (R::kIsInterleaved) {
    const int first = kChunk * index;
    return {first, 0, kChunk, max_i32(0, min_i32(kChunk / 2, kHalf - first / 2)), first / 2};
  } else {
    constexpr int kPairs = ceil_div(kHalf, kChunk);
    const int first = kChunk * index;
    const int rest = R::kRotaryDim + kChunk * (index - kPairs);
    const int count = min_i32(kChunk, kHalf - first);
    if (index < kPairs) return {first, kHalf + first, count, count, first};
    return {rest, 0, min_i32(kChunk, kDim - rest), 0, 0};
  }
}

// (x, y) turned by the angle. Every product and sum is rounded on its own, as on the CPU: both
// engines store the same bits.
__device__ inline void rotate_pair(float& x, float& y, float cos, float sin) {
  const float turned = __fsub_rn(__fmul_rn(x, cos), __fmul_rn(y, sin));
  y = __fadd_rn(__fmul_rn(y, cos), __fmul_rn(x, sin));
  x = turned;
}

// Rotates a unit: x with its partner y, or the neighbours of x.
template <class R>
__device__ inline void rotate_unit(float (&x)[kChunk], float (&y)[kChunk],
                                   const float (&cos)[R::kAngles], const float (&sin)[R::kAngles],
                                   int angles) {
#pragma unroll
  for (int i = 0; i < R::kAngles; ++i) {
    if (i >= angles) continue;
    if constexpr (R::kIsInterleaved) {
      rotate_pair(x[2 * i], x[2 * i + 1], cos[i], sin[i]);
    } else {
      rotate_pair(x[i], y[i], cos[i], sin[i]);
    }
  }
}

// The row of a token's position in cos_sin, negative when there is none.
__device__ inline int64_t position_of(const RopeParams& rope, int token) {
  const int64_t position = rope.positions_are_int64
                               ? static_cast<const int64_t*>(rope.positions)[token]
                               : static_cast<const int32_t*>(rope.positions)[token];
  return position < rope.num_positions ? position : -1;
}

}  // namespace fi
