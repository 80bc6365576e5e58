// append_kv: rows of new K and V, rotated and quantised where asked for, into their slots of the
// cache; rows of q rotated on the way. Source: the copy-bandwidth advice of the CUDA C++ best
// practices guide (vector accesses, several loads in flight per thread).
#pragma once

#include "fi/common/rope.h"
#include "fi/ptx/grid.h"
#include "fi/ptx/thread.h"

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
template <class Element, class Stored, class R>
struct LoadedUnit {
  Stored* row;  // null: nothing
  float scale;
  Chunk<Element> x, y;  // y: the partner
  Chunk<typename R::CosSin, R::kAngles> cos, sin;
};

// Which row it is. On its way with the unit; gone before the angles come.
struct RowOfTokens {
  int token;  // negative: none
  int head;
  int64_t slot, position;
};

template <bool kAligned, class R>
__device__ inline void load_angles(const RopeParams& rope, int64_t position, const Unit& unit,
                                   Chunk<typename R::CosSin, R::kAngles>& cos,
                                   Chunk<typename R::CosSin, R::kAngles>& sin) {
  const auto* row = static_cast<const typename R::CosSin*>(rope.cos_sin) +
                    position * rope.cos_sin_stride + unit.angle;
  cos = load_chunk<kAligned, R::kAngles>(row, unit.angles);
  sin = load_chunk<kAligned, R::kAngles>(row + R::kRotaryDim / 2, unit.angles);
}

template <bool kDivides, class Element, class Stored, int kDim, bool kAligned, class R>
__device__ inline void store_unit(const LoadedUnit<Element, Stored, R>& loaded, const Unit& unit) {
  constexpr bool kIsCopy = R::kRotaryDim == 0 && sizeof(Stored) == sizeof(Element);
  constexpr bool kHasPartners = R::kRotaryDim == 0 ? has_halves(kDim) : !R::kIsInterleaved;
  Stored* const to = loaded.row + unit.first;
  Stored* const to_partner = loaded.row + unit.partner;
  if constexpr (kIsCopy) {
    store_chunk<kAligned>(to, loaded.x, unit.count);
    if constexpr (kHasPartners) store_chunk<kAligned>(to_partner, loaded.y, unit.count);
  } else {
    float x[kChunk], y[kChunk]{};
    unpack(loaded.x, x);
    if constexpr (kHasPartners) unpack(loaded.y, y);
    if constexpr (R::kRotaryDim > 0) {
      float cos[R::kAngles], sin[R::kAngles];
      unpack(loaded.cos, cos);
      unpack(loaded.sin, sin);
      rotate_unit<R>(x, y, cos, sin, unit.angles);
    }
    if constexpr (sizeof(Stored) == 1 && !kDivides) divide_by_scale(x, y, loaded.scale);
    if constexpr (sizeof(Stored) == 1 && kDivides) divide_exactly(x, y, loaded.scale);
    store_chunk<kAligned>(to, pack<Stored>(x), unit.count);
    if constexpr (kHasPartners) {
      if (unit.partner) store_chunk<kAligned>(to_partner, pack<Stored>(y), unit.count);
    }
  }
}

// A tensor of new rows and where they go.
template <class Element, class Target>
struct Rows {
  const Element* data;
  TokenStrides stride;
  Divisor heads;
  Target target;
  int count;
};

// Moves the thread's units of `kPasses` passes of CTA `cta` from first_pass on. All its loads are
// issued before its first store. With kDivides rows of awkward scales are moved, else the others;
// returns whether rows were left.
template <bool kDivides, int kPasses, int kDim, bool kAligned, class R, class Element, class Target>
__device__ inline bool move_units(const AppendParams& p, int cta, const Rows<Element, Target>& rows,
                                  int first_pass) {
  using Stored = typename Target::Stored;
  constexpr int kUnits = units_of_row(kDim, R::kRotaryDim, R::kIsInterleaved);
  constexpr int kRows = rows_per_pass(kUnits);
  static_assert(kRows > 0, "a row has more units than a CTA has threads");
  const uint32_t thread = ptx::thread_index();
  if (thread >= kRows * kUnits) return false;
  const Unit unit = unit_of<R, kDim>(thread % kUnits);
  const int first_row = (cta * p.passes + first_pass) * kRows + static_cast<int>(thread / kUnits);
  LoadedUnit<Element, Stored, R> loaded[kPasses];
  RowOfTokens row_of[kPasses];

#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    auto& l = loaded[pass];
    auto& r = row_of[pass];
    const int row = first_row + pass * kRows;
    r.token = -1;
    if (first_pass + pass >= p.passes || row >= rows.count) continue;
    r.token = rows.heads.quotient(row);
    r.head = row - r.token * rows.heads.value;
    if constexpr (Target::kReadsSlots) r.slot = p.slots[r.token];
    if constexpr (R::kRotaryDim > 0) r.position = position_of(p.rope, r.token);
    if constexpr (sizeof(Stored) == 1) l.scale = rows.target.scale_of(r.head);
    const Element* from = rows.data + r.token * rows.stride.token + r.head * rows.stride.head;
    l.x = load_chunk<kAligned, kChunk>(from + unit.first, unit.count);
    if (unit.partner) l.y = load_chunk<kAligned, kChunk>(from + unit.partner, unit.count);
  }
  bool leaves_rows = false;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    auto& l = loaded[pass];
    const auto& r = row_of[pass];
    l.row = nullptr;
    if (r.token < 0 || (R::kRotaryDim > 0 && r.position < 0)) continue;
    if constexpr (sizeof(Stored) == 1) {
      const bool is_left = is_awkward(l.scale) != kDivides;
      leaves_rows |= is_left;
      if (is_left) continue;
    }
    l.row = rows.target.row(p, r.token, r.head, r.slot);
    if constexpr (R::kRotaryDim > 0) {
      if (l.row && unit.angles) load_angles<kAligned, R>(p.rope, r.position, unit, l.cos, l.sin);
    }
  }
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const auto& l = loaded[pass];
    if (l.row) store_unit<kDivides, Element, Stored, kDim, kAligned>(l, unit);
  }
  return leaves_rows;
}

// Moves the rows of CTA `cta` of one tensor. A thread writes only what it alone reads, so q may be
// rotated in place. Awkward scales are rare: their code must not cost the others registers.
template <int kDim, bool kAligned, class R, class Element, class Target>
__device__ inline void append_rows(const AppendParams& p, int cta,
                                   const Rows<Element, Target>& rows) {
  const bool leaves_rows = move_units<false, kMaxPasses, kDim, kAligned, R>(p, cta, rows, 0);
  if constexpr (sizeof(typename Target::Stored) == 1) {
    if (!leaves_rows) return;
#pragma unroll 1
    for (int pass = 0; pass < p.passes; ++pass) {
      move_units<true, 1, kDim, kAligned, R>(p, cta, rows, pass);
    }
  }
}

// The kernel. The CTAs of attention, which comes right behind it, start beside it and wait until it
// has ended, before they read anything. kAligned: all rows start at multiples of 16 bytes (8 in an
// fp8 cache), and rotated parts are whole chunks.
template <class Element, class CacheElement, int kDimQk, int kDimVo, bool kAligned, class R>
__device__ void append_kv(const AppendParams& p) {
  static_assert(!kAligned || R::kRotaryDim % (R::kIsInterleaved ? kChunk : 2 * kChunk) == 0);
  ptx::wait_for_previous_grid();  // of which K, V and slots may be
  ptx::start_next_grid();
  const int cta = blockIdx.x, v_cta = cta - p.k_ctas, q_cta = v_cta - p.v_ctas;
  const int num_kv_rows = p.num_tokens * p.num_kv_heads;
  if (v_cta < 0) {
    const CacheRows<CacheElement> cache{static_cast<CacheElement*>(p.kv.k), p.kv.k_stride,
                                        p.k_scale, p.k_scale_per_head};
    append_rows<kDimQk, kAligned, R>(
        p, cta, Rows{static_cast<const Element*>(p.k), p.k_stride, p.kv_heads, cache, num_kv_rows});
  } else if (q_cta < 0) {
    const CacheRows<CacheElement> cache{static_cast<CacheElement*>(p.kv.v), p.kv.v_stride,
                                        p.v_scale, p.v_scale_per_head};
    append_rows<kDimVo, kAligned, NoRope>(
        p, v_cta,
        Rows{static_cast<const Element*>(p.v), p.v_stride, p.kv_heads, cache, num_kv_rows});
  } else if constexpr (R::kRotaryDim > 0) {
    const QueryRows<Element> out{static_cast<Element*>(p.q_out), p.q_out_stride};
    append_rows<kDimQk, kAligned, R>(p, q_cta,
                                     Rows{static_cast<const Element*>(p.q), p.q_stride, p.qo_heads,
                                          out, p.num_tokens * p.num_qo_heads});
  }
}

}  // namespace fi
