// A prefix forest of no more nodes than a warp has lanes, built from the branches of all requests
// by one CTA. A lane stands for a node, a bit of a word for its membership: every warp knows the
// whole tree, so that all there is to wait for is how many members each warp found.
#pragma once

#include "fi/common/forest_parts.h"

namespace fi::forest {

template <class Block>
class FewNodes {
 public:
  FI_HOST_DEVICE FewNodes(const ForestKernelParams& params, const Scratch& scratch, Block& block)
      : p(params), s(scratch), out_(params), block_(block), num_nodes_(*scratch.num_nodes) {}

  FI_HOST_DEVICE void run() {
    order_nodes();
    find_above();
    for_each_group([&](int32_t group) { find_members(group); });
    block_.sync();
    sum_members();
    choose_nodes();
    for_each_group([&](int32_t group) { write_requests(group); });
  }

 private:
  // Requests of a warp's lanes are a group. Warps take the groups in turn.
  template <class Body>
  FI_HOST_DEVICE void for_each_group(const Body& body) {
    const int32_t num_warps = block_.num_threads() / block_.num_lanes();
    FI_ROLLED for (int32_t g = block_.warp(); g < num_groups(); g += num_warps) body(g);
  }

  FI_HOST_DEVICE int32_t num_groups() const {
    return (p.num_requests + block_.num_lanes() - 1) / block_.num_lanes();
  }

  // Calls body(i) for each node, and perhaps a few that do not exist: four at a time, whose
  // shuffles hide each other's latency.
  template <class Body>
  FI_HOST_DEVICE void for_each_node(const Body& body) {
    FI_ROLLED for (int32_t i = 0; i < num_nodes_; i += kAtOnce) {
      for (int32_t j = 0; j < kAtOnce; ++j) body(i + j);
    }
  }
  static constexpr int32_t kAtOnce = 4;

  FI_HOST_DEVICE uint64_t shuffle(uint64_t value, int32_t from) {
    const auto low = static_cast<uint32_t>(block_.shuffle(static_cast<int32_t>(value), from));
    const auto high =
        static_cast<uint32_t>(block_.shuffle(static_cast<int32_t>(value >> 32), from));
    return static_cast<uint64_t>(high) << 32 | low;
  }

  FI_HOST_DEVICE uint32_t lanes_before() const { return (1u << block_.lane()) - 1; }

  // Lane n gets the key of node n, in order; lanes past the last one a key above all.
  FI_HOST_DEVICE void order_nodes() {
    constexpr uint64_t kNone = ~uint64_t{0};
    const uint64_t own = block_.lane() < num_nodes_ ? s.keys[block_.lane()] : kNone;
    int32_t rank = 0, source = block_.lane();
    for_each_node([&](int32_t i) { rank += shuffle(own, i) < own; });
    if (own == kNone) rank = block_.lane();
    for_each_node(
        [&](int32_t i) { source = block_.shuffle(rank, i) == block_.lane() ? i : source; });
    key_ = shuffle(own, source);
  }

  // The node above: what precedes on the same creator, or the node of the creator's own branch. And
  // all those above that, by doubling.
  FI_HOST_DEVICE void find_above() {
    const int32_t before = block_.lane() > 0 ? block_.lane() - 1 : 0;
    const int32_t creator_before = creator_of(shuffle(key_, before));
    const bool continues = block_.lane() > 0 && creator_before == creator_of(key_);
    const bool exists = block_.lane() < num_nodes_;
    const uint64_t wanted = exists && !continues ? s.keys_of[creator_of(key_)] : 0;
    above_ = exists && continues ? before : -1;
    for_each_node([&](int32_t i) {
      if (shuffle(key_, i) == wanted) above_ = i;
    });
    chain_ = 1u << block_.lane();
    int32_t next = above_;
    FI_ROLLED while (block_.ballot(next >= 0) != 0) {
      const int32_t from = next >= 0 ? next : block_.lane();
      const auto others = static_cast<uint32_t>(block_.shuffle(static_cast<int32_t>(chain_), from));
      const int32_t after = block_.shuffle(next, from);
      chain_ |= others;
      next = next >= 0 ? after : -1;
    }
  }

  // Which nodes each request of a group is in; how many of the group are in each node.
  FI_HOST_DEVICE void find_members(int32_t group) {
    const int32_t r = group * block_.num_lanes() + block_.lane();
    const bool exists = r < p.num_requests;
    const uint64_t own = exists ? s.keys_of[r] : 0;
    const int32_t q_len = exists ? s.q_len[r] : 0;
    int32_t last = -1, of_creator = -1;
    for_each_node([&](int32_t i) {
      const uint64_t key = shuffle(key_, i);
      if (key == own) last = i;
      if (creator_of(key) == r && i < num_nodes_) of_creator = i;  // its last one
    });
    if (of_creator >= 0) last = of_creator;
    const auto chain =
        static_cast<uint32_t>(block_.shuffle(static_cast<int32_t>(chain_), last < 0 ? 0 : last));
    const uint32_t nodes = exists && last >= 0 ? chain : 0;
    uint32_t members = 0;
    for_each_node([&](int32_t i) {
      const uint32_t lanes = block_.ballot((nodes >> i & 1) != 0);
      if (block_.lane() == i) members = lanes;
    });
    auto tokens = static_cast<int32_t>(count_bits(members));
    if (block_.ballot(q_len > 1) != 0) {
      for_each_node([&](int32_t i) {
        const uint32_t sum = block_.warp_sum((nodes >> i & 1) != 0 ? q_len : 0);
        if (block_.lane() == i) tokens = static_cast<int32_t>(sum);
      });
    }
    const int32_t at = group * block_.num_lanes() + block_.lane();
    s.nodes_of[at] = nodes;
    s.members[at] = members;
    s.tokens[at] = tokens;
  }

  // Of all groups.
  FI_HOST_DEVICE void sum_members() {
    FI_ROLLED for (int32_t first = 0; first < num_groups(); first += kAtOnce) {
      for (int32_t j = 0; j < kAtOnce; ++j) {
        const int32_t g = first + j;
        if (g >= num_groups()) continue;
        num_members_ += count_bits(s.members[g * block_.num_lanes() + block_.lane()]);
        num_tokens_ += s.tokens[g * block_.num_lanes() + block_.lane()];
      }
    }
  }

  // Numbers the nodes that pay, until one does not fit; the first warp writes them.
  FI_HOST_DEVICE void choose_nodes() {
    const bool exists = block_.lane() < num_nodes_;
    const int32_t own_steps = steps_of(key_);
    const int32_t begin = steps_at(above_);
    const bool pays = exists && node_pays(num_members_, (own_steps - begin) * p.step_tokens.value);
    const uint32_t paying = block_.ballot(pays);
    const uint32_t above = chain_ & paying & ~(1u << block_.lane());
    const int32_t level = count_bits(above), parent = above == 0 ? -1 : highest_bit(above);
    const bool counts = pays && level < kMaxForestLevels;
    number_ = count_bits(block_.ballot(counts) & lanes_before());
    const auto links = static_cast<int32_t>(block_.warp_scan(counts ? num_members_ : 0));
    const auto end = static_cast<int32_t>(block_.warp_scan(counts ? num_tokens_ : 0));
    const PlanCapacity& cap = p.capacity;
    const bool fits =
        counts && number_ < cap.max_nodes && links <= cap.max_links && end <= cap.max_shared_tokens;
    // Those that fit are a beginning of those that count.
    chosen_ = block_.ballot(fits);
    const bool declines = block_.ballot(counts && !fits) != 0;
    if (block_.warp() > 0) return;
    const int32_t kv_begin = steps_at(parent) * p.step_tokens.value;
    const int32_t kv_end = own_steps * p.step_tokens.value;
    const int32_t number_of_parent = block_.shuffle(number_, parent < 0 ? 0 : parent);
    if (fits) {
      auto* to = reinterpret_cast<int32_t*>(out_.nodes + number_);
      store_16(to, creator_of(key_), kv_begin, kv_end, num_members_);
      store_16(to + 4, num_tokens_, end - num_tokens_, parent < 0 ? -1 : number_of_parent, 0);
    }
    ForestHeader sums{};
    const int32_t last = chosen_ == 0 ? 0 : highest_bit(chosen_);
    sums.num_nodes = count_bits(chosen_);
    sums.num_links = block_.shuffle(links, last);
    sums.num_tokens = block_.shuffle(end, last);
    if (chosen_ == 0) sums.num_links = sums.num_tokens = 0;
    sums.status = declines ? kPlanNodesDeclined : kPlanOk;
    sums.saved_kv_tokens = block_.warp_sum(fits ? (num_members_ - 1) * (kv_end - kv_begin) : 0);
    if (block_.lane() == 0) out_.write_header(sums, s.num_nodes[1]);
  }

  // Steps of a node; -1: none.
  FI_HOST_DEVICE int32_t steps_at(int32_t node) {
    const int32_t steps = block_.shuffle(steps_of(key_), node < 0 ? 0 : node);
    return node < 0 ? 0 : steps;
  }

  // What the requests of a group share, and their links.
  FI_HOST_DEVICE void write_requests(int32_t group) {
    const int32_t at = group * block_.num_lanes() + block_.lane();
    const bool exists = at < p.num_requests;
    const uint32_t members = s.members[at];
    int32_t members_before = 0, tokens_before = 0;
    FI_ROLLED for (int32_t first = 0; first < group; first += kAtOnce) {
      for (int32_t j = 0; j < kAtOnce; ++j) {
        const int32_t g = first + j;
        if (g >= group) continue;
        members_before += count_bits(s.members[g * block_.num_lanes() + block_.lane()]);
        tokens_before += s.tokens[g * block_.num_lanes() + block_.lane()];
      }
    }
    const bool is_chosen = (chosen_ >> block_.lane() & 1) != 0;
    uint32_t rest = s.nodes_of[at] & chosen_;
    const int32_t num_links = count_bits(rest);
    int32_t link = static_cast<int32_t>(block_.warp_scan(num_links)) - num_links;
    link += static_cast<int32_t>(block_.warp_sum(is_chosen ? members_before : 0));
    const int32_t own_begin = steps_at(rest == 0 ? -1 : highest_bit(rest)) * p.step_tokens.value;
    if (exists) store_16(out_.requests + at, link, num_links, own_begin, 0);
    FI_ROLLED while (block_.ballot(rest != 0) != 0) {
      const int32_t n = rest == 0 ? block_.lane() : lowest_bit(rest);
      const auto others =
          static_cast<uint32_t>(block_.shuffle(static_cast<int32_t>(members), n)) & lanes_before();
      const int32_t number = block_.shuffle(number_, n);
      const int32_t before = block_.shuffle(tokens_before, n);
      if (rest == 0) continue;
      out_.links[link] = {number, before + tokens_of(group, others)};
      link += 1;
      rest &= rest - 1;
    }
  }

  // Query tokens of some lanes' requests.
  FI_HOST_DEVICE int32_t tokens_of(int32_t group, uint32_t lanes) const {
    int32_t sum = 0;
    FI_ROLLED for (; lanes != 0; lanes &= lanes - 1) {
      sum += s.q_len[group * block_.num_lanes() + lowest_bit(lanes)];
    }
    return sum;
  }

  const ForestKernelParams& p;
  const Scratch& s;
  const Output out_;
  Block& block_;
  const int32_t num_nodes_;
  // Of this lane's node:
  uint64_t key_ = 0;
  int32_t above_ = -1;  // -1: none
  uint32_t chain_ = 0;  // the node and all those above, a bit each
  int32_t num_members_ = 0, num_tokens_ = 0;
  int32_t number_ = 0;   // in the forest, if it is chosen
  uint32_t chosen_ = 0;  // nodes of the forest, a bit each
};

}  // namespace fi::forest
