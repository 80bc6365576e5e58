// Arguments of the planner kernel, passed as one __grid_constant__, and the scratch memory of one
// CTA. Host code fills and sizes them: no device functions here.
#pragma once

#include "fi/plan/row_tiles.h"

namespace fi {

namespace planner {

// A place in the linear order (request, KV head, tile descending, KV step) where a span ends.
struct alignas(16) Cut {
  int32_t tile;   // row tiles of all KV heads before it
  int32_t step;   // KV steps of its row tile before it; a cut inside a tile has some
  int32_t items;  // items before it
  int32_t rows;   // partial rows before it
};

// What a kernel is compiled for: none carries the code of others.
struct Mode {
  int32_t per_thread;   // requests, or row tiles, that a thread takes in one round: 1 or 4
  int32_t num_classes;  // of row tiles
  bool is_invariant;    // batch-invariant mode
  bool from_start;      // no window either: rows see KV from position 0
  bool is_narrow;       // a KV head's cost of any step is below 2^31; not in batch-invariant mode
};

// Costs of one KV head, below 2^31 or 2^63.
template <Mode kMode>
struct CostType {
  using Type = int64_t;
};
template <Mode kMode>
  requires(kMode.is_narrow)
struct CostType<kMode> {
  using Type = uint32_t;
};

// What every CTA works out for itself. "Tiles" here are row tiles of one KV head, requests
// ascending and each request's tiles descending: all heads have the same.
template <class Cost>
struct Scratch {
  Cut* cuts;               // [num_ctas + 1]
  Cost* cost;              // [max_row_tiles + 1] cost of the tiles before each
  int64_t* pieces;         // [max_row_tiles + 1] batch-invariant mode: items << 32 | partial rows
  int32_t* tile_request;   // [max_row_tiles]
  int32_t* tile_begin;     // [max_requests + 1] tiles of the requests before each
  int32_t* qo_begin;       // [max_requests]
  int32_t* q_len;          // [max_requests]
  int32_t* kv_len;         // [max_requests]
  int32_t* cut_tile_rows;  // [num_ctas + 1] packed rows of each cut's row tile
};

// For costs of 64 bits.
struct WideDivisors {
  LongDivisor num_ctas;
  LongDivisor c_tile[kMaxTileClasses];
};

// Byte offsets of the arrays, from the start of a CTA's scratch. Each is 16-byte aligned and of
// whole 16 bytes: threads write runs of four entries.
struct ScratchLayout {
  int64_t cuts, cost, pieces, tile_request, tile_begin, qo_begin, q_len, kv_len, cut_tile_rows;
  int64_t total_bytes;
};

}  // namespace planner

struct PlanKernelParams {
  // The step; what the kernel reads first stands first.
  const int32_t* qo_indptr;  // [num_requests + 1] tokens
  const void* kv_len;        // [num_requests] tokens, new ones included
  int32_t num_requests;
  int32_t kv_len_is_int64;
  // Constant for a layer class and its capacity.
  int32_t max_requests;
  int32_t max_tokens;     // query tokens of a step
  int32_t max_kv_len;     // KV tokens of one request
  int32_t max_row_tiles;  // of one KV head
  Divisor num_kv_heads;
  Divisor num_ctas;  // of the attention launch: spans; below 2^15
  Tiling tiling;
  Divisor c_tile[kMaxTileClasses];  // of tiling.classes
  PlanLayout layout;
  planner::ScratchLayout scratch_layout;
  void* scratch;  // total_bytes of that for each CTA, where shared memory does not hold them
  // The step.
  void* plan;                  // layout.total_bytes, 16-byte aligned
  int32_t* status;             // PlanStatus bits of failing steps are OR-ed in; null: not wanted
  planner::WideDivisors wide;  // last: few kernels read them
};

namespace planner {

// Of the parameters, what a kernel for narrow costs reads.
constexpr int32_t kNarrowBytes = sizeof(PlanKernelParams) - sizeof(WideDivisors);

template <class Cost>
FI_HOST_DEVICE Scratch<Cost> scratch_at(const ScratchLayout& layout, char* base) {
  Scratch<Cost> s;
  s.cuts = reinterpret_cast<Cut*>(base + layout.cuts);
  s.cost = reinterpret_cast<Cost*>(base + layout.cost);
  s.pieces = reinterpret_cast<int64_t*>(base + layout.pieces);
  s.tile_request = reinterpret_cast<int32_t*>(base + layout.tile_request);
  s.tile_begin = reinterpret_cast<int32_t*>(base + layout.tile_begin);
  s.qo_begin = reinterpret_cast<int32_t*>(base + layout.qo_begin);
  s.q_len = reinterpret_cast<int32_t*>(base + layout.q_len);
  s.kv_len = reinterpret_cast<int32_t*>(base + layout.kv_len);
  s.cut_tile_rows = reinterpret_cast<int32_t*>(base + layout.cut_tile_rows);
  return s;
}

}  // namespace planner
}  // namespace fi
