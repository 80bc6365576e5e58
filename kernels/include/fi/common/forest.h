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
using planner::highest_bit;
using planner::store_16;

// Atomics of one CTA; on a CPU its threads take turns.
FI_HOST_DEVICE inline int32_t add_to(int32_t* sum, int32_t value) {
#if defined(__CUDA_ARCH__)
  return atomicAdd(sum, value);
#else
  const int32_t before = *sum;
  *sum += value;
  return before;
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
    Branch best{-1, 0};
    Candidate other{-1, 0};
    int32_t wanted = early_probe(row_, 0);
    const int32_t most = step_.steps(r_);
    FI_ROLLED for (int32_t n = 0; n < kMaxComparisons && best.steps < most; ++n) {
      if (n > 0 || !reads_early(0)) wanted = entry(row_, probe(best.steps));
      other = next_candidate(other.request + 1, best.steps, wanted);
      if (other.request >= r_) break;
      const int32_t steps = common_steps(other.request, min_i32(most, other.steps));
      if (steps > best.steps) best = {other.request, steps};
    }
    return best;
  }

 private:
  // Loads of a thread that are under way together.
  static constexpr int32_t kBatch = 4;

  struct Candidate {
    int32_t request;
    int32_t steps;  // that it may share
  };

  FI_HOST_DEVICE int32_t entry(const int32_t* row, int32_t page) const {
    return row[page * p.table.entry_stride];
  }

  // The page at the end of the step that follows `steps` of them.
  FI_HOST_DEVICE int32_t probe(int32_t steps) const { return (steps + 1) * p.step_pages - 1; }

  // Whether that page of any row lies within the table: then it may be read, stale or not, while
  // lengths are on their way.
  FI_HOST_DEVICE bool reads_early(int32_t steps) const {
    return !p.table.indptr && probe(steps) * p.table.entry_stride < p.table.row_stride;
  }

  FI_HOST_DEVICE int32_t early_probe(const int32_t* row, int32_t steps) const {
    return reads_early(steps) ? entry(row, probe(steps)) : 0;
  }

  // The lowest request from `first` on whose page at the end of the next step is the wanted one; r_
  // if none before it does.
  FI_HOST_DEVICE Candidate next_candidate(int32_t first, int32_t steps, int32_t wanted) {
    FI_ROLLED for (int32_t begin = first; begin < r_; begin += block_.num_threads()) {
      const int32_t other = begin + block_.thread();
      int32_t found = r_;
      if (other < r_) {
        const int32_t* row = page_row(p.table, other);
        int32_t page = early_probe(row, steps);
        if (step_.steps(other) > steps) {
          if (!reads_early(steps)) page = entry(row, probe(steps));
          if (page == wanted) found = other;
        }
      }
      found = block_.min(found);
      if (found < r_) return {found, step_.steps(found)};
    }
    return {r_, 0};
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

  const ForestKernelParams& p;
  const Step step_;
  Block& block_;
  const int32_t r_;
  const int32_t* row_;
};

// What is summed over requests.
struct RequestSums {
  static constexpr bool kIsWords = false;
  int32_t links = 0;
  int32_t kv_tokens = 0;

  template <class Map>
  FI_HOST_DEVICE RequestSums mapped(const Map& map) const {
    return {map(links), map(kv_tokens)};
  }
  FI_HOST_DEVICE void operator+=(const RequestSums& other) {
    links += other.links;
    kv_tokens += other.kv_tokens;
  }
};

// Builds the forest from the branches of all requests, in one CTA. As in the planner the time is
// that of one thread's chain of instructions: few passes, and what few nodes need is left to a
// warp.
template <class Block>
class Builder {
 public:
  FI_HOST_DEVICE Builder(const ForestKernelParams& params, const Scratch& scratch, Block& block)
      : p(params), s(scratch), step_(params), block_(block) {}

  FI_HOST_DEVICE void run() {
    if (!read_branches()) {
      write_empty();
      return;
    }
    name_nodes();
    order_nodes();
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

  // False if no request shares anything. Clears what follows.
  FI_HOST_DEVICE bool read_branches() {
    bool shares = false;
    for_each(p.num_requests, [&](int32_t r) {
      const Branch branch = block_.load(p.branches + r);
      kv_tokens_ += step_.clamped_kv_len(r);
      s.branches[r] = branch;
      s.q_len[r] = step_.q_len(r);
      s.last_node[r] = -1;
      shares |= branch.steps > 0;
    });
    for_each(p.num_names, [&](int32_t i) { s.names[i] = -1; });
    if (block_.thread() == 0) *s.num_nodes = 0;
    return block_.any(shares);
  }

  FI_HOST_DEVICE void write_empty() {
    RequestSums sums, all;
    for_each(p.num_requests, [&](int32_t r) { store_16(requests() + r, 0, 0, 0, 0); });
    sums.kv_tokens = kv_tokens_;
    block_.scan(sums, &all);
    if (block_.thread() == 0) write_header({}, all.kv_tokens);
  }

  // A branch as a number, in the order of the forest.
  FI_HOST_DEVICE static uint64_t key_of(const Branch& branch) {
    return static_cast<uint64_t>(branch.creator) << 32 | static_cast<uint32_t>(branch.steps);
  }

  // Where a branch's place in `names` is looked for first.
  FI_HOST_DEVICE int32_t first_name(const Branch& branch) const {
    const uint32_t mixed = static_cast<uint32_t>(branch.creator) * 0x9e3779b1u ^
                           static_cast<uint32_t>(branch.steps) * 0x85ebca6bu;
    return static_cast<int32_t>(mixed >> 7) & (p.num_names - 1);
  }

  // Each distinct branch a place in `names`, held by one of its requests, and a place in `holders`
  // in any order.
  FI_HOST_DEVICE void name_nodes() {
    for_each(p.num_requests, [&](int32_t r) {
      const Branch branch = s.branches[r];
      int32_t at = -1;
      if (branch.steps > 0) {
        at = first_name(branch);
        while (true) {
          // Most find the place taken by one of theirs: a look before the atomic.
          int32_t holder = load_now(s.names + at);
          if (holder < 0) holder = swap_if_equal(s.names + at, -1, r);
          if (holder < 0) {
            const int32_t place = add_to(s.num_nodes, 1);
            s.holders[place] = r;
            s.keys[place] = key_of(branch);
          }
          if (holder < 0 || key_of(s.branches[holder]) == key_of(branch)) break;
          at = (at + 1) & (p.num_names - 1);
        }
      }
      s.name_of[r] = at;
    });
    block_.sync();
  }

  // Nodes in order: each counts those before its own. Below it on the same creator is its
  // neighbour.
  FI_HOST_DEVICE void order_nodes() {
    num_nodes_ = *s.num_nodes;
    for_each(num_nodes_, [&](int32_t i) {
      const uint64_t own = s.keys[i];
      const auto creator = static_cast<int32_t>(own >> 32);
      int32_t rank = 0;
      bool continues = false, is_last = true;
      for (int32_t j = 0; j < num_nodes_; ++j) {
        const uint64_t key = s.keys[j];
        const bool is_same = static_cast<int32_t>(key >> 32) == creator;
        rank += key < own;
        continues |= is_same && key < own;
        is_last &= !(is_same && key > own);
      }
      s.nodes[rank] = {static_cast<int32_t>(own),
                       continues ? rank - 1 : kAtCreator - creator,
                       0,
                       0,
                       -1,
                       creator};
      s.names[s.name_of[s.holders[i]]] = rank;
      if (is_last) s.last_node[creator] = rank;
    });
    block_.sync();
  }

  // TreeNode::above of a creator's first node: the node of the creator's own branch.
  static constexpr int32_t kAtCreator = -2;

  FI_HOST_DEVICE int32_t node_of(int32_t r) const {
    return s.name_of[r] < 0 ? -1 : s.names[s.name_of[r]];
  }

  FI_HOST_DEVICE int32_t above(int32_t n) const {
    const int32_t a = s.nodes[n].above;
    return a <= kAtCreator ? node_of(kAtCreator - a) : a;
  }

  // The node that all others of a request lie above.
  FI_HOST_DEVICE int32_t last_node(int32_t r) const {
    return s.last_node[r] >= 0 ? s.last_node[r] : node_of(r);
  }

  FI_HOST_DEVICE void count_members() {
    for_each(p.num_requests, [&](int32_t r) {
      FI_ROLLED for (int32_t n = last_node(r); n >= 0; n = above(n)) {
        add_to(&s.nodes[n].members, 1);
        add_to(&s.nodes[n].tokens, s.q_len[r]);
      }
    });
    block_.sync();
  }

  FI_HOST_DEVICE bool pays(int32_t n, int32_t above) const {
    const TreeNode& node = s.nodes[n];
    const int32_t begin = above < 0 ? 0 : s.nodes[above].steps;
    return node_pays(node.members, (node.steps - begin) * p.step_tokens.value);
  }

  // Numbers the nodes that pay, until one does not fit, and writes them: by one warp.
  FI_HOST_DEVICE void choose_nodes() {
    if (block_.warp() == 0) {
      ForestHeader sums{};
      FI_ROLLED for (int32_t first = 0; first < num_nodes_; first += block_.num_lanes()) {
        choose_round(first + block_.lane(), &sums);
      }
      if (block_.lane() == 0) *s.header = sums;
    }
    block_.sync();
  }

  FI_HOST_DEVICE void choose_round(int32_t n, ForestHeader* sums) {
    int32_t level = 0, parent = -1, members = 0, tokens = 0;
    bool counts = false;
    if (n < num_nodes_) {
      const int32_t next = above(n);
      FI_ROLLED for (int32_t a = next; a >= 0;) {
        const int32_t after = above(a);
        if (pays(a, after)) {
          if (parent < 0) parent = a;
          level += 1;
        }
        a = after;
      }
      counts = pays(n, next) && level < kMaxForestLevels;
    }
    if (counts) {
      members = s.nodes[n].members;
      tokens = s.nodes[n].tokens;
    }
    const uint32_t before = block_.ballot(counts) & ((1u << block_.lane()) - 1);
    const int32_t number = sums->num_nodes + count_bits(before);
    const int32_t links = sums->num_links + static_cast<int32_t>(block_.warp_scan(members));
    const int32_t end = sums->num_tokens + static_cast<int32_t>(block_.warp_scan(tokens));
    const PlanCapacity& cap = p.capacity;
    const bool fits = counts && sums->status == kPlanOk && number < cap.max_nodes &&
                      links <= cap.max_links && end <= cap.max_shared_tokens;
    if (block_.ballot(counts && !fits) != 0) sums->status = kPlanNodesDeclined;
    // Those that fit are a beginning of those that count: the last one has the sums.
    const uint32_t chosen = block_.ballot(fits);
    int32_t saved = 0;
    if (fits) {
      const int32_t begin = parent < 0 ? 0 : s.nodes[parent].steps * p.step_tokens.value;
      const int32_t kv_end = s.nodes[n].steps * p.step_tokens.value;
      saved = (members - 1) * (kv_end - begin);
      s.nodes[n].number = number;
      s.level[number] = level;
      store_16(nodes() + number, s.nodes[n].creator, begin, kv_end, members);
    }
    block_.sync_warp();  // numbers of parents in this round
    if (fits) {
      int32_t* to = reinterpret_cast<int32_t*>(nodes() + number);
      store_16(to + 4, tokens, end - tokens, parent < 0 ? -1 : s.nodes[parent].number, 0);
    }
    sums->saved_kv_tokens += static_cast<int32_t>(block_.warp_sum(saved));
    if (chosen == 0) return;
    const int32_t last = highest_bit(chosen);
    sums->num_nodes += count_bits(chosen);
    sums->num_links = block_.shuffle(links, last);
    sums->num_tokens = block_.shuffle(end, last);
  }

  // By one thread.
  FI_HOST_DEVICE void write_header(const ForestHeader& sums, int32_t kv_tokens) const {
    int32_t* to = static_cast<int32_t*>(p.forest);
    store_16(to, sums.num_nodes, sums.num_links, sums.num_tokens, sums.status);
    store_16(to + 4, kv_tokens, sums.saved_kv_tokens, 0, 0);
    if (!p.totals) return;
    // Plans of a stream follow one another: nobody else writes here meanwhile.
    volatile int64_t* totals = p.totals;
    totals[0] = totals[0] + kv_tokens;
    totals[1] = totals[1] + sums.saved_kv_tokens;
  }

  FI_HOST_DEVICE int16_t& chain(int32_t level, int32_t r) const {
    return s.chain[level * p.capacity.max_requests + r];
  }

  FI_HOST_DEVICE void write_requests() {
    RequestSums sums;
    FI_ROLLED for (int32_t first = 0; first < p.num_requests; first += block_.num_threads()) {
      const int32_t r = first + block_.thread();
      RequestSums own, all;
      int32_t own_begin = 0;
      if (first == 0) own.kv_tokens = kv_tokens_;
      if (r < p.num_requests) {
        // Upwards: the last node comes first, at the end of its request's chain.
        FI_ROLLED for (int32_t n = last_node(r); n >= 0; n = above(n)) {
          const int32_t number = s.nodes[n].number;
          if (number < 0) continue;
          if (own.links == 0) own_begin = s.nodes[n].steps * p.step_tokens.value;
          own.links += 1;
          chain(s.level[number], r) = static_cast<int16_t>(number);
        }
        FI_ROLLED for (int32_t l = own.links; l < kMaxForestLevels; ++l) chain(l, r) = -1;
      }
      const int32_t link = sums.links + block_.scan(own, &all).links;
      sums += all;
      if (r >= p.num_requests) continue;
      s.first_link[r] = link;
      store_16(requests() + r, link, own.links, own_begin, 0);
    }
    if (block_.thread() == 0) write_header(*s.header, sums.kv_tokens);
    block_.sync();
  }

  // Links with the query tokens of lower members: a warp for each node walks the requests.
  FI_HOST_DEVICE void write_links() {
    const int32_t num_warps = block_.num_threads() / block_.num_lanes();
    FI_ROLLED for (int32_t k = block_.warp(); k < s.header->num_nodes; k += num_warps) {
      const int32_t level = s.level[k];
      int32_t offset = 0;
      FI_ROLLED for (int32_t first = 0; first < p.num_requests; first += block_.num_lanes()) {
        const int32_t r = first + block_.lane();
        const bool is_member = r < p.num_requests && chain(level, r) == k;
        const uint32_t members = block_.ballot(is_member);
        if (members == 0) continue;
        const int32_t q_len = is_member ? s.q_len[r] : 0;
        int32_t before = count_bits(members & ((1u << block_.lane()) - 1));
        int32_t all = count_bits(members);
        if (block_.ballot(q_len > 1) != 0) {
          const auto through = static_cast<int32_t>(block_.warp_scan(q_len));
          before = through - q_len;
          all = block_.shuffle(through, block_.num_lanes() - 1);
        }
        if (is_member) {
          ForestLink* to = links() + s.first_link[r] + level;
          to->node = k;
          to->token_offset = offset + before;
        }
        offset += all;
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
  int32_t num_nodes_ = 0;  // of the tree
  int32_t kv_tokens_ = 0;  // of the requests of this thread
};

}  // namespace fi::forest
