// Capacity of a plan: the formulas of docs/planning.md, as code.
#include "host/planner.h"

namespace fi::host {
namespace {

struct Counts {
  int64_t items, units, node_tiles, partial_rows;
};

// Upper bounds over every batch within capacity. A request in a smaller tile class than the largest
// has one tile, so ceil(q_len * g / rows) <= 1 + q_len * g / max_rows for all of them.
Counts count_capacity(const PlanConfig& config) {
  const PlanCapacity& cap = config.capacity;
  const int64_t heads = config.num_kv_heads, group = config.num_qo_heads / config.num_kv_heads;
  const int64_t max_rows = config.classes.back().rows;
  const auto tiles = [&](int64_t blocks, int64_t tokens) {
    return blocks + (tokens * group + max_rows - 1) / max_rows;
  };
  Counts n{};
  n.units = heads * tiles(cap.max_requests, cap.max_tokens);
  if (cap.max_nodes > 0) n.node_tiles = heads * tiles(cap.max_nodes, cap.max_shared_tokens);
  n.items = n.units + n.node_tiles + config.num_ctas;
  // Shared rows count twice: once in the node, once in the request's own part.
  n.partial_rows = 2 * max_rows * config.num_ctas + 2 * heads * group * cap.max_shared_tokens;
  if (config.invariant_chunk > 0) {
    const int64_t chunks = cap.max_kv_len / config.invariant_chunk + 1;
    int64_t rows = cap.max_requests * max_rows;  // of one-tile requests, per KV head
    if (cap.max_tokens * group < rows) rows = cap.max_tokens * group;
    n.items += heads * cap.max_requests * chunks;
    n.partial_rows = heads * rows * chunks;
  }
  return n;
}

}  // namespace

PlanLayout make_layout(const PlanConfig& config) {
  const Counts n = count_capacity(config);
  const PlanCapacity& cap = config.capacity;
  PlanLayout layout{};
  int64_t at = sizeof(PlanHeader);
  const auto place = [&at](int64_t count, int64_t size) {
    const int64_t offset = at;
    at += (count * size + 63) / 64 * 64;
    return offset;
  };
  layout.cta_ptr = place(config.num_ctas + 1, sizeof(int32_t));
  layout.first_items = place(config.num_ctas, sizeof(WorkItem));
  layout.items = place(n.items, sizeof(WorkItem));
  layout.units = place(n.units, sizeof(MergeUnit));
  layout.requests = place(cap.max_requests, sizeof(PlannedRequest));
  layout.nodes = place(cap.max_nodes, sizeof(PlannedNode));
  layout.node_tiles = place(n.node_tiles, sizeof(NodeTile));
  layout.links = place(cap.max_links, sizeof(NodeLink));
  layout.gathered = place(cap.max_shared_tokens, sizeof(GatheredToken));
  layout.total_bytes = at;
  layout.max_items = static_cast<int32_t>(n.items);
  layout.max_units = static_cast<int32_t>(n.units);
  layout.max_node_tiles = static_cast<int32_t>(n.node_tiles);
  layout.num_ctas = config.num_ctas;
  layout.max_partial_rows = n.partial_rows;
  return layout;
}

}  // namespace fi::host
