#include "host/row_tiles.h"

namespace fi::host {
namespace {

RowTile empty_tile(const PlanConfig& config, int32_t tile_class, int32_t tile,
                   int32_t packed_rows) {
  const TileClass& tc = config.classes[tile_class];
  RowTile out{};
  out.row_begin = tile * tc.rows;
  out.num_rows = min_i32(tc.rows, packed_rows - out.row_begin);
  out.tile_class = tile_class;
  out.kv_tile = tc.kv_tile;
  out.step_tiles = 1;
  out.c_fixed = tc.c_fixed;
  out.c_tile = tc.c_tile;
  return out;
}

// Batch-invariant mode: one-tile requests are cut at every multiple of C, others never, so that the
// partial states depend on the request's own lengths alone.
void set_chunks(const PlanConfig& config, int32_t num_tiles, RowTile* out) {
  if (config.invariant_chunk == 0) return;
  constexpr int32_t kNeverCut = 1 << 30;
  const int32_t chunk = num_tiles == 1 ? config.invariant_chunk : kNeverCut;
  out->step_tiles = chunk / out->kv_tile;
  out->whole_chunks = true;
  out->hole_begin = out->hole_end = 0;
}

}  // namespace

RowTile request_row_tile(const PlannedRequest& request, const PlanConfig& config,
                         int32_t group_size, int32_t own_begin, int32_t tile) {
  RowTile out = empty_tile(config, request.tile_class, tile, request.q_len * group_size);
  const Band& band = config.band;
  const int32_t q_pos0 = request.kv_len - request.q_len;
  const int32_t first_pos = q_pos0 + out.row_begin / group_size;
  const int32_t last_pos = q_pos0 + (out.row_begin + out.num_rows - 1) / group_size;
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
      out.hole_begin = ceil_div(sink_end, out.kv_tile) * out.kv_tile;
      out.hole_end = window_begin / out.kv_tile * out.kv_tile;
      if (out.hole_end <= out.hole_begin || out.kv_end <= out.hole_end) {
        out.hole_begin = out.hole_end = 0;
      }
    }
  }
  if (out.kv_end < out.kv_begin) out.kv_end = out.kv_begin;
  set_chunks(config, request.num_tiles, &out);
  return out;
}

RowTile node_row_tile(const PlannedNode& node, const PlanConfig& config, int32_t group_size,
                      int32_t tile) {
  RowTile out = empty_tile(config, node.tile_class, tile, node.num_tokens * group_size);
  out.kv_begin = node.kv_begin;
  out.kv_end = node.kv_end;
  return out;
}

}  // namespace fi::host
