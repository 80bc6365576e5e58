// What loops over tiles have in common: where K and V lie, what masks and functions need to know.
#pragma once

#include "fi/attention/variant.h"
#include "fi/sm80/load.h"

namespace fi::sm80 {

// KV positions of a step: from `begin` on, of those [first, end).
struct Columns {
  int begin, first, end;
};

// Tiles of an item where nothing is masked by position and nothing lies outside of their run.
struct PlainTiles {
  int begin, end;

  __device__ bool hold(int tile) const { return tile >= begin && tile < end; }
};

// A loop over tiles, but for its products.
template <class S, class V, class T>
class TileLoop {
 public:
  __device__ TileLoop(const KernelParams& p, const CurrentItem& current, const VariantRow* rows)
      : p_(p), current_(current), rows_(rows) {}

  __device__ static int lane() { return ptx::thread_index() % 32; }
  __device__ static int first_col() { return ptx::thread_index() / 32 % T::kWarpsN * T::kWarpCols; }

  // Those of the longer run: what a tile costs is found out before the loop.
  template <class Tiles>
  __device__ PlainTiles plain_tiles(const Tiles& tiles) const {
    const int count = tiles.count();
    const int first_tile = tiles.before_hole < count - tiles.before_hole ? tiles.before_hole : 0;
    const Band& band = p_.band;
    int first = tiles.first(first_tile), end = tiles.end(first_tile);
    const int begin = tiles.begin(first_tile);
    if (band.left >= 0) first = max_i32(first, current_.box.q_pos_max - band.left);
    if (band.right >= 0) end = min_i32(end, current_.box.q_pos_min + band.right + 1);
    return {first_tile + ceil_div(first - begin, T::kKvTile),
            first_tile + (max_i32(end, begin) - begin) / T::kKvTile};
  }

 protected:
  // A lane's row of K or V at its chunk `chunk`, 0 or 1, of 16 bytes; boxes leave them swizzled.
  __device__ static uint32_t first_chunk(uint32_t row, uint32_t chunk) {
    return row + (kInBoxes<S, T> ? (chunk ^ lane() % 8) * 16 : chunk * 16);
  }
  // The same of an even number of chunks further, a constant.
  __device__ static uint32_t chunk_at(uint32_t first, int chunks) {
    if constexpr (!kInBoxes<S, T>) return first + chunks * 16;
    return (first ^ chunks % 8 * 16) + chunks / 8 * (T::kKvTile * kBoxBytes);
  }

  __device__ MaskKind mask_kind(int kv_begin, int kv_end) const {
    if constexpr (V::kHasMasks) {
      const RowBox& rows = current_.box;
      const int first_head = current_.item.kv_head * S::kGroupSize;
      const VariantBox box = {rows.q_pos_min,  rows.q_pos_max,
                              kv_begin,        min_i32(kv_begin + T::kKvTile, kv_end) - 1,
                              rows.q_len_min,  rows.q_len_max,
                              rows.kv_len_min, rows.kv_len_max,
                              first_head,      first_head + S::kGroupSize - 1};
      return mask_kind_of_box(typename V::Masks{}, p_, box);
    }
    return MaskKind::kFull;
  }

  __device__ static float masked_value() { return V::kSoftmax ? neg_infinity() : 0.0f; }

  // Natural-unit logits through the variant's functions; what its masks hide gets the masked value.
  // Columns past kv_end stand for the last one: their logits are masked later, but a function may
  // read a tensor at its KV position.
  __device__ void apply_variant(const VariantRow& row, int kv, int kv_end, MaskKind kind,
                                float& x) const {
    const int column = min_i32(kv, kv_end - 1), kv_head = current_.item.kv_head;
    const float logit =
        apply_all(typename V::Logits{}, p_, row, kv_head, column, x * current_.scale);
    if constexpr (!V::kFoldsScale) x = logit;
    if constexpr (V::kHasMasks) {
      const bool seen = kind == MaskKind::kFull ||
                        all_visible(typename V::Masks{}, p_, row, kv_head, column, logit);
      x = seen ? x : masked_value();
    }
  }

  // What logits are multiplied with where powers of 2 are taken.
  __device__ float scale_log2() const { return (V::kFoldsScale ? current_.scale : 1.0f) * kLog2E; }

  // The reach of a band to one side; what is unbounded reaches further than any text is long.
  __device__ static int reach(int32_t side) {
    return static_cast<int>(min(static_cast<uint32_t>(side), 1u << 30));
  }

  __device__ bool crosses_band(Columns columns, int count) const {
    const Band& band = p_.band;
    const int end = columns.begin + count;
    if (kInBoxes<S, T> && columns.begin < columns.first) return true;
    if (end > columns.end || (band.right >= 0 && end > current_.box.q_pos_min + band.right + 1)) {
      return true;
    }
    return band.left >= 0 && columns.begin < current_.box.q_pos_max - band.left;
  }

  // A row that has seen nothing keeps max -inf; subtract 0 then, so that 2^-inf is 0, not NaN.
  __device__ static float finite_or_zero(float row_max) {
    return row_max == neg_infinity() ? 0.0f : row_max;
  }

  // Whether a variant's functions are called for logits.
  static constexpr bool kHasFunctions = V::kHasLogits || V::kHasMasks || !V::kSoftmax;

  const KernelParams& p_;
  const CurrentItem& current_;
  const VariantRow* rows_;
};

}  // namespace fi::sm80
