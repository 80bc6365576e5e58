#include "host/prefix_forest.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

namespace fi::host {
namespace {

// Where a request leaves the tree of those before it: it holds the pages of `creator`, the lowest
// request that does, in its first `steps` steps.
struct Branch {
  int32_t creator = -1;
  int32_t steps = 0;
};

// A node of the tree is named by where it ends: creator and step.
using Key = std::pair<int32_t, int32_t>;

struct TreeNode {
  const TreeNode* above = nullptr;  // the one that ends where this begins
  Key key;
  int32_t num_members = 0;
  int32_t num_tokens = 0;
  bool pays = false;
  const TreeNode* parent = nullptr;  // the next above that pays
  int32_t level = 0;
  int32_t number = -1;  // in the forest; -1: left out

  int32_t begin_step() const { return above ? above->key.second : 0; }
};

class ForestBuilder {
 public:
  ForestBuilder(const PlanCapacity& capacity, const StepLengths& lengths,
                const PageTableView& table, void* forest)
      : cap_(capacity),
        lengths_(lengths),
        table_(table),
        layout_(make_forest_layout(capacity)),
        forest_(static_cast<char*>(forest)),
        num_requests_(std::clamp(lengths.num_requests, 0, capacity.max_requests)),
        step_pages_(pages_per_step(table.page_size)),
        step_tokens_(make_divisor(step_pages_ * table.page_size)) {
    std::memset(forest_, 0, sizeof(ForestHeader));
  }

  void build() {
    for (int32_t r = 0; r < num_requests_; ++r) {
      steps_.push_back(own_steps(r));
      header().kv_tokens +=
          static_cast<int32_t>(std::clamp<int64_t>(kv_len(r), 0, cap_.max_kv_len));
    }
    for (int32_t r = 0; r < num_requests_; ++r) branches_.push_back(find_branch(r));
    grow_tree();
    count_members();
    choose_nodes();
    write_nodes();
    write_requests();
  }

 private:
  int32_t q_len(int32_t r) const { return lengths_.qo_indptr[r + 1] - lengths_.qo_indptr[r]; }

  int64_t kv_len(int32_t r) const {
    return lengths_.kv_len_is_int64 ? static_cast<const int64_t*>(lengths_.kv_len)[r]
                                    : static_cast<const int32_t*>(lengths_.kv_len)[r];
  }

  int32_t own_steps(int32_t r) const {
    return shareable_steps(q_len(r), kv_len(r), cap_.max_kv_len, step_tokens_);
  }

  int32_t entry(int32_t r, int32_t page) const {
    return page_row(table_, r)[page * table_.entry_stride];
  }

  // Steps at the beginning of both rows that hold the same pages.
  int32_t common_steps(int32_t a, int32_t b) const {
    const int32_t most = std::min(steps_[a], steps_[b]) * step_pages_;
    int32_t page = 0;
    while (page < most && entry(a, page) == entry(b, page)) ++page;
    return page / step_pages_;
  }

  // The longest match among the requests before r, the lowest of equal ones. What is worth a
  // comparison has the page at the end of the next step.
  Branch find_branch(int32_t r) const {
    Branch best;
    int32_t comparisons = 0;
    for (int32_t other = 0; other < r && best.steps < steps_[r]; ++other) {
      const int32_t probe = (best.steps + 1) * step_pages_ - 1;
      if (steps_[other] <= best.steps || entry(other, probe) != entry(r, probe)) continue;
      if (++comparisons > kMaxComparisons) break;
      const int32_t steps = common_steps(r, other);
      if (steps > best.steps) best = {other, steps};
    }
    return best;
  }

  // A map is in the order of the forest.
  void grow_tree() {
    for (const Branch& b : branches_) {
      if (b.steps > 0) tree_[{b.creator, b.steps}].key = {b.creator, b.steps};
    }
    for (auto it = tree_.begin(); it != tree_.end(); ++it) {
      TreeNode& node = it->second;
      const int32_t creator = node.key.first;
      if (it != tree_.begin() && std::prev(it)->first.first == creator) {
        node.above = &std::prev(it)->second;
      } else {
        node.above = node_of(branches_[creator]);
      }
      lowest_of_[creator] = &node;
    }
  }

  TreeNode* node_of(const Branch& b) {
    return b.steps > 0 ? &tree_.at({b.creator, b.steps}) : nullptr;
  }

  // The last node of a request, which all its others lie above.
  TreeNode* last_node(int32_t r) {
    const auto own = lowest_of_.find(r);
    return own != lowest_of_.end() ? own->second : node_of(branches_[r]);
  }

  void count_members() {
    for (int32_t r = 0; r < num_requests_; ++r) {
      for (const TreeNode* n = last_node(r); n; n = n->above) {
        TreeNode& node = tree_.at(n->key);
        node.num_members += 1;
        node.num_tokens += q_len(r);
      }
    }
  }

  // Nodes that pay, in order, until one does not fit. The members of one that does not pay read its
  // range with the node that follows, or by themselves.
  void choose_nodes() {
    ForestHeader& h = header();
    for (auto& [key, node] : tree_) {
      const int32_t steps = key.second - node.begin_step();
      node.pays = node_pays(node.num_members, steps * step_tokens_.value);
      node.parent = node.above && !node.above->pays ? node.above->parent : node.above;
      node.level = node.parent ? node.parent->level + 1 : 0;
      if (!node.pays || node.level >= kMaxForestLevels || h.status != kPlanOk) continue;
      if (h.num_nodes + 1 > cap_.max_nodes || h.num_links + node.num_members > cap_.max_links ||
          h.num_tokens + node.num_tokens > cap_.max_shared_tokens) {
        h.status = kPlanNodesDeclined;
        continue;
      }
      node.number = h.num_nodes++;
      h.num_links += node.num_members;
      h.num_tokens += node.num_tokens;
    }
  }

  void write_nodes() {
    auto* nodes = reinterpret_cast<ForestNode*>(forest_ + layout_.nodes);
    int32_t token_begin = 0;
    for (const auto& [key, node] : tree_) {
      if (node.number < 0) continue;
      const int32_t begin = node.parent ? node.parent->key.second : 0;
      nodes[node.number] = {key.first,
                            begin * step_tokens_.value,
                            key.second * step_tokens_.value,
                            node.num_members,
                            node.num_tokens,
                            token_begin,
                            node.parent ? node.parent->number : -1,
                            0};
      token_begin += node.num_tokens;
      header().saved_kv_tokens +=
          (node.num_members - 1) * (key.second - begin) * step_tokens_.value;
    }
  }

  void write_requests() {
    auto* requests = reinterpret_cast<ForestRequest*>(forest_ + layout_.requests);
    auto* links = reinterpret_cast<ForestLink*>(forest_ + layout_.links);
    std::vector<int32_t> tokens_of_node(header().num_nodes, 0);
    int32_t next_link = 0;
    for (int32_t r = 0; r < num_requests_; ++r) {
      std::vector<const TreeNode*> chain;
      for (const TreeNode* n = last_node(r); n; n = n->above) {
        if (n->number >= 0) chain.push_back(n);
      }
      requests[r] = {next_link, static_cast<int32_t>(chain.size()),
                     chain.empty() ? 0 : chain.front()->key.second * step_tokens_.value, 0};
      for (auto n = chain.rbegin(); n != chain.rend(); ++n) {
        int32_t& tokens = tokens_of_node[(*n)->number];
        links[next_link++] = {(*n)->number, tokens};
        tokens += q_len(r);
      }
    }
  }

  ForestHeader& header() { return *reinterpret_cast<ForestHeader*>(forest_); }

  const PlanCapacity& cap_;
  const StepLengths& lengths_;
  const PageTableView& table_;
  const ForestLayout layout_;
  char* forest_;
  const int32_t num_requests_;
  const int32_t step_pages_;
  const Divisor step_tokens_;
  std::vector<int32_t> steps_;  // per request: those it may share
  std::vector<Branch> branches_;
  std::map<Key, TreeNode> tree_;
  std::map<int32_t, TreeNode*> lowest_of_;  // creator -> its last node
};

}  // namespace

void find_forest(const PlanCapacity& capacity, const StepLengths& lengths,
                 const PageTableView& table, void* forest) {
  ForestBuilder(capacity, lengths, table, forest).build();
}

}  // namespace fi::host
