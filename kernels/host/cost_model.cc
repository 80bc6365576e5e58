#include "host/cost_model.h"

#include <algorithm>

#include "fi/sm80/config.h"

namespace fi::host {
namespace {

// A row of the sm80 tile table, for heads whose larger dimension is at most `max_head_dim`.
// Measured on an H200 (docs/notes/2026-11-22-sm80-first-light.md).
struct TileRow {
  int32_t max_head_dim;
  int32_t rows, kv_tile, stages;
  int32_t ctas_per_sm;  // the most: registers at 128 threads; shared memory is counted below
  int32_t c_fixed, c_tile;
};

// Of equal `rows` the first that fits is taken.
constexpr TileRow kSm80Tiles[] = {
    // Decode: bound by memory. Three CTAs a SM hide each other's softmax.
    {64, 16, 128, 2, 3, 225, 150},  // 168 registers, 73 KB
    {128, 16, 64, 2, 3, 225, 150},  // 168 registers, 74 KB
    {192, 16, 64, 2, 2, 225, 180},  // shared memory: 93 KB
    {256, 16, 64, 3, 1, 225, 150},  // shared memory: 212 KB
    // Chunks, verification of many tokens, and what heads of more than 128 components leave of the
    // registers: a warp holds 16 rows of o.
    {128, 64, 64, 2, 2, 90, 200},
    {192, 64, 64, 2, 2, 90, 250},
    {256, 64, 32, 2, 2, 90, 200},
    {256, 64, 16, 2, 2, 90, 120},  // 67 KB, for the 99 KB of sm_89 and sm_120
    // Prefill: 32 rows a warp, so that a fragment of K or V serves two products.
    {64, 128, 64, 2, 2, 150, 260},
    {128, 128, 64, 2, 2, 150, 420},  // 242 registers; shared memory: 108 KB
};
constexpr int32_t kMinStages = 2;

// What a CTA takes of a SM's shared memory: the system's share and the static part come on top.
int32_t cta_bytes(const KernelShape& shape, const TileRow& row, int32_t stages) {
  constexpr int32_t kReservedBytes = 1024 + 128;
  return kReservedBytes + sm80::plan_shared(shape.head_dim_qk, shape.head_dim_vo, shape.kv_bytes,
                                            row.rows, row.kv_tile, stages)
                              .bytes;
}

std::vector<TileRow> tiles_that_fit(const KernelShape& shape) {
  std::vector<TileRow> result;
  for (const TileRow& row : kSm80Tiles) {
    const bool is_taken = !result.empty() && result.back().rows == row.rows;
    if (is_taken || std::max(shape.head_dim_qk, shape.head_dim_vo) > row.max_head_dim) continue;
    if (cta_bytes(shape, row, kMinStages) <= shape.max_shared_bytes_per_sm) result.push_back(row);
  }
  return result;
}

}  // namespace

// Carries the classes that some request within capacity uses: those of lengths that no smaller
// class holds. Example: with g = 4 one query token needs 16 rows only; with g = 64 it needs 64,
// never 16.
KernelTiles sm80_tiles(const KernelShape& shape) {
  const std::vector<TileRow> rows = tiles_that_fit(shape);
  const int64_t most_rows = int64_t{std::max(1, shape.max_q_len)} * shape.group_size;
  KernelTiles result{{}, {}, 16};
  int64_t served = 0;  // packed rows that the classes so far hold
  for (std::size_t i = 0; i < rows.size() && served < most_rows; ++i) {
    const TileRow& row = rows[i];
    const int64_t next = (served / shape.group_size + 1) * shape.group_size;
    if (next > row.rows && i + 1 < rows.size()) continue;  // only larger classes hold it
    served = i + 1 < rows.size() ? row.rows : most_rows;   // the last takes several tiles
    int32_t stages = row.stages;
    while (stages > kMinStages && cta_bytes(shape, row, stages) > shape.max_shared_bytes_per_sm) {
      --stages;
    }
    const int32_t fit = shape.max_shared_bytes_per_sm / cta_bytes(shape, row, stages);
    result.ctas_per_sm = std::min({result.ctas_per_sm, row.ctas_per_sm, fit});
    result.classes.push_back({row.rows, row.kv_tile, row.c_fixed, row.c_tile});
    result.stages.push_back(stages);
  }
  // Few requests: shorter spans of more CTAs would only split more.
  if (shape.max_requests <= 8) result.ctas_per_sm = std::min(result.ctas_per_sm, 2);
  return result;
}

}  // namespace fi::host
