#include "host/cost_model.h"

#include <algorithm>

#include "fi/sm80/config.h"

namespace fi::host {
namespace {

// A row of the sm80 tile table, for heads whose larger dimension is at most `max_head_dim`.
// Costs are in units of about 9 ns of an H200, where tiles of 64 and 128 rows multiply by
// warpgroups. Those of head dimension 128 were swept in steps with shared prefixes
// (docs/notes/2026-11-28-who-waits.md), those of 64 and 128 rows against prefill too
// (docs/notes/2026-11-29-instructions-of-prefill.md); the others follow from them or are older.
struct TileRow {
  int32_t max_head_dim;
  int32_t rows, kv_tile, stages;
  int32_t warps;        // of a CTA; a launch takes those of its largest class
  int32_t ctas_per_sm;  // the most: registers; shared memory is counted below
  int32_t c_fixed, c_tile;
};

// Of equal `rows` the first that fits is taken.
constexpr TileRow kSm80Tiles[] = {
    // Decode: bound by memory. Three CTAs a SM hide each other's softmax. Groups of up to 8 heads
    // have narrow products, unless they widen fp8.
    {64, 8, 128, 2, 4, 3, 270, 150},   // shared memory: 68 KB in boxes, 79 without
    {128, 8, 64, 2, 4, 3, 270, 150},   // at most 168 registers, 74 KB
    {192, 8, 64, 2, 4, 2, 295, 200},   // shared memory: 91 KB
    {256, 8, 64, 3, 4, 1, 295, 165},   // shared memory: 210 KB
    {64, 16, 128, 2, 4, 3, 270, 150},  // shared memory: 69 KB in boxes, 80 without
    {128, 16, 64, 2, 4, 3, 270, 150},  // at most 168 registers, 76 KB
    {192, 16, 64, 2, 4, 2, 295, 200},  // shared memory: 95 KB
    {256, 16, 64, 3, 4, 1, 295, 165},  // shared memory: 214 KB
    // Chunks, and verification of many tokens: a warp holds 16 rows.
    {128, 64, 64, 2, 4, 2, 450, 190},
    {192, 64, 64, 2, 4, 2, 400, 300},
    {256, 64, 32, 2, 4, 2, 400, 240},
    {256, 64, 16, 2, 4, 2, 400, 130},  // 69 KB, for the 99 KB of sm_89 and sm_120
    // Prefill. 32 rows a warp: a fragment of K or V serves two products. 256 components of o leave
    // registers for 16 rows a warp only: eight warps share what they load.
    {64, 128, 64, 2, 4, 2, 1200, 250},
    {128, 128, 64, 2, 4, 2, 1000, 260},  // 255 registers, 111 KB
    {256, 128, 64, 2, 8, 1, 1300, 280},  // shared memory: 209 KB
};
constexpr int32_t kMinStages = 2;

// What a CTA takes of a SM's shared memory: the system's share and the static part come on top.
int32_t cta_bytes(const KernelShape& shape, const TileRow& row, int32_t stages, int32_t warps) {
  // Boxes lie at multiples of an atom, behind the static part.
  const bool in_boxes = shape.boxes && sm80::takes_boxes(row.rows, row.kv_tile);
  const int32_t reserved = 1024 + (in_boxes ? sm80::kBoxAtom : sm80::kStaticBytes);
  return reserved + sm80::plan_shared(shape.head_dim_qk, shape.head_dim_vo, shape.kv_bytes,
                                      row.rows, row.kv_tile, stages, warps, in_boxes)
                        .bytes;
}

std::vector<TileRow> tiles_that_fit(const KernelShape& shape) {
  std::vector<TileRow> result;
  for (const TileRow& row : kSm80Tiles) {
    const bool is_taken = !result.empty() && result.back().rows == row.rows;
    if (row.rows == sm80::kNarrowRows && shape.kv_bytes != 2) continue;
    if (is_taken || std::max(shape.head_dim_qk, shape.head_dim_vo) > row.max_head_dim) continue;
    if (cta_bytes(shape, row, kMinStages, row.warps) <= shape.max_shared_bytes_per_sm) {
      result.push_back(row);
    }
  }
  return result;
}

// The classes that some request within capacity uses: those of lengths that no smaller class holds.
// Example: with g = 4 one query token needs 8 rows only; with g = 64 it needs 64, never 8.
std::vector<TileRow> carried_of(const std::vector<TileRow>& rows, const KernelShape& shape) {
  const int64_t most_rows = int64_t{std::max(1, shape.max_q_len)} * shape.group_size;
  std::vector<TileRow> carried;
  int64_t served = 0;  // packed rows that the classes so far hold
  for (std::size_t i = 0; i < rows.size() && served < most_rows; ++i) {
    const TileRow& row = rows[i];
    const int64_t next = (served / shape.group_size + 1) * shape.group_size;
    if (next > row.rows && i + 1 < rows.size()) continue;  // only larger classes hold it
    served = i + 1 < rows.size() ? row.rows : most_rows;   // the last takes several tiles
    carried.push_back(row);
  }
  return carried;
}

}  // namespace

KernelTiles sm80_tiles(const KernelShape& shape) {
  std::vector<TileRow> rows = tiles_that_fit(shape);
  std::vector<TileRow> carried = carried_of(rows, shape);
  // A launch has the warps of its largest class. More of them leave more states of the same rows,
  // for which a smaller class may have no room: its requests take the next one.
  const auto is_too_large = [&](const TileRow& row) {
    const int32_t bytes = cta_bytes(shape, row, kMinStages, carried.back().warps);
    return bytes > shape.max_shared_bytes_per_sm;
  };
  while (std::any_of(carried.begin(), carried.end(), is_too_large)) {
    const int32_t size = std::find_if(carried.begin(), carried.end(), is_too_large)->rows;
    std::erase_if(rows, [size](const TileRow& row) { return row.rows == size; });
    carried = carried_of(rows, shape);
  }
  KernelTiles result{{}, {}, carried.back().warps, carried.back().ctas_per_sm};
  for (const TileRow& row : carried) {
    int32_t stages = row.stages;
    const auto bytes = [&] { return cta_bytes(shape, row, stages, result.warps); };
    while (stages > kMinStages && bytes() > shape.max_shared_bytes_per_sm) --stages;
    result.ctas_per_sm =
        std::min({result.ctas_per_sm, row.ctas_per_sm, shape.max_shared_bytes_per_sm / bytes()});
    result.classes.push_back({row.rows, row.kv_tile, row.c_fixed, row.c_tile});
    result.stages.push_back(stages);
  }
  // Few requests: shorter spans of more CTAs would only split more.
  if (shape.max_requests <= 8) result.ctas_per_sm = std::min(result.ctas_per_sm, 2);
  return result;
}

}  // namespace fi::host
