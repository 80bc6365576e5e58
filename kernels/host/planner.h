// The planner: a step's requests and shared prefixes -> work items for a fixed number of CTAs.
// Integers only, 64-bit sums, ties by index, so that the device planner gives the same bytes.
#pragma once

#include <string>
#include <vector>

#include "fi/plan/forest.h"
#include "fi/plan/row_tiles.h"

namespace fi::host {

struct PlanConfig {
  int32_t num_qo_heads;
  int32_t num_kv_heads;
  int32_t num_ctas;
  Band band;
  int32_t invariant_chunk;  // 0: off; else KV cuts lie at absolute multiples of this many tokens
  std::vector<TileClass> classes;  // ascending by rows, at most kMaxTileClasses
  PlanCapacity capacity;
};

// Lengths of a step. All arrays are borrowed.
struct StepLengths {
  int32_t num_requests;
  const int32_t* qo_indptr;  // [num_requests + 1] tokens
  const void* kv_len;        // [num_requests] tokens, new ones included
  bool kv_len_is_int64;
};

// Shared prefixes, ascending by (level, KV start). Node n covers KV [kv_begin[n], kv_end[n]) of
// table row table_row[n] for the requests members[member_ptr[n], member_ptr[n + 1]).
//   own_begin null: a prefix forest. A node is accepted if it fits the capacity and starts where
//     its members' accepted nodes end; a request's own part starts where its last accepted node
//     ends.
//   own_begin given: independent matrices. A request's own part starts at own_begin[r].
struct Nodes {
  int32_t num_nodes;
  const int32_t* table_row;
  const int32_t* kv_begin;
  const int32_t* kv_end;
  const int32_t* member_ptr;
  const int32_t* members;
  const int32_t* own_begin;
};

Tiling make_tiling(const PlanConfig& config);

PlanLayout make_layout(const PlanConfig& config);

// Fills `plan` (layout.total_bytes). Returns the PlanStatus bits that it also stores in the header.
int32_t make_plan(const PlanConfig& config, const PlanLayout& layout, const StepLengths& lengths,
                  const Nodes& nodes, void* plan);

// The same for the nodes of a prefix forest, which lies as make_forest_layout(config.capacity)
// says; null: none. It was made for these lengths, and is ignored where they are out of contract.
int32_t make_plan(const PlanConfig& config, const PlanLayout& layout, const StepLengths& lengths,
                  const void* forest, void* plan);

}  // namespace fi::host
