// RoPE inside attention: q and the K rows of a tile turned by their slots, as fp32.
#pragma once

#include "cpu/kv_tiles.h"

namespace fi::cpu {

// Scores depend on differences of slots only, so that an item counts them from where the window of
// its first row begins: K of a tile turns once for all rows, and angles are few however long the
// text. For leading tokens, which keep their slots, each row has a second q.
class Rotator {
 public:
  // rows: bounds of the item's rows.
  Rotator(const Job& job, const VariantBox& rows);

  // scratch.q -> scratch.q and scratch.q_for_sinks, turned.
  void turn_q(int32_t num_rows, Scratch* scratch) const;

  // scratch.k_turned and its rows: those of the tile, turned.
  void turn_k(const KvTile& tile, Scratch* scratch) const;

  // The q that a tile is multiplied with.
  float* q_of(const KvTile& tile, const Scratch& scratch) const;

 private:
  int32_t gone_before(int32_t q_pos) const;
  bool has_sinks(const KvTile& tile) const;
  void turn(float* row, int32_t slot) const;

  const Job& job_;
  const Rotation& rotation_;
  int32_t base_;  // position in slot 0 of the item, leading tokens apart
};

}  // namespace fi::cpu
