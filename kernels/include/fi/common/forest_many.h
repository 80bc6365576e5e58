// A prefix forest of any number of nodes, built from the branches of all requests by one CTA.
#pragma once

#include "fi/common/forest_parts.h"

namespace fi::forest {

// What is summed over requests.
struct RequestSums {
  static constexpr bool kIsWords = false;
  int32_t links = 0;

  template <class Map>
  FI_HOST_DEVICE RequestSums mapped(const Map& map) const {
    return {map(links)};
  }
  FI_HOST_DEVICE void operator+=(const RequestSums& other) { links += other.links; }
};

// A thread stands for a request or a node; what few nodes need is left to a warp.
template <class Block>
class ManyNodes {
 public:
  FI_HOST_DEVICE ManyNodes(const ForestKernelParams& params, const Scratch& scratch, Block& block)
      : p(params), s(scratch), out_(params), block_(block) {}

  FI_HOST_DEVICE void run() {
    for_each(p.num_requests, [&](int32_t r) { s.last_node[r] = -1; });
    block_.sync();
    order_nodes();
    count_members();
    choose_nodes();
    write_requests();
    write_links();
  }

 private:
  // Loops over requests or nodes, a thread for each.
  template <class Body>
  FI_HOST_DEVICE void for_each(int32_t count, const Body& body) const {
    FI_ROLLED for (int32_t i = block_.thread(); i < count; i += block_.num_threads()) body(i);
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
      s.node_of_name[s.holders[i]] = rank;
      if (is_last) s.last_node[creator] = rank;
    });
    block_.sync();
  }

  // TreeNode::above of a creator's first node: the node of the creator's own branch.
  static constexpr int32_t kAtCreator = -2;

  FI_HOST_DEVICE int32_t node_of(int32_t r) const {
    return s.name_of[r] < 0 ? -1 : s.node_of_name[s.name_of[r]];
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
      store_16(out_.nodes + number, s.nodes[n].creator, begin, kv_end, members);
    }
    block_.sync_warp();  // numbers of parents in this round
    if (fits) {
      int32_t* to = reinterpret_cast<int32_t*>(out_.nodes + number);
      store_16(to + 4, tokens, end - tokens, parent < 0 ? -1 : s.nodes[parent].number, 0);
    }
    sums->saved_kv_tokens += static_cast<int32_t>(block_.warp_sum(saved));
    if (chosen == 0) return;
    const int32_t last = highest_bit(chosen);
    sums->num_nodes += count_bits(chosen);
    sums->num_links = block_.shuffle(links, last);
    sums->num_tokens = block_.shuffle(end, last);
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
      store_16(out_.requests + r, link, own.links, own_begin, 0);
    }
    if (block_.thread() == 0) out_.write_header(*s.header, s.num_nodes[1]);
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
          ForestLink* to = out_.links + s.first_link[r] + level;
          to->node = k;
          to->token_offset = offset + before;
        }
        offset += all;
      }
    }
  }

  const ForestKernelParams& p;
  const Scratch& s;
  const Output out_;
  Block& block_;
  int32_t num_nodes_ = 0;  // of the tree
};

}  // namespace fi::forest
