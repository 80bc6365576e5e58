// The records of a plan: what the planner writes and every kernel (CPU, sm80, sm90) reads.
//
// A plan is one block of memory per layer class; plan/layout.h says where each array lies in it.
// Packed rows: the g query heads that share a KV head are rows of the same tile, so packed row x of
// a row block is (token x / g, head-in-group x % g). All positions are token positions, int32.
#pragma once

#include "fi/core/types.h"

namespace fi {

// The (query, KV) pairs that may interact, as the planner sees them: KV position j is visible to
// query position i when j <= i + right and (j >= i - left or j < sink_prefix). -1 = unbounded.
// Examples: causal is {-1, 0, 0}; a causal window of 128 tokens is {127, 0, 0}; StreamingLLM with 4
// sink tokens and the same window is {127, 0, 4}.
struct Band {
  int32_t left;
  int32_t right;
  int32_t sink_prefix;
};

// One unit of work of a CTA (or CPU thread): packed rows of one row block x one KV head x one KV
// range. 64 bytes, so that a kernel fetches all it needs with four 16-byte loads.
struct alignas(16) WorkItem {
  int32_t table_row;    // row of the page table whose pages this item reads
  int32_t kv_begin;     // first KV position
  int32_t kv_end;       // past the last KV position; kv_begin == kv_end: nothing visible
  int32_t hole_begin;   // KV positions [hole_begin, hole_end) inside the range are masked for every
  int32_t hole_end;     //   row and are skipped (sink prefix + window); equal: no hole
  int32_t kv_head;      //
  int32_t qo_begin;     // request item: first query token of the request;
                        //   node item: index of the node's first GatheredToken
  int32_t q_pos_begin;  // request item: position of its first query token, kv_len - q_len
  int32_t row_begin;    // first packed row of the tile, counted within the row block
  int32_t num_rows;     // packed rows of the tile, 1..M
  int32_t partial_row;  // first row of the partial buffer; -1: the item writes the output itself
  int32_t unit;         // request item: its merge unit; node item: its NodeTile
  int32_t tile_class;   // index into the tile classes (M, KV tile)
  int32_t request;      // request item: index of the request; node item: ~node (negative)
  int32_t q_len;        // request item: query tokens of the request
  int32_t kv_len;       // request item: KV tokens of the request
};
static_assert(sizeof(WorkItem) == 64);

// Where the pieces of one (request tile, KV head) lie. Merge units are indexed densely:
// unit = requests[r].unit_base + kv_head * requests[r].num_tiles + tile.
struct MergeUnit {
  int32_t expected;     // arrivals (own splits and node items); 0: nothing to merge
  int32_t partial_row;  // first row of the request's own partial states
  int32_t num_splits;   // own splits; split s starts at partial_row + s * num_rows
  int32_t num_rows;     // packed rows of the tile
};

// Membership of a request in a node, with what a merge needs to know of the node.
struct alignas(16) NodeLink {
  int32_t node;
  int32_t row_offset;  // packed row, within the node, of the request's packed row 0
  int32_t tile_base;   // PlannedNode's
  int32_t tile_class;  //
};

struct PlannedRequest {
  int32_t unit_base;
  int32_t num_tiles;
  int32_t tile_class;
  int32_t qo_begin;
  int32_t q_len;
  int32_t kv_len;
  int32_t link_begin;   // nodes that this request is a member of: links[link_begin, link_end),
  int32_t link_end;     //   ascending by (level, KV start)
  NodeLink first_link;  // links[link_begin], so that a merge need not wait for it; or zeros
};

// A shared prefix: one row block whose query tokens are gathered from all members.
struct PlannedNode {
  int32_t tile_base;  // node tiles: tile_base + tile * num_kv_heads + kv_head
  int32_t num_tiles;
  int32_t tile_class;
  int32_t gather_begin;  // gathered tokens [gather_begin, gather_begin + num_tokens)
  int32_t num_tokens;
  int32_t table_row;
  int32_t kv_begin;
  int32_t kv_end;
};

// Where the partial states of one (node tile, KV head) lie.
struct NodeTile {
  int32_t partial_row;
  int32_t num_splits;  // split s starts at partial_row + s * num_rows
  int32_t num_rows;
  int32_t reserved;
};

// A query token of a node's row block.
struct GatheredToken {
  int32_t token;    // row of q / out / lse
  int32_t q_pos;    // its position in its own request
  int32_t request;  //
  int32_t local;    // its index within its request's query tokens
};

// First bytes of a plan.
struct PlanHeader {
  int64_t total_cost;        // in cost units (host/cost_model.h)
  int32_t num_items;         //
  int32_t num_units;         //
  int32_t num_partial_rows;  //
  int32_t num_requests;      //
  int32_t num_nodes;         //
  int32_t num_node_tiles;    //
  int32_t num_links;         //
  int32_t num_gathered;      // gathered query tokens
  int32_t status;            // PlanStatus bits
  int32_t reserved[5];
};
static_assert(sizeof(PlanHeader) == 64);

// Bits of PlanHeader::status; lengths out of contract are clamped and reported here.
enum PlanStatus : int32_t {
  kPlanOk = 0,
  kPlanTooManyRequests = 1,
  kPlanTooManyTokens = 2,
  kPlanKvTooLong = 4,
  kPlanBadIndptr = 8,
  kPlanNodesDeclined = 16,  // sharing that would not fit was left out
};

}  // namespace fi
