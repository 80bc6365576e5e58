// The KV side of an item: which tiles of its range are worth visiting, and where their rows lie.
#pragma once

#include "cpu/job.h"

namespace fi::cpu {

struct KvTile {
  int32_t begin;
  int32_t end;     // begin == end: no tile left
  bool in_band;    // every row sees every column, as far as the band goes
  const void** k;  // [end - begin rounded up to kColPad]
  const void** v;  // [end - begin]
  int32_t size() const { return end - begin; }
};

// Walks the tiles of an item in ascending order. Tiles lie at absolute multiples of their width, so
// the arithmetic of a row does not depend on where a range was cut; the hole, and tiles that the
// band or the variant's mask empties for all rows, are stepped over.
class KvTiles {
 public:
  KvTiles(const Job& job, const WorkItem& item, const VariantBox& rows, Scratch* scratch);

  // The next tile, its row addresses resolved into the half of scratch that the tile before it does
  // not use: two consecutive tiles are valid at a time.
  KvTile next();

  // Positions of the tile and the item's rows.
  VariantBox box(const KvTile& tile) const;

 private:
  bool is_empty(const KvTile& tile) const;
  bool covers_band(const KvTile& tile) const;
  void resolve(KvTile* tile);

  const Job& job_;
  const WorkItem& item_;
  const VariantBox rows_;
  Scratch* scratch_;
  int32_t cols_;  // width of a tile
  int32_t position_;
  int half_ = 0;
};

// Edits the logits of a tile: variant transforms, then masks of variant and band. Then points the V
// rows that no query row sees at zeros, because 0 x NaN is NaN.
void apply_variant(const Job& job, const WorkItem& item, const KvTile& tile, const VariantBox& box,
                   Scratch* scratch);

}  // namespace fi::cpu
