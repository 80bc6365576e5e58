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
template <Mode kMode>
  requires(kMode.has_nodes)
struct SumsType<kMode> {
  using Type = SharedSums<typename CostType<kMode>::Type>;
};

// The rules of row_tiles.h for one Mode. Where rows see KV from position 0, or from where a
// request's own part begins, without the general code: then a thread's tiles take no branches and
// are worked out side by side.
template <Mode kMode>
class TileRules {
  static_assert(!kMode.has_nodes || kMode.from_start);

 public:
  using Cost = typename CostType<kMode>::Type;
  using Sums = typename SumsType<kMode>::Type;

  FI_HOST_DEVICE TileRules(const PlanKernelParams& p, const ClassRules* classes)
      : p(p), classes_(classes) {}

  // Tiling::class_of().
  FI_HOST_DEVICE int32_t class_of(int32_t packed_rows) const {
    int32_t c = 0;
    for (int32_t i = 0; i < kMode.num_classes - 1; ++i) {
      c += packed_rows > p.tiling.classes[i].rows;
    }
    return c;
  }

  FI_HOST_DEVICE int32_t packed_rows(int32_t q_len) const { return q_len * p.tiling.group.value; }

  FI_HOST_DEVICE TileClass tile_class(int32_t c) const {
    return is_only() ? p.tiling.classes[0] : classes_[c].sizes;
  }

  FI_HOST_DEVICE Divisor rows(int32_t c) const {
    return is_only() ? p.tiling.rows[0] : classes_[c].rows;
  }

  FI_HOST_DEVICE Divisor kv_tile(int32_t c) const {
    return is_only() ? p.tiling.kv_tile[0] : classes_[c].kv_tile;
  }

  FI_HOST_DEVICE int32_t num_tiles(int32_t q_len, int32_t c) const {
    return rows(c).ceil_quotient(packed_rows(q_len));
  }

  // The tile of a request that has no other.
  FI_HOST_DEVICE Sums sums_of_only(const OwnPart& own, int32_t c) const {
    if constexpr (kMode.from_start) {
      return sums_of_range(c, own.kv_begin, own.kv_len);  // the last token sees all
    } else {
      return sums_of(own, c, 1, 0);
    }
  }

  // Tile `index` of a request.
  FI_HOST_DEVICE Sums sums_of(const OwnPart& own, int32_t c, int32_t num_tiles,
                              int32_t index) const {
    if constexpr (kMode.from_start) {
      return sums_of_range(c, own.kv_begin, end_from_start(own, row_end(own.q_len, c, index)));
    } else {
      const RowTile row = row_tile(own, c, num_tiles, index);
      Sums sums;
      sums.cost = static_cast<Cost>(row.cost());
      sums.tiles = 1;
      sums.add_pieces(max_i32(1, row.num_steps()), row.num_rows);
      return sums;
    }
  }

  // One tile, whose rows see KV [kv_begin, kv_end) together; kv_begin 0 without nodes.
  FI_HOST_DEVICE Sums sums_of_range(int32_t c, int32_t kv_begin, int32_t kv_end) const {
    const TileClass tc = tile_class(c);
    const Divisor kv_tile = this->kv_tile(c);
    int32_t tiles = kv_tile.ceil_quotient(kv_end);
    if constexpr (kMode.has_nodes) tiles -= kv_tile.quotient(kv_begin);
    Sums sums;
    sums.cost =
        static_cast<Cost>(tc.c_fixed) + static_cast<Cost>(tc.c_tile) * static_cast<Cost>(tiles);
    sums.tiles = 1;
    return sums;
  }

  // First part of an item: the rows and KV that it reads.
  FI_HOST_DEVICE void fill_item(const OwnPart& own, int32_t c, int32_t num_tiles, int32_t index,
                                int32_t step_begin, int32_t step_end, WorkItem* item) const {
    if constexpr (kMode.from_start) {
      const int32_t end = row_end(own.q_len, c, index), tokens = kv_tile(c).value;
      item->row_begin = index * tile_class(c).rows;
      item->num_rows = end - item->row_begin;
      item->kv_begin = step_begin * tokens;
      item->kv_end = step_end < 0 ? end_from_start(own, end) : step_end * tokens;
      item->hole_begin = item->hole_end = 0;
    } else {
      const RowTile row = row_tile(own, c, num_tiles, index);
      item->row_begin = row.row_begin;
      item->num_rows = row.num_rows;
      row.fill_range(step_begin, step_end < 0 ? row.num_steps() : step_end, item);
    }
  }

  // The same where KV may begin anywhere. All rows of a node see all of it.
  FI_HOST_DEVICE void fill_range(const OwnPart& own, int32_t c, bool is_node, const Piece& piece,
                                 WorkItem* item) const {
    const Divisor kv_tile = this->kv_tile(c);
    const int32_t first = kv_tile.quotient(own.kv_begin);
    const int32_t index = piece.place.index, end = row_end(own.q_len, c, index);
    item->row_begin = index * tile_class(c).rows;
    item->num_rows = end - item->row_begin;
    item->kv_begin = max_i32((first + piece.step_begin) * kv_tile.value, own.kv_begin);
    item->kv_end = (first + piece.step_end) * kv_tile.value;
    if (piece.step_end < 0) item->kv_end = is_node ? own.kv_len : end_from_start(own, end);
  }

  // KV head of a place and the cost before it within that head's tiles of the row block: the place
  // is `heads * in_head + rest` after the block's beginning.
  FI_HOST_DEVICE int32_t head_at(Cost in_head, int32_t rest, Cost head_cost, Cost* left) const {
    const int32_t heads = p.num_kv_heads.value;
    if constexpr (kMode.is_narrow) {
      const Quotient32 head = small_quotient(in_head, heads, rest, static_cast<int32_t>(head_cost));
      *left = head.remainder;
      return head.quotient;
    } else {
      const int32_t head = quotient_of(heads * in_head + rest, head_cost);
      *left = heads * in_head + rest - head * head_cost;
      return head;
    }
  }

  // The same for tiles of equal cost in a head.
  FI_HOST_DEVICE int32_t tile_at(Cost in_head, Cost tile_cost, Cost* left) const {
    if constexpr (kMode.is_narrow) {
      const Quotient32 tile = small_quotient(in_head, 1, 0, static_cast<int32_t>(tile_cost));
      *left = tile.remainder;
      return tile.quotient;
    } else {
      const int32_t tile = quotient_of(in_head, tile_cost);
      *left = in_head - tile * tile_cost;
      return tile;
    }
  }

  FI_HOST_DEVICE Cost fixed_cost(int32_t c, bool is_node) const {
    const TileClass tc = tile_class(c);
    return static_cast<Cost>(tc.c_fixed + (is_node ? node_fixed(tc.rows) : 0));
  }

  // Of a tile that costs as much.
  FI_HOST_DEVICE int32_t num_steps(Cost tile_cost, Cost c_fixed, int32_t c) const {
    return over_c_tile(tile_cost - c_fixed, c);
  }

  // RowTile::steps_within().
  FI_HOST_DEVICE int32_t steps_within(Cost budget, Cost tile_cost, Cost c_fixed, int32_t c) const {
    const Cost plus = budget + static_cast<Cost>(tile_class(c).c_tile) / 2, minus = c_fixed / 2;
    return plus <= minus || tile_cost == c_fixed ? 0 : over_c_tile(plus - minus, c);
  }

  // Whether a cut after `step` steps of a tile moves to its end.
  FI_HOST_DEVICE bool is_at_end(int32_t step, Cost budget, Cost tile_cost, Cost c_fixed, Cost span,
                                int32_t c) const {
    const Cost before = static_cast<Cost>(tile_class(c).c_tile) * static_cast<Cost>(step);
    return step > 0 &&
           (before + c_fixed >= tile_cost || is_short_rest(tile_cost - budget, c_fixed, span));
  }

  FI_HOST_DEVICE RowTile row_tile(const OwnPart& own, int32_t c, int32_t num_tiles,
                                  int32_t index) const {
    PlannedRequest request{};
    request.q_len = own.q_len;
    request.kv_len = own.kv_len;
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
  FI_HOST_DEVICE static constexpr bool is_only() { return kMode.num_classes == 1; }

  FI_HOST_DEVICE int32_t over_c_tile(Cost cost, int32_t c) const {
    if constexpr (kMode.is_narrow) {
      const Divisor c_tile = is_only() ? p.c_tile[0] : classes_[c].c_tile;
      return c_tile.quotient(static_cast<int32_t>(cost));
    } else {
      return static_cast<int32_t>(p.wide.c_tile[c].divide(cost).quotient);
    }
  }

  // Rows before row_end see KV up to here together.
  FI_HOST_DEVICE int32_t end_from_start(const OwnPart& own, int32_t row_end) const {
    const int32_t tokens_after = own.q_len - 1 - p.tiling.group.quotient(row_end - 1);
    const int32_t hidden = p.tiling.band.right < 0 ? 0 : tokens_after - p.tiling.band.right;
    return max_i32(0, own.kv_len - max_i32(hidden, 0));
  }

  const PlanKernelParams& p;
  const ClassRules* classes_;
};

}  // namespace fi::planner
