// append_kv: rows of new K and V, rotated and quantised where asked for, into their slots of the
// cache; rows of q rotated on the way. Source: the copy-bandwidth advice of the CUDA C++ best
// practices guide (vector accesses, several loads in flight per thread).
#pragma once

#include "fi/common/rope.h"

namespace fi {

// Where a row of new tokens goes in the cache.
template <class Element>
struct CacheRows {
  using Stored = Element;
  static constexpr bool kReadsSlots = true;
  Element* data;
  KvStrides stride;
  const float* scale;
  int32_t scale_per_head;

  // Null: the token is skipped.
  __device__ Element* row(const AppendParams& p, int token, int head, int64_t slot) const {
    if (static_cast<uint64_t>(slot) >= static_cast<uint64_t>(p.num_slots)) return nullptr;
    const int32_t page = p.page_size.quotient(static_cast<int32_t>(slot));
    const int32_t offset = static_cast<int32_t>(slot) - page * p.page_size.value;
    return data + page * stride.page + offset * stride.token + head * stride.head;
  }
  __device__ float scale_of(int head) const {
    return scale ? scale[scale_per_head ? head : 0] : 1.0f;
  }
};

// Where a row of q goes.
template <class Element>
struct QueryRows {
  using Stored = Element;
  static constexpr bool kReadsSlots = false;
  Element* data;
  TokenStrides stride;

  __device__ Element* row(const AppendParams&, int token, int head, int64_t) const {
    return data + token * stride.token + head * stride.head;
  }
  __device__ float scale_of(int) const { return 1.0f; }
};

// What a thread holds of one row.
template <class Element, class R>
struct LoadedUnit {
  int token;  // negative: nothing
  int head;
  int64_t slot, position;
  float scale;
  Chunk<Element> x, y;  // y: the partner
  Chunk<typename R::CosSin, R::kAngles> cos, sin;
};

template <class Element, class Stored, bool kAligned, class R>
__device__ inline void store_unit(const LoadedUnit<Element, R>& loaded, const Unit& unit,
                                  Stored* row) {
  constexpr bool kIsCopy = R::kRotaryDim == 0 && sizeof(Stored) == sizeof(Element);
  if constexpr (kIsCopy) {
    store_chunk<kAligned>(row + unit.first, loaded.x, unit.count);
  } else {
    float x[kChunk], y[kChunk];
    unpack(loaded.x, x);
    if constexpr (R::kRotaryDim > 0) {
      float cos[R::kAngles], sin[R::kAngles];
      if constexpr (!R::kIsInterleaved) unpack(loaded.y, y);
      unpack(loaded.cos, cos);
      unpack(loaded.sin, sin);
      rotate_unit<R>(x, y, cos, sin, unit.angles);
    }
    if constexpr (sizeof(Stored) == 1) {
      divide_by_scale(x, loaded.scale);
      if constexpr (R::kRotaryDim > 0 && !R::kIsInterleaved) divide_by_scale(y, loaded.scale);
    }
    store_chunk<kAligned>(row + unit.first, pack<Stored>(x), unit.count);
    if constexpr (R::kRotaryDim > 0 && !R::kIsInterleaved) {
      if (unit.partner) store_chunk<kAligned>(row + unit.partner, pack<Stored>(y), unit.count);
    }
  }
}

// Moves the rows of CTA `cta` of one tensor. All loads of a thread are issued before its first
// store. A thread writes only what it alone reads, so q may be rotated in place.
template <class Element, int kDim, bool kAligned, class R, int kPasses, class Target>
__device__ inline void append_rows(const AppendParams& p, int cta, const void* data,
                                   TokenStrides stride, const Divisor& heads,
                                   const Target& target) {
  constexpr int kUnits = units_of_row(kDim, R::kRotaryDim, R::kIsInterleaved);
  constexpr int kRows = rows_per_pass(kUnits);
  static_assert(kRows > 0, "a row has more units than a CTA has threads");
  const int row_of_pass = threadIdx.x / kUnits;
  if (row_of_pass >= kRows) return;
  const Unit unit = unit_of<R, kDim>(threadIdx.x % kUnits);
  const int num_rows = p.num_tokens * heads.value;
  LoadedUnit<Element, R> loaded[kPasses];

#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    auto& l = loaded[pass];
    const int row = (cta * p.passes + pass) * kRows + row_of_pass;
    l.token = -1;
    if (pass >= p.passes || row >= num_rows) continue;
    l.token = heads.quotient(row);
    l.head = row - l.token * heads.value;
    if constexpr (Target::kReadsSlots) l.slot = p.slots[l.token];
    if constexpr (R::kRotaryDim > 0) l.position = position_of(p.rope, l.token);
    if constexpr (sizeof(typename Target::Stored) == 1) l.scale = target.scale_of(l.head);
    const Element* from =
        static_cast<const Element*>(data) + l.token * stride.token + l.head * stride.head;
    l.x = load_chunk<kAligned, kChunk>(from + unit.first, unit.count);
    if (unit.partner) l.y = load_chunk<kAligned, kChunk>(from + unit.partner, unit.count);
  }
  if constexpr (R::kRotaryDim > 0) {
    using CosSin = typename R::CosSin;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      auto& l = loaded[pass];
      if (l.token < 0) continue;
      if (l.position < 0) l.token = -1;
      if (l.position < 0 || unit.angles == 0) continue;
      const CosSin* cos = static_cast<const CosSin*>(p.rope.cos_sin) +
                          l.position * p.rope.cos_sin_stride + unit.angle;
      l.cos = load_chunk<kAligned, R::kAngles>(cos, unit.angles);
      l.sin = load_chunk<kAligned, R::kAngles>(cos + R::kRotaryDim / 2, unit.angles);
    }
  }
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const auto& l = loaded[pass];
    if (l.token < 0) continue;
    auto* row = target.row(p, l.token, l.head, l.slot);
    if (row) store_unit<Element, typename Target::Stored, kAligned>(l, unit, row);
  }
}

// The kernel. kAligned: all rows start at multiples of 16 bytes (8 in an fp8 cache), and rotated
// parts are whole chunks.
template <class Element, class CacheElement, int kDimQk, int kDimVo, bool kAligned, class R>
__device__ void append_kv(const AppendParams& p) {
  constexpr int kPasses = max_passes(R::kRotaryDim > 0);
  static_assert(!kAligned || R::kRotaryDim % (R::kIsInterleaved ? kChunk : 2 * kChunk) == 0);
  const int cta = blockIdx.x;
  if (cta < p.k_ctas) {
    const CacheRows<CacheElement> target{static_cast<CacheElement*>(p.kv.k), p.kv.k_stride,
                                         p.k_scale, p.k_scale_per_head};
    append_rows<Element, kDimQk, kAligned, R, kPasses>(p, cta, p.k, p.k_stride, p.kv_heads, target);
  } else if (cta < p.k_ctas + p.v_ctas) {
    const CacheRows<CacheElement> target{static_cast<CacheElement*>(p.kv.v), p.kv.v_stride,
                                         p.v_scale, p.v_scale_per_head};
    append_rows<Element, kDimVo, kAligned, NoRope, kPasses>(p, cta - p.k_ctas, p.v, p.v_stride,
                                                            p.kv_heads, target);
  } else if constexpr (R::kRotaryDim > 0) {
    const QueryRows<Element> target{static_cast<Element*>(p.q_out), p.q_out_stride};
    append_rows<Element, kDimQk, kAligned, R, kPasses>(p, cta - p.k_ctas - p.v_ctas, p.q,
                                                       p.q_stride, p.qo_heads, target);
  }
}

}  // namespace fi
