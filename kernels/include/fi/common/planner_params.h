// Arguments of the planner kernel, passed as one __grid_constant__, and the scratch memory of one
// CTA. Host code fills and sizes them: no device functions here.
#pragma once

#include "fi/plan/forest.h"
#include "fi/plan/row_tiles.h"

namespace fi {

namespace planner {

// A place in the linear order (row block, KV head, tile descending, KV step) where a span ends.
struct alignas(16) Cut {
  int32_t tile;   // row tiles of all KV heads before it, those of nodes included
  int32_t step;   // KV steps of its row tile before it; a cut inside a tile has some
  int32_t items;  // items before it
  int32_t rows;   // partial rows before it that there are only because tiles are cut
};

// What a kernel is compiled for: none carries the code of others.
struct Mode {
  int32_t per_thread;   // requests, or row tiles, that a thread takes in one round: 1 or 4
  int32_t num_classes;  // of row tiles
  bool is_invariant;    // batch-invariant mode
  bool from_start;      // no window either: rows see KV from position 0
  bool is_narrow;       // a KV head's cost of any step is below 2^31; not in batch-invariant mode
  bool has_nodes;       // there may be a prefix forest; with from_start only
};

// A tile class and what is divided by its sizes, where threads look it up.
struct alignas(16) ClassRules {
  TileClass sizes;
  Divisor rows, kv_tile, c_tile;
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

// A node. All its row tiles cost the same.
template <class Cost>
struct alignas(16) NodePlace {
  Cost tile_cost;      // of each row tile
  int32_t tile_begin;  // row tiles of the nodes before, of one KV head
  int32_t num_tiles;
  int32_t num_tokens;
};

// What every CTA works out for itself. "Tiles" here are row tiles of one KV head, requests
// ascending and each request's tiles descending: all heads have the same.
template <class Cost>
struct Scratch {
  Cut* cuts;               // [num_ctas + 1]
  Cost* cost;              // [max_row_tiles + 1] cost of nodes and of the tiles before each
  int64_t* pieces;         // [max_row_tiles + 1] batch-invariant mode: items << 32 | partial rows
  int32_t* tile_request;   // [max_row_tiles]
  int32_t* tile_begin;     // [max_requests + 1] tiles of the requests before each
  int32_t* qo_begin;       // [max_requests]
  int32_t* q_len;          // [max_requests]
  int32_t* kv_len;         // [max_requests]
  int32_t* cut_tile_rows;  // [num_ctas + 1] packed rows of each cut's row tile
  // Mode::has_nodes:
  NodePlace<Cost>* nodes;  // [max_nodes + 1]
  Cost* node_cost;         // [max_nodes + 1] cost of the nodes before each
  // [(max_node_tiles + 1) / 2] cuts inside each tile in the linear order, 16 bits each.
  int32_t* node_cuts;
  ForestLink* first_links;  // [max_requests] of requests that have links
  // [max_requests] query tokens of all nodes and of members before each, times 2; + 1: a member.
  int32_t* shared_tokens;
};

// For costs of 64 bits.
struct WideDivisors {
  LongDivisor num_ctas;
  LongDivisor c_tile[kMaxTileClasses];
};

// Byte offsets of the arrays, from the start of a CTA's scratch. Each is 16-byte aligned and of
// whole 16 bytes, those of entries of 8 bytes of whole 32: threads write runs of four entries.
struct ScratchLayout {
  int64_t cuts, cost, pieces, tile_request, tile_begin, qo_begin, q_len, kv_len, cut_tile_rows;
  int64_t total_bytes;
};
struct NodeScratchLayout {
  int64_t nodes, node_cost, node_cuts, first_links, shared_tokens;
};

}  // namespace planner

struct PlanKernelParams {
  // The step; what the kernel reads first stands first.
  const int32_t* qo_indptr;  // [num_requests + 1] tokens
  const void* kv_len;        // [num_requests] tokens, new ones included
  const void* forest;        // as make_forest_layout() says, 16-byte aligned; Mode::has_nodes
  int32_t num_requests;
  int32_t kv_len_is_int64;
  // Constant for a layer class and its capacity.
  int32_t max_requests;
  int32_t max_tokens;  // query tokens of a step
  int32_t max_kv_len;  // KV tokens of one request
  int32_t max_nodes;
  Divisor num_kv_heads;
  Divisor num_ctas;  // of the attention launch: spans; below 2^15
  Tiling tiling;
  Divisor c_tile[kMaxTileClasses];  // of tiling.classes
  PlanLayout layout;
  planner::ScratchLayout scratch_layout;
  void* scratch;  // total_bytes of that for each CTA, where shared memory does not hold them
  // The step.
  void* plan;       // layout.total_bytes, 16-byte aligned
  int32_t* status;  // PlanStatus bits of failing steps are OR-ed in; null: not wanted
  // Last, because not every kernel reads them.
  planner::NodeScratchLayout node_layout;
  planner::WideDivisors wide;
};

namespace planner {

FI_HOST_DEVICE inline ClassRules class_rules(const PlanKernelParams& params, int32_t c) {
  const Tiling& tiling = params.tiling;
  return {tiling.classes[c], tiling.rows[c], tiling.kv_tile[c], params.c_tile[c]};
}

// Of the parameters, what a kernel reads.
template <Mode kMode>
constexpr int32_t kParamBytes =
    sizeof(PlanKernelParams) - (kMode.is_narrow ? sizeof(WideDivisors) : 0) -
    (kMode.is_narrow && !kMode.has_nodes ? sizeof(NodeScratchLayout) : 0);

template <class Cost>
FI_HOST_DEVICE Scratch<Cost> scratch_at(const PlanKernelParams& params, char* base) {
  const ScratchLayout& layout = params.scratch_layout;
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
  const NodeScratchLayout& nodes = params.node_layout;
  s.nodes = reinterpret_cast<NodePlace<Cost>*>(base + nodes.nodes);
  s.node_cost = reinterpret_cast<Cost*>(base + nodes.node_cost);
  s.node_cuts = reinterpret_cast<int32_t*>(base + nodes.node_cuts);
  s.first_links = reinterpret_cast<ForestLink*>(base + nodes.first_links);
  s.shared_tokens = reinterpret_cast<int32_t*>(base + nodes.shared_tokens);
  return s;
}

}  // namespace planner
}  // namespace fi
