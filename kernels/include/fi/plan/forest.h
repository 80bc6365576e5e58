// The prefix forest of a step: KV ranges that several requests share, found in their page tables.
//
// A prefix tree of page ids. A node is a range of positions in which the tables of its members hold
// the same pages, and all pages before it are the same too:
//
//     requests 0 to 3 share [0, 2048), 0 and 2 go on together to 3072      tokens
//     0   ├─ node 0 ──────────┼─ node 1 ───┤ own
//     1   ├───────────────────┤ own
//     2   ├───────────────────┼────────────┤ own
//     3   ├───────────────────┤ own
//
// Nodes are whole pages and whole checkpoints, and end where a member's query tokens begin at the
// latest: every query token of a member sees all of a node, unless a window hides it.
#pragma once

#include "fi/attention/page_table.h"
#include "fi/plan/divide.h"
#include "fi/plan/layout.h"

namespace fi {

// Tables are compared in steps of at least this many tokens.
constexpr int32_t kCheckpointTokens = 64;
// A longer chain of nodes is cut off: what follows is read by each request.
constexpr int32_t kMaxForestLevels = 8;
// Query tokens of a member, at most: the rows of more fill tiles of their own, and a chunk of a
// prefill is bound by its products, which sharing does not save.
constexpr int32_t kMaxMemberTokens = 64;

struct alignas(16) ForestHeader {
  int32_t num_nodes;
  int32_t num_links;        // memberships, summed over nodes
  int32_t num_tokens;       // query tokens, summed over nodes
  int32_t status;           // kPlanNodesDeclined: nodes that did not fit the capacity were left out
  int32_t kv_tokens;        // of the requests, each with all of its own
  int32_t saved_kv_tokens;  // of those, what need not be read because another member does
  int32_t reserved[2];
};

// Nodes ascend by (creator, end), where the creator is the lowest member: every node follows those
// that it continues.
struct alignas(16) ForestNode {
  int32_t table_row;  // the creator's: its lowest member
  int32_t kv_begin;
  int32_t kv_end;
  int32_t num_members;
  int32_t num_tokens;   // query tokens of the members
  int32_t token_begin;  // query tokens of the nodes before
  int32_t parent;       // the node that ends at kv_begin; -1: none
  int32_t reserved;
};

// What a request shares: links [link_begin, link_begin + num_links), and from own_begin on nothing.
struct alignas(16) ForestRequest {
  int32_t link_begin;
  int32_t num_links;
  int32_t own_begin;
  int32_t reserved;
};

// Membership of a request in a node, ascending by node.
struct ForestLink {
  int32_t node;
  int32_t token_offset;  // query tokens of the node's lower members
};

// Byte offsets of the forest's arrays from its start; it begins with the header.
struct ForestLayout {
  int64_t nodes;        // ForestNode[max_nodes]
  int64_t requests;     // ForestRequest[max_requests]
  int64_t links;        // ForestLink[max_links]
  int64_t total_bytes;  //
};

FI_HOST_DEVICE inline ForestLayout make_forest_layout(const PlanCapacity& capacity) {
  ForestLayout layout{};
  layout.nodes = 64;
  layout.requests = layout.nodes + int64_t{capacity.max_nodes} * 32;
  layout.links = layout.requests + int64_t{capacity.max_requests} * 16;
  layout.total_bytes = layout.links + (int64_t{capacity.max_links} * 8 + 15) / 16 * 16;
  return layout;
}

struct ForestView {
  const ForestHeader* header;
  const ForestNode* nodes;
  const ForestRequest* requests;
  const ForestLink* links;
};

FI_HOST_DEVICE inline ForestView view_forest(const void* forest, const ForestLayout& layout) {
  const char* base = static_cast<const char*>(forest);
  return {reinterpret_cast<const ForestHeader*>(base),
          reinterpret_cast<const ForestNode*>(base + layout.nodes),
          reinterpret_cast<const ForestRequest*>(base + layout.requests),
          reinterpret_cast<const ForestLink*>(base + layout.links)};
}

// Pages of a step of the comparison.
FI_HOST_DEVICE inline int32_t pages_per_step(int32_t page_size) {
  return page_size >= kCheckpointTokens ? 1 : (kCheckpointTokens + page_size - 1) / page_size;
}

// Rows that a request compares with its own before it settles for the longest match so far. A tree
// of kMaxForestLevels levels takes that many; more are looked at only where equal pages stand at
// equal positions behind different ones.
constexpr int32_t kMaxComparisons = 32;

// Steps of its own row that a request may share: none for one that is no member.
FI_HOST_DEVICE inline int32_t shareable_steps(int32_t q_len, int64_t kv_len, int32_t max_kv_len,
                                              const Divisor& step_tokens) {
  if (q_len < 1 || q_len > kMaxMemberTokens || kv_len < q_len || kv_len > max_kv_len) return 0;
  return step_tokens.quotient(static_cast<int32_t>(kv_len) - q_len);
}

// Whether reading a node once is worth its item and the partial states of its members. In tokens of
// one KV head: an item costs about as much as 128 of them, a member's states as 32.
FI_HOST_DEVICE inline bool node_pays(int32_t num_members, int32_t num_kv_tokens) {
  return int64_t{num_members - 1} * num_kv_tokens >= 128 + int64_t{32} * num_members;
}

}  // namespace fi
