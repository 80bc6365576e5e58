// Row tiles as the device planner (planner.h) sees them: what one costs and which KV it reads.
#pragma once

#include "fi/common/planner_parts.h"

namespace fi::planner {

template <Mode kMode>
struct SumsType {
  using Type = TileSums<typename CostType<kMode>::Type>;
};
template <Mode kMode>
  requires(kMode.is_invariant)
struct SumsType<kMode> {
  using Type = ChunkSums;
};

// The rules of row_tiles.h for one Mode. Where rows see KV from position 0, without the general
// code: then a thread's tiles take no branches and are worked out side by side.
template <Mode kMode>
class TileRules {
 public:
  using Cost = typename CostType<kMode>::Type;
  using Sums = typename SumsType<kMode>::Type;

  FI_HOST_DEVICE explicit TileRules(const PlanKernelParams& p) : p(p) {}

  // Tiling::class_of() and the entry of a class: selected, because loads by index take long.
  FI_HOST_DEVICE int32_t class_of(int32_t packed_rows) const {
    int32_t c = 0;
    for (int32_t i = 0; i < kMode.num_classes - 1; ++i) {
      c += packed_rows > p.tiling.classes[i].rows;
    }
    return c;
  }

  template <class T>
  FI_HOST_DEVICE static T pick(const T (&values)[kMaxTileClasses], int32_t c) {
    T value = values[0];
    for (int32_t i = 1; i < kMode.num_classes; ++i) {
      if (c == i) value = values[i];
    }
    return value;
  }

  FI_HOST_DEVICE int32_t packed_rows(int32_t q_len) const { return q_len * p.tiling.group.value; }

  FI_HOST_DEVICE TileClass tile_class(int32_t c) const { return pick(p.tiling.classes, c); }

  FI_HOST_DEVICE int32_t kv_tile(int32_t c) const { return pick(p.tiling.kv_tile, c).value; }

  FI_HOST_DEVICE int32_t num_tiles(int32_t q_len, int32_t c) const {
    return pick(p.tiling.rows, c).ceil_quotient(packed_rows(q_len));
  }

  // The tile of a request that has no other.
  FI_HOST_DEVICE Sums sums_of_only(int32_t q_len, int32_t kv_len, int32_t c) const {
    if constexpr (kMode.from_start) {
      return sums_from_start(c, kv_len);  // its last row is the last token's, which sees all
    } else {
      return sums_of(q_len, kv_len, c, 1, 0);
    }
  }

  // Tile `index` of a request.
  FI_HOST_DEVICE Sums sums_of(int32_t q_len, int32_t kv_len, int32_t c, int32_t num_tiles,
                              int32_t index) const {
    if constexpr (kMode.from_start) {
      return sums_from_start(c, end_from_start(q_len, kv_len, row_end(q_len, c, index)));
    } else {
      const RowTile row = row_tile(q_len, kv_len, c, num_tiles, index);
      Sums sums;
      sums.cost = static_cast<Cost>(row.cost());
      sums.tiles = 1;
      sums.add_pieces(max_i32(1, row.num_steps()), row.num_rows);
      return sums;
    }
  }

  // First part of an item: the rows and KV that it reads.
  FI_HOST_DEVICE void fill_item(int32_t q_len, int32_t kv_len, int32_t c, int32_t num_tiles,
                                int32_t index, int32_t step_begin, int32_t step_end,
                                WorkItem* item) const {
    if constexpr (kMode.from_start) {
      const int32_t end = row_end(q_len, c, index), tokens = kv_tile(c);
      item->row_begin = index * tile_class(c).rows;
      item->num_rows = end - item->row_begin;
      item->kv_begin = step_begin * tokens;
      item->kv_end = step_end < 0 ? end_from_start(q_len, kv_len, end) : step_end * tokens;
      item->hole_begin = item->hole_end = 0;
    } else {
      const RowTile row = row_tile(q_len, kv_len, c, num_tiles, index);
      item->row_begin = row.row_begin;
      item->num_rows = row.num_rows;
      row.fill_range(step_begin, step_end < 0 ? row.num_steps() : step_end, item);
    }
  }

  // Steps of a tile that fit into what is left of its cost: not all of them do.
  FI_HOST_DEVICE int32_t steps_within(Cost budget, int32_t c) const {
    const auto c_fixed = static_cast<Cost>(tile_class(c).c_fixed);
    if (budget <= c_fixed) return 0;
    if constexpr (kMode.is_narrow) {
      return pick(p.c_tile, c).quotient(static_cast<int32_t>(budget - c_fixed));
    } else {
      return static_cast<int32_t>(pick(p.wide.c_tile, c).divide(budget - c_fixed).quotient);
    }
  }

  FI_HOST_DEVICE RowTile row_tile(int32_t q_len, int32_t kv_len, int32_t c, int32_t num_tiles,
                                  int32_t index) const {
    PlannedRequest request{};
    request.q_len = q_len;
    request.kv_len = kv_len;
    request.num_tiles = num_tiles;
    request.tile_class = c;
    RowTile row = request_row_tile(request, p.tiling, 0, index);
    if constexpr (!kMode.is_invariant) row.chunk = {};  // as it is: tells the compiler
    return row;
  }

  // Past the last packed row.
  FI_HOST_DEVICE int32_t row_end(int32_t q_len, int32_t c, int32_t index) const {
    return min_i32((index + 1) * tile_class(c).rows, packed_rows(q_len));
  }

 private:
  FI_HOST_DEVICE Sums sums_from_start(int32_t c, int32_t kv_end) const {
    const TileClass tc = tile_class(c);
    const auto tiles = static_cast<Cost>(pick(p.tiling.kv_tile, c).ceil_quotient(kv_end));
    Sums sums;
    sums.cost = static_cast<Cost>(tc.c_fixed) + static_cast<Cost>(tc.c_tile) * tiles;
    sums.tiles = 1;
    return sums;
  }

  // Rows before row_end see KV [0, this) together.
  FI_HOST_DEVICE int32_t end_from_start(int32_t q_len, int32_t kv_len, int32_t row_end) const {
    const int32_t tokens_after = q_len - 1 - p.tiling.group.quotient(row_end - 1);
    const int32_t hidden = p.tiling.band.right < 0 ? 0 : tokens_after - p.tiling.band.right;
    return max_i32(0, kv_len - max_i32(hidden, 0));
  }

  const PlanKernelParams& p;
};

}  // namespace fi::planner
