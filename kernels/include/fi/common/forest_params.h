// Arguments of the kernel that finds a step's prefix forest, and the scratch memory of the CTA that
// builds it. Host code fills and sizes them: no device functions here.
#pragma once

#include "fi/plan/forest.h"

namespace fi {

namespace forest {

// Where a request leaves the tree of those before it: it holds the pages of `creator`, the lowest
// request that does, in its first `steps` steps.
struct alignas(8) Branch {
  int32_t creator;
  int32_t steps;
};

// A node of the tree is named by the branch that ends it.
struct TreeNode {
  int32_t steps;  // where it ends
  int32_t above;  // the one that ends where this begins; -1: none; see Builder::kAtCreator
  int32_t members;
  int32_t tokens;  // query tokens of the members
  int32_t number;  // in the forest; -1: left out
  int32_t creator;
};

// A tree of R requests has fewer than R nodes.
struct Scratch {
  ForestHeader* header;
  int32_t* num_nodes;   // of the tree
  TreeNode* nodes;      // [max_requests], in the order of the forest
  uint64_t* keys;       // [max_requests] distinct branches, in any order
  Branch* branches;     // [max_requests]
  int32_t* names;       // [num_names] hash table of branches: a request's number, later a node's
  int32_t* name_of;     // [max_requests] place of each request's branch in it; -1: none
  int32_t* holders;     // [max_requests] one request for each key
  int32_t* last_node;   // [max_requests] a creator's last node; -1: none
  int32_t* q_len;       // [max_requests]
  int32_t* first_link;  // [max_requests]
  int32_t* level;       // [max_requests] of each node of the forest
  int16_t* chain;       // [kMaxForestLevels][max_requests] nodes of each request; -1: none
};

struct ScratchLayout {
  int64_t header, num_nodes, nodes, keys, branches, names, name_of, holders, last_node, q_len;
  int64_t first_link, level, chain;
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
  layout.header = place(1, sizeof(ForestHeader));
  layout.num_nodes = place(1, sizeof(int32_t));
  layout.nodes = place(max_requests, sizeof(TreeNode));
  layout.keys = place(max_requests, sizeof(uint64_t));
  layout.branches = place(max_requests, sizeof(Branch));
  layout.names = place(num_names, sizeof(int32_t));
  layout.name_of = place(max_requests, sizeof(int32_t));
  layout.holders = place(max_requests, sizeof(int32_t));
  layout.last_node = place(max_requests, sizeof(int32_t));
  layout.q_len = place(max_requests, sizeof(int32_t));
  layout.first_link = place(max_requests, sizeof(int32_t));
  layout.level = place(max_requests, sizeof(int32_t));
  layout.chain = place(int64_t{kMaxForestLevels} * max_requests, sizeof(int16_t));
  layout.total_bytes = at;
  return layout;
}

FI_HOST_DEVICE inline Scratch scratch_at(const ScratchLayout& layout, char* base) {
  Scratch s;
  s.header = reinterpret_cast<ForestHeader*>(base + layout.header);
  s.num_nodes = reinterpret_cast<int32_t*>(base + layout.num_nodes);
  s.nodes = reinterpret_cast<TreeNode*>(base + layout.nodes);
  s.keys = reinterpret_cast<uint64_t*>(base + layout.keys);
  s.branches = reinterpret_cast<Branch*>(base + layout.branches);
  s.names = reinterpret_cast<int32_t*>(base + layout.names);
  s.name_of = reinterpret_cast<int32_t*>(base + layout.name_of);
  s.holders = reinterpret_cast<int32_t*>(base + layout.holders);
  s.last_node = reinterpret_cast<int32_t*>(base + layout.last_node);
  s.q_len = reinterpret_cast<int32_t*>(base + layout.q_len);
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
  void* scratch;             // where shared memory does not hold it
  forest::Branch* branches;  // [max_requests] from the CTAs that compare to the one that builds
  int32_t* arrivals;         // [1] CTAs that have compared; zero between launches
  void* forest;              // layout.total_bytes, 16-byte aligned
  int64_t* totals;           // [2] kv_tokens and saved_kv_tokens are added; null: not wanted
};

}  // namespace fi
