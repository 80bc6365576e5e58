// The prefix forest of a step on the device: the bytes of host/prefix_forest.cc.
//
// A CTA for each request finds where it leaves the prefix tree of those before it:
//   Search   the longest match among the rows before, by whole comparisons of page ids
// The last CTA to finish builds the forest from what all have found:
//   Builder  branches -> nodes in order -> members -> the nodes that pay -> links of requests
// Nothing is hashed but the names of nodes: a typical request is compared with one or two rows,
// each read once by all threads of its CTA. Block is the CTA as the passes see it: CudaBlock of
// forest_block.h, or threads of a CPU.
#pragma once

#include "fi/common/forest_params.h"
#include "fi/common/planner_parts.h"

namespace fi::forest {

using planner::count_bits;
using planner::store_16;

// Atomics of one CTA; on a CPU its threads take turns.
FI_HOST_DEVICE inline void add_to(int32_t* sum, int32_t value) {
#if defined(__CUDA_ARCH__)
  atomicAdd(sum, value);
#else
  *sum += value;
#endif
}

FI_HOST_DEVICE inline int32_t swap_if_equal(int32_t* place, int32_t expected, int32_t value) {
#if defined(__CUDA_ARCH__)
  return atomicCAS(place, expected, value);
#else
  const int32_t found = *place;
  if (found == expected) *place = value;
  return found;
#endif
}

// A word that other threads write meanwhile.
FI_HOST_DEVICE inline int32_t load_now(const int32_t* place) {
  return *static_cast<const volatile int32_t*>(place);
}

// Reads of the step that both parts need.
class Step {
 public:
  FI_HOST_DEVICE explicit Step(const ForestKernelParams& params) : p(params) {}

  FI_HOST_DEVICE int32_t q_len(int32_t r) const { return p.qo_indptr[r + 1] - p.qo_indptr[r]; }

  FI_HOST_DEVICE int64_t kv_len(int32_t r) const {
    return p.kv_len_is_int64 ? static_cast<const int64_t*>(p.kv_len)[r]
                             : static_cast<const int32_t*>(p.kv_len)[r];
  }

  // Within capacity.
  FI_HOST_DEVICE int32_t clamped_kv_len(int32_t r) const {
    const int64_t length = kv_len(r);
    return length < 0 ? 0
                      : static_cast<int32_t>(
                            length < p.capacity.max_kv_len ? length : p.capacity.max_kv_len);
  }

  // Steps of its row that request r may share.
  FI_HOST_DEVICE int32_t steps(int32_t r) const {
    return shareable_steps(q_len(r), kv_len(r), p.capacity.max_kv_len, p.step_tokens);
  }

 private:
  const ForestKernelParams& p;
};

// Finds the branch of request `r`.
template <class Block>
class Search {
 public:
  FI_HOST_DEVICE Search(const ForestKernelParams& params, Block& block, int32_t r)
      : p(params), step_(params), block_(block), r_(r), row_(page_row(params.table, r)) {}

  FI_HOST_DEVICE Branch find() {
    const int32_t most = step_.steps(r_);
    Branch best{-1, 0};
    int32_t other = -1;
    FI_ROLLED for (int32_t n = 0; n < kMaxComparisons && best.steps < most; ++n) {
      other = next_candidate(other + 1, best.steps);
      if (other >= r_) break;
      const int32_t steps = common_steps(other, min_i32(most, step_.steps(other)));
      if (steps > best.steps) best = {other, steps};
    }
    return best;
  }

 private:
  FI_HOST_DEVICE int32_t entry(const int32_t* row, int32_t page) const {
    return row[page * p.table.entry_stride];
  }

  // The lowest request from `first` on that has the page at the end of the next step; r_ if none
  // before it does.
  FI_HOST_DEVICE int32_t next_candidate(int32_t first, int32_t steps) {
    const int32_t probe = (steps + 1) * p.step_pages - 1, wanted = entry(row_, probe);
    FI_ROLLED for (int32_t begin = first; begin < r_; begin += kBatch * block_.num_threads()) {
      int32_t found = r_;
      for (int32_t i = kBatch - 1; i >= 0; --i) {
        const int32_t other = begin + i * block_.num_threads() + block_.thread();
        if (other >= r_ || step_.steps(other) <= steps) continue;
        if (entry(page_row(p.table, other), probe) == wanted) found = other;
      }
      found = block_.min(found);
      if (found < r_) return found;
    }
    return r_;
  }

  // Steps, of at most `most`, in which the other row holds the same pages.
  FI_HOST_DEVICE int32_t common_steps(int32_t other, int32_t most) {
    const int32_t* row = page_row(p.table, other);
    const int32_t end = most * p.step_pages, round = kBatch * block_.num_threads();
    FI_ROLLED for (int32_t begin = 0; begin < end; begin += round) {
      int32_t mine[kBatch], theirs[kBatch], first = end;
      for (int32_t i = 0; i < kBatch; ++i) {
        const int32_t page = begin + i * block_.num_threads() + block_.thread();
        mine[i] = theirs[i] = 0;
        if (page >= end) continue;
        mine[i] = entry(row_, page);
        theirs[i] = entry(row, page);
      }
      for (int32_t i = kBatch - 1; i >= 0; --i) {
        if (mine[i] != theirs[i]) first = begin + i * block_.num_threads() + block_.thread();
      }
      first = block_.min(first);
      if (first < end) return first / p.step_pages;
    }
    return most;
  }

  // Loads of a thread that are under way together.
  static constexpr int32_t kBatch = 4;

  const ForestKernelParams& p;
  const Step step_;
  Block& block_;
  const int32_t r_;
  const int32_t* row_;
};

// What is summed over nodes or requests.
struct Counts {
  static constexpr bool kIsWords = false;
  int32_t nodes = 0;
  int32_t links = 0;
  int32_t tokens = 0;
  int32_t kv_tokens = 0;

  template <class Map>
  FI_HOST_DEVICE Counts mapped(const Map& map) const {
    return {map(nodes), map(links), map(tokens), map(kv_tokens)};
  }
  FI_HOST_DEVICE void operator+=(const Counts& other) {
    nodes += other.nodes;
    links += other.links;
    tokens += other.tokens;
    kv_tokens += other.kv_tokens;
  }
};

// Builds the forest from the branches of all requests, in one CTA.
template <class Block>
class Builder {
 public:
  FI_HOST_DEVICE Builder(const ForestKernelParams& params, const Scratch& scratch, Block& block)
      : p(params), s(scratch), step_(params), block_(block) {}

  FI_HOST_DEVICE void run() {
    read_branches();
    if (num_branches_ == 0) {
      write_empty();
      return;
    }
    name_nodes();
    order_nodes();
    connect_nodes();
    count_members();
    choose_nodes();
    write_requests();
    write_links();
  }

 private:
  // Loops over requests, nodes or names, a thread for each.
  template <class Body>
  FI_HOST_DEVICE void for_each(int32_t count, const Body& body) const {
    FI_ROLLED for (int32_t i = block_.thread(); i < count; i += block_.num_threads()) body(i);
  }

  // The same in rounds that all threads join; bodies are called with exists = false past the end.
  template <class Body>
  FI_HOST_DEVICE void for_each_round(int32_t count, const Body& body) const {
    FI_ROLLED for (int32_t first = 0; first < count; first += block_.num_threads()) {
      body(first + block_.thread(), first + block_.thread() < count);
    }
  }

  FI_HOST_DEVICE void read_branches() {
    Counts own, total;
    for_each(p.num_requests, [&](int32_t r) {
      const Branch branch = block_.load(p.branches + r);
      s.branches[r] = branch;
      s.q_len[r] = step_.q_len(r);
      s.last_node[r] = -1;
      own += {branch.steps > 0, 0, 0, step_.clamped_kv_len(r)};
    });
    for_each(p.num_names, [&](int32_t i) { s.names[i] = -1; });
    block_.scan(own, &total);
    num_branches_ = total.nodes;
    kv_tokens_ = total.kv_tokens;
  }

  // `all`: of the nodes; their KV tokens are those that are saved.
  FI_HOST_DEVICE void write_header(const Counts& all, int32_t status) const {
    if (block_.thread() != 0) return;
    int32_t* to = static_cast<int32_t*>(p.forest);
    store_16(to, all.nodes, all.links, all.tokens, status);
    store_16(to + 4, kv_tokens_, all.kv_tokens, 0, 0);
    if (!p.totals) return;
    // Plans of a stream follow one another: nobody else writes here meanwhile.
    volatile int64_t* totals = p.totals;
    totals[0] = totals[0] + kv_tokens_;
    totals[1] = totals[1] + all.kv_tokens;
  }

  FI_HOST_DEVICE void write_empty() {
    write_header({}, kPlanOk);
    for_each(p.num_requests, [&](int32_t r) { store_16(requests() + r, 0, 0, 0, 0); });
  }

  FI_HOST_DEVICE static bool is_same(const Branch& a, const Branch& b) {
    return a.creator == b.creator && a.steps == b.steps;
  }

  FI_HOST_DEVICE static bool is_before(const Branch& a, const Branch& b) {
    return a.creator < b.creator || (a.creator == b.creator && a.steps < b.steps);
  }

  // Where a branch's place in `names` is looked for first.
  FI_HOST_DEVICE int32_t first_name(const Branch& branch) const {
    const uint32_t mixed = static_cast<uint32_t>(branch.creator) * 0x9e3779b1u ^
                           static_cast<uint32_t>(branch.steps) * 0x85ebca6bu;
    return static_cast<int32_t>(mixed >> 7) & (p.num_names - 1);
  }

  // Each distinct branch a place in `names`, held by one of its requests.
  FI_HOST_DEVICE void name_nodes() {
    block_.sync();
    for_each(p.num_requests, [&](int32_t r) {
      const Branch branch = s.branches[r];
      int32_t at = -1;
      if (branch.steps > 0) {
        at = first_name(branch);
        while (true) {
          // Most find the place taken by one of theirs: a look before the atomic.
          int32_t holder = load_now(s.names + at);
          if (holder < 0) holder = swap_if_equal(s.names + at, -1, r);
          if (holder < 0 || is_same(s.branches[holder], branch)) break;
          at = (at + 1) & (p.num_names - 1);
        }
      }
      s.name_of[r] = at;
    });
    block_.sync();
  }

  // Nodes in order: each holder counts those before its own.
  FI_HOST_DEVICE void order_nodes() {
    Counts sums;
    for_each_round(p.num_requests, [&](int32_t r, bool exists) {
      const bool holds = exists && s.name_of[r] >= 0 && s.names[s.name_of[r]] == r;
      Counts total, before = block_.scan(Counts{holds, 0, 0, 0}, &total);
      if (holds) s.holders[sums.nodes + before.nodes] = r;
      sums += total;
    });
    num_nodes_ = sums.nodes;
    block_.sync();
    for_each(num_nodes_, [&](int32_t i) {
      const int32_t holder = s.holders[i];
      const Branch own = s.branches[holder];
      int32_t rank = 0;
      FI_ROLLED for (int32_t j = 0; j < num_nodes_; ++j) {
        rank += is_before(s.branches[s.holders[j]], own);
      }
      s.nodes[rank] = {own, -1, -1, 0, 0, -1};
      s.names[s.name_of[holder]] = rank;
    });
    block_.sync();
  }

  FI_HOST_DEVICE int32_t node_of(int32_t r) const {
    return s.name_of[r] < 0 ? -1 : s.names[s.name_of[r]];
  }

  FI_HOST_DEVICE void connect_nodes() {
    for_each(num_nodes_, [&](int32_t n) {
      const int32_t creator = s.nodes[n].end.creator;
      const bool continues = n > 0 && s.nodes[n - 1].end.creator == creator;
      s.nodes[n].above = continues ? n - 1 : node_of(creator);
      if (n + 1 == num_nodes_ || s.nodes[n + 1].end.creator != creator) s.last_node[creator] = n;
    });
    block_.sync();
    for_each(p.num_requests, [&](int32_t r) {
      if (s.last_node[r] < 0) s.last_node[r] = node_of(r);
    });
  }

  FI_HOST_DEVICE void count_members() {
    // Each request's own pass over what it just wrote: no barrier.
    for_each(p.num_requests, [&](int32_t r) {
      FI_ROLLED for (int32_t n = s.last_node[r]; n >= 0; n = s.nodes[n].above) {
        add_to(&s.nodes[n].members, 1);
        add_to(&s.nodes[n].tokens, s.q_len[r]);
      }
    });
    block_.sync();
  }

  FI_HOST_DEVICE bool pays(int32_t n) const {
    const TreeNode& node = s.nodes[n];
    const int32_t begin = node.above < 0 ? 0 : s.nodes[node.above].end.steps;
    return node_pays(node.members, (node.end.steps - begin) * p.step_tokens.value);
  }

  // Numbers the nodes that pay, until one does not fit, and writes them.
  FI_HOST_DEVICE void choose_nodes() {
    for_each(num_nodes_, [&](int32_t n) {
      int32_t level = 0, parent = -1;
      FI_ROLLED for (int32_t a = s.nodes[n].above; a >= 0; a = s.nodes[a].above) {
        if (!pays(a)) continue;
        if (parent < 0) parent = a;
        level += 1;
      }
      s.nodes[n].parent = parent;
      s.nodes[n].number = pays(n) && level < kMaxForestLevels ? 0 : -1;
    });
    Counts sums, chosen;
    int32_t bits = kPlanOk;
    const PlanCapacity& cap = p.capacity;
    for_each_round(num_nodes_, [&](int32_t n, bool exists) {
      const bool counts = exists && s.nodes[n].number == 0;
      Counts own, total;
      if (counts) own = {1, s.nodes[n].members, s.nodes[n].tokens, 0};
      Counts before = block_.scan(own, &total);
      before += sums;
      sums += total;
      Counts through = before;
      through += own;
      if (!counts) return;
      if (through.nodes <= cap.max_nodes && through.links <= cap.max_links &&
          through.tokens <= cap.max_shared_tokens) {
        s.nodes[n].number = before.nodes;
        own.kv_tokens = write_node(n, before);
        chosen += own;
      } else {
        s.nodes[n].number = -1;
        bits = kPlanNodesDeclined;
      }
    });
    Counts all;
    block_.scan(chosen, &all, &bits);  // and a barrier: numbers are complete
    num_chosen_ = all.nodes;
    write_header(all, bits);
    for_each(num_nodes_, [&](int32_t n) {
      const int32_t number = s.nodes[n].number, parent = s.nodes[n].parent;
      if (number >= 0) nodes()[number].parent = parent < 0 ? -1 : s.nodes[parent].number;
    });
  }

  // Returns the KV tokens that the node saves.
  FI_HOST_DEVICE int32_t write_node(int32_t n, const Counts& before) {
    const TreeNode& node = s.nodes[n];
    const int32_t parent_steps = node.parent < 0 ? 0 : s.nodes[node.parent].end.steps;
    const int32_t begin = parent_steps * p.step_tokens.value;
    const int32_t end = node.end.steps * p.step_tokens.value;
    int32_t* to = reinterpret_cast<int32_t*>(nodes() + before.nodes);
    store_16(to, node.end.creator, begin, end, node.members);
    to[4] = node.tokens;
    to[5] = before.tokens;
    to[7] = 0;
    return (node.members - 1) * (end - begin);
  }

  FI_HOST_DEVICE int16_t& chain(int32_t level, int32_t r) const {
    return s.chain[level * p.capacity.max_requests + r];
  }

  FI_HOST_DEVICE void write_requests() {
    for_each(num_chosen_, [&](int32_t n) { s.offset[n] = 0; });
    Counts sums;
    for_each_round(p.num_requests, [&](int32_t r, bool exists) {
      int32_t count = 0, own_begin = 0;
      if (exists) {
        FI_ROLLED for (int32_t n = s.last_node[r]; n >= 0; n = s.nodes[n].above) {
          if (s.nodes[n].number < 0) continue;
          if (count == 0) own_begin = s.nodes[n].end.steps * p.step_tokens.value;
          count += 1;
        }
      }
      Counts total;
      const int32_t first = sums.links + block_.scan(Counts{0, count, 0, 0}, &total).links;
      sums += total;
      if (!exists) return;
      store_16(requests() + r, first, count, own_begin, 0);
      s.first_link[r] = first;
      int32_t level = count;
      FI_ROLLED for (int32_t n = s.last_node[r]; n >= 0; n = s.nodes[n].above) {
        if (s.nodes[n].number >= 0) chain(--level, r) = static_cast<int16_t>(s.nodes[n].number);
      }
      FI_ROLLED for (level = count; level < kMaxForestLevels; ++level) chain(level, r) = -1;
    });
    block_.sync();
  }

  // Links with the query tokens of lower members. Members of a node meet it at the same level: a
  // warp for each level walks the requests.
  FI_HOST_DEVICE void write_links() {
    const int32_t num_warps = block_.num_threads() / block_.num_lanes();
    FI_ROLLED for (int32_t level = block_.warp(); level < kMaxForestLevels; level += num_warps) {
      FI_ROLLED for (int32_t first = 0; first < p.num_requests; first += block_.num_lanes()) {
        const int32_t r = first + block_.lane();
        const int32_t node = r < p.num_requests ? chain(level, r) : -1;
        if (block_.ballot(node >= 0) == 0) continue;
        const uint32_t same = block_.match(node), before = same & ((1u << block_.lane()) - 1);
        const int32_t q_len = node < 0 ? 0 : s.q_len[r], offset = node < 0 ? 0 : s.offset[node];
        int32_t tokens = 0, all = 0;
        FI_ROLLED for (int32_t bit = 0; (1 << bit) <= kMaxMemberTokens; ++bit) {
          const uint32_t set = block_.ballot((q_len >> bit & 1) != 0);
          tokens += count_bits(set & before) << bit;
          all += count_bits(set & same) << bit;
        }
        if (node >= 0) {
          ForestLink* to = links() + s.first_link[r] + level;
          to->node = node;
          to->token_offset = offset + tokens;
          if (before == 0) s.offset[node] = offset + all;
        }
        block_.sync_warp();
      }
    }
  }

  FI_HOST_DEVICE ForestNode* nodes() const { return at<ForestNode>(p.layout.nodes); }
  FI_HOST_DEVICE ForestRequest* requests() const { return at<ForestRequest>(p.layout.requests); }
  FI_HOST_DEVICE ForestLink* links() const { return at<ForestLink>(p.layout.links); }

  template <class T>
  FI_HOST_DEVICE T* at(int64_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(p.forest) + offset);
  }

  const ForestKernelParams& p;
  const Scratch& s;
  const Step step_;
  Block& block_;
  int32_t num_branches_ = 0;
  int32_t kv_tokens_ = 0;   // of the requests
  int32_t num_nodes_ = 0;   // of the tree
  int32_t num_chosen_ = 0;  // of the forest
};

}  // namespace fi::forest
