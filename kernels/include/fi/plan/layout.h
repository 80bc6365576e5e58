// Where each array of a plan lies. Offsets depend on capacity only, so a captured launch can replay
// any plan that fits.
#pragma once

#include "fi/plan/records.h"

namespace fi {

// A row tile of one class: `rows` packed query rows by KV tiles of `kv_tile` tokens, with its cost
// c_fixed + c_tile * ceil(kv range / kv_tile) in the units of host/cost_model.h.
struct TileClass {
  int32_t rows;
  int32_t kv_tile;
  int32_t c_fixed;
  int32_t c_tile;
};

constexpr int32_t kMaxTileClasses = 4;

// The most that a plan must hold. Zero nodes: sharing is off.
struct PlanCapacity {
  int32_t max_requests;
  int32_t max_tokens;         // query tokens of a step
  int32_t max_kv_len;         // KV tokens of one request
  int32_t max_nodes;          //
  int32_t max_links;          // memberships, summed over nodes
  int32_t max_shared_tokens;  // gathered query tokens, summed over nodes
};

// Byte offsets from the start of the plan; every array starts on a 64-byte boundary.
struct PlanLayout {
  int64_t cta_ptr;      // int32[num_ctas + 1]: items of CTA p are [cta_ptr[p], cta_ptr[p + 1])
  int64_t first_items;  // WorkItem[num_ctas]: a copy of each CTA's first item, which need not wait
                        //   for cta_ptr; undefined where a CTA has none
  int64_t items;        // WorkItem[max_items]
  int64_t units;        // MergeUnit[max_units]
  int64_t requests;     // PlannedRequest[max_requests]
  int64_t nodes;        // PlannedNode[max_nodes]
  int64_t node_tiles;   // NodeTile[max_node_tiles]
  int64_t links;        // NodeLink[max_links]
  int64_t gathered;     // GatheredToken[max_shared_tokens]
  int64_t total_bytes;  //
  int32_t max_items;
  int32_t max_units;
  int32_t max_node_tiles;
  int32_t num_ctas;
  int64_t max_partial_rows;
};

// Typed view of a plan in memory.
struct PlanView {
  const PlanHeader* header;
  const int32_t* cta_ptr;
  const WorkItem* first_items;
  const WorkItem* items;
  const MergeUnit* units;
  const PlannedRequest* requests;
  const PlannedNode* nodes;
  const NodeTile* node_tiles;
  const NodeLink* links;
  const GatheredToken* gathered;
};

FI_HOST_DEVICE inline PlanView view_plan(const void* plan, const PlanLayout& layout) {
  const char* base = static_cast<const char*>(plan);
  return {reinterpret_cast<const PlanHeader*>(base),
          reinterpret_cast<const int32_t*>(base + layout.cta_ptr),
          reinterpret_cast<const WorkItem*>(base + layout.first_items),
          reinterpret_cast<const WorkItem*>(base + layout.items),
          reinterpret_cast<const MergeUnit*>(base + layout.units),
          reinterpret_cast<const PlannedRequest*>(base + layout.requests),
          reinterpret_cast<const PlannedNode*>(base + layout.nodes),
          reinterpret_cast<const NodeTile*>(base + layout.node_tiles),
          reinterpret_cast<const NodeLink*>(base + layout.links),
          reinterpret_cast<const GatheredToken*>(base + layout.gathered)};
}

}  // namespace fi
