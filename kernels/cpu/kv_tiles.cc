#include "cpu/kv_tiles.h"

#include <algorithm>

namespace fi::cpu {
namespace {

// Columns of a tile. With few rows, K, V and the next K (prefetched) should share a 32 KB L1, which
// a token-major cache uses badly: 8 KB each, a power of two so that tiles still divide the
// planner's. Worked example: head dimension 128 in bf16, 256-byte rows: 32 columns; in fp8 64.
int32_t tile_cols(const Job& job, const WorkItem& item) {
  const int32_t planned = std::clamp(job.tile_class(item.tile_class).kv_tile, 1, kMaxTileCols);
  if (item.num_rows >= kMatmulRows) return planned;
  const int64_t row_bytes = job.params.heads.head_dim_qk * element_size(job.params.kv.dtype);
  int32_t cols = kMaxTileCols;
  while (cols > kColPad && cols * row_bytes > 8192) cols /= 2;
  return std::min(planned, cols);
}

}  // namespace

KvTiles::KvTiles(const Job& job, const WorkItem& item, const VariantBox& rows, Scratch* scratch)
    : job_(job),
      item_(item),
      rows_(rows),
      scratch_(scratch),
      cols_(tile_cols(job, item)),
      position_(item.kv_begin) {}

VariantBox KvTiles::box(const KvTile& tile) const {
  VariantBox box = rows_;
  box.kv_pos_min = tile.begin;
  box.kv_pos_max = tile.end - 1;
  return box;
}

KvTile KvTiles::next() {
  const int32_t end = item_.kv_end;
  while (position_ < end) {
    if (position_ >= item_.hole_begin && position_ < item_.hole_end) {
      position_ = item_.hole_end;
      continue;
    }
    KvTile tile{};
    tile.begin = position_;
    tile.end = std::min(end, position_ - position_ % cols_ + cols_);
    if (position_ < item_.hole_begin) tile.end = std::min(tile.end, item_.hole_begin);
    // Leading tokens turn by slots of their own: a tile has them or others.
    const Rotation& rotation = job_.params.rotation;
    if (position_ < rotation.sink_prefix) tile.end = std::min(tile.end, rotation.sink_prefix);
    position_ = tile.end;
    if (is_empty(tile)) continue;
    tile.in_band = covers_band(tile);
    resolve(&tile);
    return tile;
  }
  return KvTile{end, end, true, scratch_->k_rows[half_], scratch_->v_rows[half_]};
}

// Sums are 64-bit: a band may be as wide as int32 goes.
bool KvTiles::is_empty(const KvTile& tile) const {
  const Band& band = job_.params.band;
  const int64_t first = tile.begin, last = tile.end - 1;
  if (band.right >= 0 && first > static_cast<int64_t>(rows_.q_pos_max) + band.right) return true;
  const bool before_window =
      band.left >= 0 && last < static_cast<int64_t>(rows_.q_pos_min) - band.left;
  if (before_window && first >= band.sink_prefix) return true;
  const VariantChain& chain = job_.params.variant;
  for (int32_t i = 0; i < chain.num_stages; ++i) {
    const VariantStage& stage = chain.stages[i];
    if (!stage.mask || !stage.mask_kind) continue;
    if (stage.mask_kind(box(tile), stage.params) == MaskKind::kEmpty) return true;
  }
  return false;
}

bool KvTiles::covers_band(const KvTile& tile) const {
  const Band& band = job_.params.band;
  const int64_t first = tile.begin, last = tile.end - 1;
  const bool above_left = band.left < 0 || last < band.sink_prefix ||
                          first >= static_cast<int64_t>(rows_.q_pos_max) - band.left;
  const bool below_right =
      band.right < 0 || last <= static_cast<int64_t>(rows_.q_pos_min) + band.right;
  return above_left && below_right;
}

void KvTiles::resolve(KvTile* tile) {
  const KvCacheView& kv = job_.params.kv;
  const PageTableView& table = job_.params.table;
  const int64_t bytes = element_size(kv.dtype);
  const int32_t* entries = page_row(table, item_.table_row);
  tile->k = scratch_->k_rows[half_];
  tile->v = scratch_->v_rows[half_];
  half_ ^= 1;
  int32_t col = 0;
  for (int32_t position = tile->begin; position < tile->end;) {
    const int32_t index = position / table.page_size;
    const int64_t page = page_id(table, entries, index);
    int32_t token = position % table.page_size;
    const int64_t k_page = page * kv.k_stride.page + item_.kv_head * kv.k_stride.head;
    const int64_t v_page = page * kv.v_stride.page + item_.kv_head * kv.v_stride.head;
    for (; token < table.page_size && position < tile->end; ++token, ++position, ++col) {
      tile->k[col] = static_cast<char*>(kv.k) + (k_page + token * kv.k_stride.token) * bytes;
      tile->v[col] = static_cast<char*>(kv.v) + (v_page + token * kv.v_stride.token) * bytes;
    }
  }
  for (; col % kColPad != 0; ++col) tile->k[col] = scratch_->zeros;
}

namespace {

// Per row, positions up to q_pos + right stay that lie in the sink prefix or in the window.
void apply_band(const Job& job, const WorkItem& item, const KvTile& tile, Scratch* scratch) {
  const Band& band = job.params.band;
  const float masked = job.masked_value();
  const int64_t begin = tile.begin, end = tile.end;
  const int64_t sink_end = std::clamp<int64_t>(band.sink_prefix, begin, end);
  for (int32_t r = 0; r < item.num_rows; ++r) {
    const int64_t q_pos = scratch->rows[r].q_pos;
    const int64_t low = band.left < 0 ? begin : std::min(end, q_pos - band.left);
    const int64_t high = band.right < 0 ? end : std::max(begin, q_pos + band.right + 1);
    float* logits = scratch->logits + r * kMaxTileCols - begin;
    if (low > sink_end) std::fill(logits + sink_end, logits + low, masked);
    if (high < end) std::fill(logits + high, logits + end, masked);
  }
}

void hide_unseen_values(const Job& job, const WorkItem& item, const KvTile& tile,
                        Scratch* scratch) {
  const float masked = job.masked_value();
  int32_t seen[kMaxTileCols] = {};
  for (int32_t r = 0; r < item.num_rows; ++r) {
    const float* logits = scratch->logits + r * kMaxTileCols;
    for (int32_t c = 0; c < tile.size(); ++c) seen[c] |= logits[c] != masked;
  }
  for (int32_t c = 0; c < tile.size(); ++c) {
    if (!seen[c]) tile.v[c] = scratch->zeros;
  }
}

}  // namespace

void apply_variant(const Job& job, const WorkItem& item, const KvTile& tile, const VariantBox& box,
                   Scratch* scratch) {
  const VariantChain& chain = job.params.variant;
  VariantTile view{scratch->rows, nullptr,    kMaxTileCols, item.num_rows,
                   tile.size(),   tile.begin, item.kv_head, job.masked_value()};
  for (int32_t i = 0; i < chain.num_stages; ++i) {
    view.params = chain.stages[i].params;
    if (chain.stages[i].logits) chain.stages[i].logits(view, scratch->logits);
  }
  bool masked = false;
  for (int32_t i = 0; i < chain.num_stages; ++i) {
    const VariantStage& stage = chain.stages[i];
    if (!stage.mask) continue;
    if (stage.mask_kind && stage.mask_kind(box, stage.params) == MaskKind::kFull) continue;
    view.params = stage.params;
    stage.mask(view, scratch->logits);
    masked = true;
  }
  if (!tile.in_band) {
    apply_band(job, item, tile, scratch);
    masked = true;
  }
  if (masked) hide_unseen_values(job, item, tile, scratch);
}

}  // namespace fi::cpu
