// Arguments of the kernel that finds a step's prefix forest, and the scratch memory of the CTA that
// builds it. Host code fills and sizes them: no device functions here.
#pragma once

#include "fi/plan/forest.h"

namespace fi {

namespace forest {

// Where a request leaves the tree of those before it: it holds the pages of `creator`, the lowest
// request that does, in its first `steps` steps.
struct Branch {
  int32_t creator;
  int32_t steps;
};

// A branch as one word, which CTAs hand over; never 0.
FI_HOST_DEVICE inline uint64_t word_of(const Branch& branch) {
  return static_cast<uint64_t>(static_cast<uint32_t>(branch.creator + 2)) << 32 |
         static_cast<uint32_t>(branch.steps);
}
FI_HOST_DEVICE inline Branch branch_of(uint64_t word) {
  return {static_cast<int32_t>(word >> 32) - 2, static_cast<int32_t>(word)};
}

// A node of the tree is named by the branch that ends it.
struct TreeNode {
  int32_t steps;  // where it ends
  int32_t above;  // the one that ends where this begins; -1: none; see ManyNodes::kAtCreator
  int32_t members;
  int32_t tokens;  // query tokens of the members
  int32_t number;  // in the forest; -1: left out
  int32_t creator;
};

// A tree of R requests has fewer than R nodes. Keys are branches as numbers (key_of()); a group is
// as many requests as a warp has lanes, and its arrays have whole groups.
struct Scratch {
  int32_t* num_nodes;  // of the tree; then the KV tokens of all requests
  uint64_t* names;     // [num_names] hash table of keys; 0: free
  uint64_t* keys;      // [max_requests] distinct keys, in any order
  int32_t* holders;    // [max_requests] place of each of them in `names`
  uint64_t* keys_of;   // [max_requests] of requests; 0: shares nothing
  int32_t* name_of;    // [max_requests] its place in `names`; -1: none
  int32_t* q_len;      // [max_requests]
  // FewNodes; where the arrays of ManyNodes lie.
  uint32_t* nodes_of;  // [groups][lanes] of each request, a bit for each node
  uint32_t* members;   // [groups][lanes] of each node in the group, a bit for each request
  int32_t* tokens;     // [groups][lanes] their query tokens
  // ManyNodes:
  ForestHeader* header;
  TreeNode* nodes;        // [max_requests], in the order of the forest
  int32_t* node_of_name;  // [num_names], in the place of `names`
  int32_t* last_node;     // [max_requests] a creator's last node; -1: none
  int32_t* first_link;    // [max_requests]
  int32_t* level;         // [max_requests] of each node of the forest
  int16_t* chain;         // [kMaxForestLevels][max_requests] nodes of each request; -1: none
};

struct ScratchLayout {
  int64_t num_nodes, names, keys, holders, keys_of, name_of, q_len;
  int64_t nodes_of, members, tokens;
  int64_t header, nodes, last_node, first_link, level, chain;
  int64_t total_bytes;
};

FI_HOST_DEVICE inline ScratchLayout make_scratch_layout(int32_t max_requests, int32_t num_names) {
  ScratchLayout layout{};
  int64_t at = 0;
  const auto place = [&at](int64_t count, int64_t size) {
    const int64_t offset = at;
    at += (count * size + 15) / 16 * 16;
    return offset;
  };
  layout.num_nodes = place(2, sizeof(int32_t));
  layout.names = place(num_names, sizeof(uint64_t));
  layout.keys = place(max_requests, sizeof(uint64_t));
  layout.holders = place(max_requests, sizeof(int32_t));
  layout.keys_of = place(max_requests, sizeof(uint64_t));
  layout.name_of = place(max_requests, sizeof(int32_t));
  layout.q_len = place(max_requests, sizeof(int32_t));
  const int64_t common = at;
  constexpr int64_t kMostLanes = 32;
  const int64_t in_groups = (max_requests + kMostLanes - 1) / kMostLanes * kMostLanes;
  layout.nodes_of = place(in_groups, sizeof(uint32_t));
  layout.members = place(in_groups, sizeof(uint32_t));
  layout.tokens = place(in_groups, sizeof(int32_t));
  const int64_t end_of_few = at;
  at = common;
  layout.header = place(1, sizeof(ForestHeader));
  layout.nodes = place(max_requests, sizeof(TreeNode));
  layout.last_node = place(max_requests, sizeof(int32_t));
  layout.first_link = place(max_requests, sizeof(int32_t));
  layout.level = place(max_requests, sizeof(int32_t));
  layout.chain = place(int64_t{kMaxForestLevels} * max_requests, sizeof(int16_t));
  layout.total_bytes = at > end_of_few ? at : end_of_few;
  return layout;
}

FI_HOST_DEVICE inline Scratch scratch_at(const ScratchLayout& layout, char* base) {
  Scratch s;
  s.num_nodes = reinterpret_cast<int32_t*>(base + layout.num_nodes);
  s.names = reinterpret_cast<uint64_t*>(base + layout.names);
  s.keys = reinterpret_cast<uint64_t*>(base + layout.keys);
  s.holders = reinterpret_cast<int32_t*>(base + layout.holders);
  s.keys_of = reinterpret_cast<uint64_t*>(base + layout.keys_of);
  s.name_of = reinterpret_cast<int32_t*>(base + layout.name_of);
  s.q_len = reinterpret_cast<int32_t*>(base + layout.q_len);
  s.nodes_of = reinterpret_cast<uint32_t*>(base + layout.nodes_of);
  s.members = reinterpret_cast<uint32_t*>(base + layout.members);
  s.tokens = reinterpret_cast<int32_t*>(base + layout.tokens);
  s.header = reinterpret_cast<ForestHeader*>(base + layout.header);
  s.nodes = reinterpret_cast<TreeNode*>(base + layout.nodes);
  s.node_of_name = reinterpret_cast<int32_t*>(base + layout.names);
  s.last_node = reinterpret_cast<int32_t*>(base + layout.last_node);
  s.first_link = reinterpret_cast<int32_t*>(base + layout.first_link);
  s.level = reinterpret_cast<int32_t*>(base + layout.level);
  s.chain = reinterpret_cast<int16_t*>(base + layout.chain);
  return s;
}

}  // namespace forest

struct ForestKernelParams {
  // The step.
  const int32_t* qo_indptr;  // [num_requests + 1] tokens
  const void* kv_len;        // [num_requests] tokens, new ones included
  PageTableView table;
  int32_t num_requests;
  int32_t kv_len_is_int64;
  int32_t step_pages;
  Divisor step_tokens;
  // Constant for a capacity.
  PlanCapacity capacity;
  int32_t num_names;  // a power of two, at least twice max_requests
  ForestLayout layout;
  forest::ScratchLayout scratch_layout;
  void* scratch;  // where shared memory does not hold it
  // [max_requests] from the CTAs that compare to the one that builds; zero between launches.
  uint64_t* branches;
  void* forest;     // layout.total_bytes, 16-byte aligned
  int64_t* totals;  // [2] kv_tokens and saved_kv_tokens are added; null: not wanted
};

}  // namespace fi
