// Tile classes per architecture and what a tile costs. One unit is 10 ns of one CTA (CPU: thread);
// only ratios matter to the planner. The tables are part of the evidence of every benchmark: change
// them together with new measurements.
#pragma once

#include <vector>

#include "fi/plan/layout.h"

namespace fi::host {

// CPU engine. `rows` is the most a tile may hold; a decode of g heads fills g of 16. Measured with
// AVX-512, head dimension 128, bf16: 1.9 us per KV tile for 4 rows (bound by reading K and V), 12.4
// us for 64 rows (bound by multiply-adds); gathering q, the final write and a merge 0.4 and 1.6 us.
inline std::vector<TileClass> cpu_tile_classes() {
  return {
      // rows, kv_tile, c_fixed, c_tile
      {16, 64, 40, 190},    // decode and verification
      {64, 64, 160, 1240},  // prefill: 64 rows reuse each KV tile
  };
}

// The tile classes of one GPU kernel: `stages[i]` shared-memory stages for classes[i].
struct KernelTiles {
  std::vector<TileClass> classes;
  std::vector<int32_t> stages;
  int32_t warps;  // of a CTA
  int32_t ctas_per_sm;
};

// What decides about a kernel's tiles.
struct KernelShape {
  int32_t head_dim_qk, head_dim_vo;
  int32_t kv_bytes;      // of a cache element
  int32_t group_size;    //
  int32_t max_q_len;     // query tokens of one request, at most
  int32_t max_requests;  //
  int32_t max_shared_bytes_per_sm;
  bool boxes;  // K and V come as boxes of tensor maps, in the classes that take them
};

KernelTiles sm80_tiles(const KernelShape& shape);

}  // namespace fi::host
