// The KV range of one row tile, counted in steps, and its cost. A step is what a cut may not
// divide: a KV tile, or in batch-invariant mode a chunk between absolute multiples of C.
#pragma once

#include "host/planner.h"

namespace fi::host {

// Worked example: rows see KV [70, 300), KV tiles of 64. Tiles lie at absolute multiples of 64, so
// the steps are [70,128) [128,192) [192,256) [256,300): 4 of them, and a cut after step 1 splits
// the range at 128 whatever else is in the batch.
struct RowTile {
  int32_t row_begin;
  int32_t num_rows;
  int32_t tile_class;
  int32_t kv_begin;    // visible range of the tile's rows
  int32_t kv_end;      //
  int32_t hole_begin;  // multiples of kv_tile; equal: no hole
  int32_t hole_end;    //
  int32_t kv_tile;     //
  int32_t step_tiles;  // KV tiles of a step (1, or C / kv_tile)
  bool whole_chunks;   // every step is an item of its own
  int64_t c_fixed;
  int64_t c_tile;

  int32_t first_tile() const { return kv_begin / kv_tile; }

  int32_t num_tiles() const {
    if (kv_end <= kv_begin) return 0;
    return ceil_div(kv_end, kv_tile) - first_tile() - (hole_end - hole_begin) / kv_tile;
  }

  // Steps are numbered from the visible range's first step; holes only occur with step_tiles == 1.
  int32_t num_steps() const {
    if (step_tiles == 1) return num_tiles();
    if (kv_end <= kv_begin) return 0;
    return ceil_div(kv_end, kv_tile * step_tiles) - kv_begin / (kv_tile * step_tiles);
  }

  int64_t cost() const {
    const int64_t starts = whole_chunks ? max_i32(1, num_steps()) : 1;
    return c_fixed * starts + c_tile * num_tiles();
  }

  // KV tiles before step s.
  int32_t tiles_before(int32_t s) const {
    if (step_tiles == 1 || s == 0) return s;
    const int32_t first_step = first_tile() / step_tiles;
    return min_i32((first_step + s) * step_tiles - first_tile(), num_tiles());
  }

  // Steps that fit into `cost` from the tile's start, the fixed cost included.
  int32_t steps_within(int64_t budget) const {
    if (!whole_chunks) {
      if (budget <= c_fixed) return 0;
      const int64_t tiles = (budget - c_fixed) / c_tile;
      return static_cast<int32_t>(tiles < num_tiles() ? tiles : num_tiles());
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
  int32_t position(int32_t tile) const {
    int32_t at = (first_tile() + tile) * kv_tile;
    if (hole_end > hole_begin && at >= hole_begin) at += hole_end - hole_begin;
    return max_i32(at, kv_begin);
  }

  // The range of steps [begin, end) as the item's KV range and hole.
  void fill_range(int32_t begin, int32_t end, WorkItem* item) const {
    item->hole_begin = item->hole_end = 0;
    item->kv_begin = item->kv_end = kv_begin;
    if (begin == end) return;
    const int32_t tile_end = tiles_before(end);
    item->kv_begin = position(tiles_before(begin));
    item->kv_end = tile_end == num_tiles()
                       ? kv_end
                       : position(tile_end - 1) + kv_tile - position(tile_end - 1) % kv_tile;
    if (hole_end > hole_begin && item->kv_begin < hole_begin && item->kv_end > hole_end) {
      item->hole_begin = hole_begin;
      item->hole_end = hole_end;
    }
  }
};

// Row tile `tile` of a request whose own KV part starts at own_begin.
RowTile request_row_tile(const PlannedRequest& request, const PlanConfig& config,
                         int32_t group_size, int32_t own_begin, int32_t tile);

// Row tile `tile` of a node: its rows come from several requests and all read the node's range.
RowTile node_row_tile(const PlannedNode& node, const PlanConfig& config, int32_t group_size,
                      int32_t tile);

}  // namespace fi::host
