// Tile classes per architecture and what a tile costs. One unit is about 10 ns on the named
// machine; only ratios matter to the planner. The table is part of the evidence of every benchmark:
// change it together with new measurements.
#pragma once

#include <vector>

#include "fi/plan/layout.h"

namespace fi::host {

// CPU engine, per packed-row class. `rows` is the most a tile may hold; a decode of g heads fills g
// of 16. 64 KV tokens of head dimension 128 as fp32 scratch (K or V) are 32 KB: half of a 64 KB
// L1+L2 working set. c_fixed covers gathering q, the final write and a merge.
inline std::vector<TileClass> cpu_tile_classes() {
  return {
      // rows, kv_tile, c_fixed, c_tile
      {16, 64, 200, 400},   // decode and verification: bound by converting and reading KV
      {64, 64, 800, 4000},  // prefill: bound by multiply-adds, 64 rows reuse each KV tile
  };
}

}  // namespace fi::host
