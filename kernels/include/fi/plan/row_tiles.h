// How row blocks are cut into row tiles, and the KV range and cost of one. The host planner and its
// twin on the device decide with these functions alone, so that both decide the same.
#pragma once

#include "fi/plan/divide.h"
#include "fi/plan/layout.h"

namespace fi {

// What a node's tile costs more than a request's, in the units of TileClass: its rows are gathered,
// and its state has many merge units, the more the more rows there are.
FI_HOST_DEVICE constexpr int32_t node_fixed(int32_t rows) { return 220 + 11 * rows / 4; }

// Whether a cut that leaves this much of a tile's cost moves to the tile's end. To begin the tile
// again costs c_fixed, which is more; and it is little beside the cost of a span.
FI_HOST_DEVICE constexpr bool is_short_rest(int64_t rest, int64_t c_fixed, int64_t span) {
  return rest <= c_fixed && 8 * rest <= span;
}

// What decides how a layer class's row blocks become row tiles.
struct Tiling {
  Divisor group;  // query heads per KV head: packed rows of one token
  Divisor chunk;  // KV cuts lie at absolute multiples of this many tokens; value 0: anywhere
  Band band;
  int32_t num_classes;
  TileClass classes[kMaxTileClasses];  // ascending by rows
  Divisor rows[kMaxTileClasses];       // of each class
  Divisor kv_tile[kMaxTileClasses];    //

  // The smallest class that holds all rows in one tile; if there is none, the largest.
  // Without a loop that ends early: a GPU compares with all at once.
  FI_HOST_DEVICE int32_t class_of(int32_t packed_rows) const {
    int32_t c = 0;
    for (int32_t i = 0; i < kMaxTileClasses - 1; ++i) {
      c += i < num_classes - 1 && packed_rows > classes[i].rows;
    }
    return c;
  }
};

// The KV range of one row tile, counted in steps, and its cost. A step is what a cut may not
// divide: a KV tile, or in batch-invariant mode a chunk between absolute multiples of C.
//
// Worked example: rows see KV [70, 300), KV tiles of 64. Tiles lie at absolute multiples of 64, so
// the steps are [70,128) [128,192) [192,256) [256,300): 4 of them, and a cut after step 1 splits
// the range at 128 whatever else is in the batch.
struct RowTile {
  int32_t row_begin;
  int32_t num_rows;
  int32_t tile_class;
  int32_t kv_begin;    // visible range of the tile's rows
  int32_t kv_end;      //
  int32_t hole_begin;  // multiples of the KV tile; equal: no hole
  int32_t hole_end;    //
  Divisor kv_tile;     // tokens
  Divisor chunk;       // tokens of a step, a multiple of kv_tile; value 0: steps are KV tiles
  int64_t c_fixed;
  int64_t c_tile;

  // In batch-invariant mode every step is an item of its own.
  FI_HOST_DEVICE bool whole_chunks() const { return chunk.value > 0; }

  FI_HOST_DEVICE int32_t first_tile() const { return kv_tile.quotient(kv_begin); }

  FI_HOST_DEVICE int32_t num_tiles() const {
    if (kv_end <= kv_begin) return 0;
    return kv_tile.ceil_quotient(kv_end) - first_tile() - kv_tile.quotient(hole_end - hole_begin);
  }

  // Steps are numbered from the visible range's first step; there are no holes where they are
  // chunks.
  FI_HOST_DEVICE int32_t num_steps() const {
    if (!whole_chunks()) return num_tiles();
    if (kv_end <= kv_begin) return 0;
    return chunk.ceil_quotient(kv_end) - chunk.quotient(kv_begin);
  }

  FI_HOST_DEVICE int64_t cost() const {
    const int64_t starts = whole_chunks() ? max_i32(1, num_steps()) : 1;
    return c_fixed * starts + c_tile * num_tiles();
  }

  // KV tiles before step s.
  FI_HOST_DEVICE int32_t tiles_before(int32_t s) const {
    if (!whole_chunks() || s == 0) return s;
    const int32_t chunk_tiles = kv_tile.quotient(chunk.value);
    return min_i32((chunk.quotient(kv_begin) + s) * chunk_tiles - first_tile(), num_tiles());
  }

  // Steps from the tile's start that cost about `budget`. Half of the fixed cost counts before the
  // cut and half behind it, where the tile begins again. In batch-invariant mode all of it counts
  // for every step, and the steps fit.
  FI_HOST_DEVICE int32_t steps_within(int64_t budget) const {
    if (!whole_chunks()) {
      const int64_t left = budget + c_tile / 2 - c_fixed / 2;
      return left <= 0 ? 0 : min_i32(quotient_of(left, c_tile), num_tiles());
    }
    int32_t low = 0, high = num_steps();  // the most steps whose cost is <= budget
    while (low < high) {
      const int32_t mid = (low + high + 1) / 2;
      if (c_fixed * mid + c_tile * tiles_before(mid) <= budget) {
        low = mid;
      } else {
        high = mid - 1;
      }
    }
    return low;
  }

  // First KV position of KV tile number `tile` of this row tile, hole skipped.
  FI_HOST_DEVICE int32_t position(int32_t tile) const {
    int32_t at = (first_tile() + tile) * kv_tile.value;
    if (hole_end > hole_begin && at >= hole_begin) at += hole_end - hole_begin;
    return max_i32(at, kv_begin);
  }

  // The range of steps [begin, end) as the item's KV range and hole.
  FI_HOST_DEVICE void fill_range(int32_t begin, int32_t end, WorkItem* item) const {
    item->hole_begin = item->hole_end = 0;
    item->kv_begin = item->kv_end = kv_begin;
    if (begin == end) return;
    const int32_t tile_end = tiles_before(end);
    item->kv_begin = position(tiles_before(begin));
    const int32_t last = position(tile_end - 1);
    item->kv_end =
        tile_end == num_tiles() ? kv_end : last + kv_tile.value - kv_tile.remainder(last);
    if (hole_end > hole_begin && item->kv_begin < hole_begin && item->kv_end > hole_end) {
      item->hole_begin = hole_begin;
      item->hole_end = hole_end;
    }
  }
};

// A tile without its KV range.
FI_HOST_DEVICE inline RowTile empty_row_tile(const Tiling& tiling, int32_t tile_class, int32_t tile,
                                             int32_t packed_rows) {
  const TileClass& tc = tiling.classes[tile_class];
  RowTile out{};
  out.row_begin = tile * tc.rows;
  out.num_rows = min_i32(tc.rows, packed_rows - out.row_begin);
  out.tile_class = tile_class;
  out.kv_tile = tiling.kv_tile[tile_class];
  out.c_fixed = tc.c_fixed;
  out.c_tile = tc.c_tile;
  return out;
}

// Batch-invariant mode: one-tile requests are cut at every multiple of C, others never, so that the
// partial states depend on the request's own lengths alone.
FI_HOST_DEVICE inline void set_chunks(const Tiling& tiling, int32_t num_tiles, RowTile* out) {
  if (tiling.chunk.value == 0) return;
  constexpr Divisor kNeverCut = make_divisor(1 << 30);
  out->chunk = num_tiles == 1 ? tiling.chunk : kNeverCut;
  out->hole_begin = out->hole_end = 0;
}

// Row tile `tile` of a request whose own KV part starts at own_begin.
FI_HOST_DEVICE inline RowTile request_row_tile(const PlannedRequest& request, const Tiling& tiling,
                                               int32_t own_begin, int32_t tile) {
  const Divisor& group = tiling.group;
  RowTile out = empty_row_tile(tiling, request.tile_class, tile, request.q_len * group.value);
  const Band& band = tiling.band;
  const int32_t q_pos0 = request.kv_len - request.q_len;
  const int32_t first_pos = q_pos0 + group.quotient(out.row_begin);
  const int32_t last_pos = q_pos0 + group.quotient(out.row_begin + out.num_rows - 1);
  out.kv_begin = own_begin;
  out.kv_end = request.kv_len;
  if (band.right >= 0) {
    const int64_t end = static_cast<int64_t>(last_pos) + band.right + 1;
    if (end < out.kv_end) out.kv_end = max_i32(static_cast<int32_t>(end), 0);
  }
  const int32_t window_begin = band.left >= 0 && first_pos > band.left ? first_pos - band.left : 0;
  if (window_begin > own_begin) {
    const int32_t sink_end = min_i32(band.sink_prefix, window_begin);
    if (sink_end <= own_begin) {
      out.kv_begin = window_begin;
    } else {
      out.hole_begin = out.kv_tile.ceil_quotient(sink_end) * out.kv_tile.value;
      out.hole_end = out.kv_tile.quotient(window_begin) * out.kv_tile.value;
      if (out.hole_end <= out.hole_begin || out.kv_end <= out.hole_end) {
        out.hole_begin = out.hole_end = 0;
      }
    }
  }
  if (out.kv_end < out.kv_begin) out.kv_end = out.kv_begin;
  set_chunks(tiling, request.num_tiles, &out);
  return out;
}

// Row tile `tile` of a node: its rows come from several requests and all read the node's range.
FI_HOST_DEVICE inline RowTile node_row_tile(const PlannedNode& node, const Tiling& tiling,
                                            int32_t tile) {
  const int32_t packed_rows = node.num_tokens * tiling.group.value;
  RowTile out = empty_row_tile(tiling, node.tile_class, tile, packed_rows);
  out.kv_begin = node.kv_begin;
  out.kv_end = node.kv_end;
  out.c_fixed += node_fixed(tiling.classes[node.tile_class].rows);
  return out;
}

}  // namespace fi
