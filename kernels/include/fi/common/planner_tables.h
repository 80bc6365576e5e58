// First part of the device planner (planner.h): requests, nodes and row tiles of a step, as tables
// in scratch.
#pragma once

#include "fi/common/planner_forest.h"

namespace fi::planner {

// What the tables add up to.
template <class Cost>
struct StepTotals {
  int32_t num_requests = 0;
  int32_t num_tiles = 0;  // of requests and one KV head, as all that follows
  int32_t findings = 0;   // PlanStatus bits, and Finding
  Cost cost = 0;          // that of nodes included
  int64_t pieces = 0;     // batch-invariant mode: items << 32 | partial rows
  // Mode::has_nodes; all zero where the forest is empty or ignored.
  int32_t num_nodes = 0;
  int32_t num_links = 0;
  int32_t num_gathered = 0;   // query tokens of nodes
  int32_t member_tokens = 0;  // query tokens of requests that are in nodes
  int32_t node_tiles = 0;
  Cost node_cost = 0;
};

// Findings of one thread that concern all, beside the PlanStatus bits.
enum Finding : int32_t {
  kStatusMask = (1 << 16) - 1,
  kOdd = 1 << 16,        // lengths out of contract
  kLarge = 1 << 17,      // a request of several row tiles
  kManyLarge = 1 << 18,  // more of them than a warp spreads
};

template <class Block, Mode kMode>
class StepTables {
  using Cost = typename CostType<kMode>::Type;
  using Sums = typename SumsType<kMode>::Type;
  static constexpr int32_t kPerThread = kMode.per_thread;

 public:
  FI_HOST_DEVICE StepTables(const PlanKernelParams& params, Scratch<Cost>& scratch, Block& block)
      : p(params),
        s(scratch),
        block_(block),
        tiles_(params, block.classes()),
        forest_(params, scratch, block) {}

  // Fills all but the cuts, and writes the plan's requests.
  FI_HOST_DEVICE StepTotals<Cost> fill(PlannedRequest* requests) {
    place_requests(requests);
    if ((findings_ & kManyLarge) != 0) [[unlikely]]
      sum_costs();
    StepTotals<Cost> totals;
    totals.num_requests = num_requests_;
    totals.num_tiles = sums_.tiles;
    totals.findings = findings_;
    totals.cost = sums_.cost;
    if constexpr (kMode.is_invariant) totals.pieces = sums_.pieces;
    if constexpr (kMode.has_nodes) {
      totals.cost += sums_.node_cost;
      const ForestHeader& forest = forest_.header();
      totals.num_nodes = forest.num_nodes;
      totals.num_links = forest.num_links;
      totals.num_gathered = forest.num_tokens;
      totals.member_tokens = sums_.tokens;
      totals.node_tiles = sums_.node_tiles;
      totals.node_cost = sums_.node_cost;
      totals.findings |= forest.status & kPlanNodesDeclined;
    }
    return totals;
  }

 private:
  // Large requests that a warp spreads: beyond, all threads together are faster.
  static constexpr int32_t kMostLarge = 2;

  // A KV length as its two words (little-endian), so that nothing waits for the load yet.
  struct RawLength {
    int32_t low, high;
  };

  // Without branches: later work shall not get in between loads.
  FI_HOST_DEVICE RawLength load_kv_len(int32_t r, bool exists) const {
    const bool is_wide = p.kv_len_is_int64 != 0;
    const uint32_t stride = is_wide ? sizeof(int64_t) : sizeof(int32_t);
    const uint64_t offset = static_cast<uint64_t>(static_cast<uint32_t>(r)) * stride;
    const void* at = static_cast<const char*>(p.kv_len) + offset;
    const int32_t* words = static_cast<const int32_t*>(at);
    RawLength length{0, 0};
    if (exists) length.low = words[0];
    if (exists && is_wide) length.high = words[1];
    return length;
  }

  FI_HOST_DEVICE bool is_legal(const RawLength& kv_len) const {
    return kv_len.high == 0 &&
           static_cast<uint32_t>(kv_len.low) <= static_cast<uint32_t>(p.max_kv_len);
  }

  FI_HOST_DEVICE bool is_negative(const RawLength& kv_len) const {
    return (p.kv_len_is_int64 ? kv_len.high : kv_len.low) < 0;
  }

  // Lengths -> PlannedRequest.
  FI_HOST_DEVICE void place_requests(PlannedRequest* out) {
    num_requests_ = min_i32(max_i32(p.num_requests, 0), p.max_requests);
    Lengths lengths = load_lengths(0);
    // Time to use while they are on the way.
    block_.template prepare<kParamBytes<kMode>>(p);
    if constexpr (kMode.has_nodes) {
      block_.wait_for_forest();
      load_shared(0, &lengths);
      forest_.load(num_requests_ == p.num_requests);
      s = scratch_at<Cost>(p, block_.scratch());  // anew: no offset is wanted before
      if (forest_.has_nodes() && kPerThread * block_.num_threads() < num_requests_) check_rounds();
      place_most_nodes();
    }
    for (int32_t first = 0; first < num_requests_;) {
      if (place_round(first, lengths, out)) {
        first += kPerThread * block_.num_threads();
        if (first < num_requests_) {
          lengths = load_lengths(first);
          if constexpr (kMode.has_nodes) load_shared(first, &lengths);
        }
      } else {
        is_careful_ = true;
        if constexpr (kMode.has_nodes) {
          forest_.ignore();
          if (first == 0) sums_ = {};  // of nodes
        }
        tokens_before_ = first == 0 ? 0 : p.qo_indptr[first];
      }
    }
    if (block_.thread() == 0) s.tile_begin[num_requests_] = sums_.tiles;
    end_tables();
  }

  // A round may believe in the forest if the lengths of all are within contract: where there are
  // more rounds than one, they are looked through first.
  FI_HOST_DEVICE void check_rounds() {
    int32_t bits = 0;
    FI_ROLLED for (int32_t first = 0; first < num_requests_;
                   first += kPerThread * block_.num_threads()) {
      Requests requests;
      bits |= take_lengths(first + kPerThread * block_.thread(), load_lengths(first), &requests);
    }
    Sums none, total;
    block_.scan(none, &total, &bits, 2);
    if ((bits & kOdd) != 0) forest_.ignore();
  }

  // All nodes but those of the last round, which share the scan of the first requests.
  FI_HOST_DEVICE void place_most_nodes() {
    FI_ROLLED for (; forest_.has_rounds(); forest_.next_round()) {
      Sums sum;
      const NodePlace<Cost> node = forest_.add_node(&sum);
      Sums total, before = block_.scan(sum, &total);
      before += sums_;
      sums_ += total;
      forest_.write_node(node, before);
    }
  }

  FI_HOST_DEVICE Cost node_cost() const {
    if constexpr (kMode.has_nodes) return sums_.node_cost;
    return 0;
  }

  // Requests of one round, whose tokens are those between neighbours of qo_indptr.
  struct Requests {
    int32_t qo_begin[kPerThread], q_len[kPerThread], kv_len[kPerThread];
    int32_t own_begin[kPerThread];
    bool is_member[kPerThread];
    int32_t tile_class[kPerThread], num_tiles[kPerThread];
    Sums sums[kPerThread];
  };

  // As they lie in memory.
  struct Lengths {
    int32_t tokens[kPerThread + 1];
    RawLength kv_len[kPerThread];
    ForestRequest shared[kPerThread];
  };

  FI_HOST_DEVICE Lengths load_lengths(int32_t first) const {
    const int32_t r0 = first + kPerThread * block_.thread();
    Lengths lengths{};
    for (int32_t i = 0; i <= kPerThread; ++i) {
      const bool exists = r0 < num_requests_ && r0 + i <= num_requests_;
      if (exists) lengths.tokens[i] = p.qo_indptr[r0 + i];
    }
    for (int32_t i = 0; i < kPerThread; ++i) {
      lengths.kv_len[i] = load_kv_len(r0 + i, r0 + i < num_requests_);
    }
    return lengths;
  }

  FI_HOST_DEVICE void load_shared(int32_t first, Lengths* lengths) const {
    const int32_t r0 = first + kPerThread * block_.thread();
    const ForestRequest* shared = forest_view(p).requests + r0;
    for (int32_t i = 0; i < kPerThread; ++i) {
      if (r0 + i < num_requests_) lengths->shared[i] = shared[i];
    }
  }

  // False, with nothing done, if lengths turn out to be out of contract: to be called again then,
  // and from then on they are clamped to capacity. Every clamp sets a status bit.
  FI_HOST_DEVICE bool place_round(int32_t first, const Lengths& lengths, PlannedRequest* out) {
    const int32_t r0 = first + kPerThread * block_.thread();
    Requests requests;
    int32_t bits;
    if (is_careful_) [[unlikely]] {
      bits = clamp_tokens(r0, lengths.tokens, &requests) | clamp_kv(lengths.kv_len, &requests);
    } else {
      bits = take_lengths(r0, lengths, &requests);
    }
    take_links(r0, lengths, &requests);
    for (int32_t i = 0; i < kPerThread; ++i) bits |= place_request(i, &requests);
    const uint32_t large_lanes = add_large(r0, &requests, &bits);
    Sums sum;
    for (const Sums& of_request : requests.sums) sum += of_request;
    int32_t all_bits = bits;
    Sums total, before;
    if constexpr (kMode.has_nodes) {
      const NodePlace<Cost> node = forest_.add_node(&sum);
      before = block_.scan(sum, &total, &all_bits, forest_.num_words());
      if ((all_bits & kOdd) != 0) return false;
      before += sums_;
      forest_.write_node(node, before);
      forest_.end_rounds();
    } else {
      before = block_.scan(sum, &total, &all_bits);
      if ((all_bits & kOdd) != 0) return false;
      before += sums_;
    }
    sums_ += total;
    before.cost += node_cost();
    findings_ |= all_bits;
    if (r0 < num_requests_) write_requests(r0, requests, before, sum.tiles, out);
    if (large_lanes != 0) spread_large(large_lanes, r0, requests, before);
    return true;
  }

  // From when on requests read KV by themselves, and what they share before.
  FI_HOST_DEVICE void take_links(int32_t r0, const Lengths& lengths, Requests* requests) const {
    for (int32_t i = 0; i < kPerThread; ++i) {
      ForestRequest shared{};
      if constexpr (kMode.has_nodes) {
        if (forest_.has_nodes()) {
          shared = lengths.shared[i];
          forest_.copy_first_link(r0 + i, shared);
        }
      }
      requests->own_begin[i] = shared.own_begin;
      requests->is_member[i] = shared.num_links > 0;
    }
  }

  FI_HOST_DEVICE int32_t take_lengths(int32_t r0, const Lengths& lengths,
                                      Requests* requests) const {
    const auto max_tokens = static_cast<uint32_t>(p.max_tokens);
    bool is_odd = static_cast<uint32_t>(lengths.tokens[0]) > (r0 == 0 ? 0 : max_tokens);
    for (int32_t i = 0; i < kPerThread; ++i) {
      const int32_t begin = lengths.tokens[i], end = lengths.tokens[i + 1];
      const bool exists = r0 + i < num_requests_;
      is_odd |= exists & ((end < begin) | (static_cast<uint32_t>(end) > max_tokens));
      is_odd |= !is_legal(lengths.kv_len[i]);
      requests->qo_begin[i] = begin;
      requests->q_len[i] = exists ? end - begin : 0;
      requests->kv_len[i] = lengths.kv_len[i].low;
    }
    if (!is_odd) return 0;
    // Nothing will come of them; what follows shall not run wild meanwhile.
    for (int32_t i = 0; i < kPerThread; ++i) requests->q_len[i] = requests->kv_len[i] = 0;
    return kOdd;
  }

  // Query tokens of requests r0 and following from their qo_indptr; returns what is wrong with it.
  // A token belongs to the first request whose end reaches it: a request begins at the maximum of
  // the ends before.
  FI_HOST_DEVICE int32_t clamp_tokens(int32_t r0, const int32_t (&tokens)[kPerThread + 1],
                                      Requests* requests) {
    Latest latest, last;
    for (int32_t i = 0; i < kPerThread; ++i) latest += {min_i32(tokens[i + 1], p.max_tokens)};
    int32_t bits = 0, begin = max_i32(tokens_before_, block_.scan(latest, &last).token);
    tokens_before_ = max_i32(tokens_before_, last.token);
    for (int32_t i = 0; i < kPerThread; ++i) {
      const bool exists = r0 + i < num_requests_;
      const bool starts_wrong = r0 + i == 0 && tokens[0] != 0;
      if (exists && (tokens[i + 1] < begin || starts_wrong)) bits |= kPlanBadIndptr;
      if (exists && tokens[i + 1] > p.max_tokens) bits |= kPlanTooManyTokens;
      const int32_t end = exists ? max_i32(min_i32(tokens[i + 1], p.max_tokens), begin) : begin;
      requests->qo_begin[i] = begin;
      requests->q_len[i] = end - begin;
      begin = end;
    }
    return bits;
  }

  FI_HOST_DEVICE int32_t clamp_kv(const RawLength (&kv_len)[kPerThread], Requests* requests) const {
    int32_t bits = 0;
    for (int32_t i = 0; i < kPerThread; ++i) {
      const bool fits = is_legal(kv_len[i]);
      requests->kv_len[i] = fits ? kv_len[i].low : is_negative(kv_len[i]) ? 0 : p.max_kv_len;
      if (!fits) bits |= kPlanKvTooLong;
    }
    return bits;
  }

  // All else of request i of this thread but the cost of several tiles; returns findings.
  FI_HOST_DEVICE int32_t place_request(int32_t i, Requests* requests) const {
    const int32_t q_len = requests->q_len[i];
    const int32_t c = tiles_.class_of(tiles_.packed_rows(q_len));
    const int32_t num_tiles = tiles_.num_tiles(q_len, c);
    requests->tile_class[i] = c;
    requests->num_tiles[i] = num_tiles;
    if (kMode.from_start || num_tiles == 1) {
      const Sums only =
          tiles_.sums_of_only({q_len, requests->own_begin[i], requests->kv_len[i]}, c);
      if (num_tiles == 1) requests->sums[i] = only;
    }
    requests->sums[i].tiles = num_tiles;
    if constexpr (kMode.has_nodes) requests->sums[i].tokens = requests->is_member[i] ? q_len : 0;
    return num_tiles > 1 ? kLarge : 0;
  }

  // A thread's request of several row tiles.
  struct Large {
    OwnPart own{};
    int32_t num_tiles = 0;
  };

  FI_HOST_DEVICE Large large_of(int32_t r0, const Requests& requests) const {
    Large large;
    for (int32_t i = 0; i < kPerThread; ++i) {
      if (requests.num_tiles[i] <= 1) continue;
      const int32_t own_begin = shared_of(r0 + i).own_begin;
      large = {{requests.q_len[i], own_begin, requests.kv_len[i]}, requests.num_tiles[i]};
    }
    return large;
  }

  FI_HOST_DEVICE Large from_lane(const Large& large, int32_t from) const {
    OwnPart own{block_.shuffle(large.own.q_len, from), 0, block_.shuffle(large.own.kv_len, from)};
    if constexpr (kMode.has_nodes) own.kv_begin = block_.shuffle(large.own.kv_begin, from);
    return {own, block_.shuffle(large.num_tiles, from)};
  }

  // Costs of large requests, a lane per row tile, where a warp has few of them: their sums, and in
  // block_.tile_costs() what precedes each tile in its request; returns the lanes that have one.
  FI_HOST_DEVICE uint32_t add_large(int32_t r0, Requests* requests, int32_t* bits) {
    if constexpr (!kMode.is_narrow) {
      if ((*bits & kLarge) != 0) *bits |= kManyLarge;
      return 0;
    } else {
      const uint32_t lanes = block_.ballot((*bits & kLarge) != 0);
      if (lanes == 0) return 0;
      const Large own = large_of(r0, *requests);
      int32_t num_large = 0;
      for (const int32_t tiles : requests->num_tiles) num_large += tiles > 1;
      bool is_much = block_.ballot(num_large > 1) != 0 || count_bits(lanes) > kMostLarge;
      auto* costs = reinterpret_cast<Cost*>(block_.tile_costs());
      int32_t num_staged = 0;
      FI_ROLLED for (uint32_t rest = is_much ? 0 : lanes; rest != 0; rest &= rest - 1) {
        const int32_t from = lowest_bit(rest);
        const Large large = from_lane(own, from);
        if (num_staged + large.num_tiles > block_.num_tile_costs()) {
          is_much = true;
          break;
        }
        Cost cost = 0;
        FI_ROLLED for (int32_t t0 = 0; t0 < large.num_tiles; t0 += block_.num_lanes()) {
          const int32_t t = t0 + block_.lane();
          const Cost here = t < large.num_tiles ? cost_of_tile(large, t) : 0;
          const Cost through = block_.warp_scan(here);
          if (t < large.num_tiles) costs[num_staged + t] = cost + through - here;
          cost += static_cast<Cost>(
              block_.shuffle(static_cast<int32_t>(through), block_.num_lanes() - 1));
        }
        num_staged += large.num_tiles;
        for (int32_t i = 0; i < kPerThread; ++i) {
          if (block_.lane() == from && requests->num_tiles[i] > 1) requests->sums[i].cost = cost;
        }
      }
      if (!is_much) return lanes;
      *bits |= kManyLarge;
      return 0;
    }
  }

  // Of its tile number t in plan order: descending.
  FI_HOST_DEVICE Cost cost_of_tile(const Large& large, int32_t t) const {
    const int32_t c = tiles_.class_of(tiles_.packed_rows(large.own.q_len));
    return tiles_.sums_of(large.own, c, large.num_tiles, large.num_tiles - 1 - t).cost;
  }

  // Enters the tiles of these lanes' large requests, a lane per row tile, at what add_large() found
  // them to cost. `at`: before the thread.
  FI_HOST_DEVICE void spread_large(uint32_t lanes, int32_t r0, const Requests& requests, Sums at) {
    if constexpr (kMode.is_narrow) {
      int32_t own_number = 0, own_first = 0, own_cost = 0, own_tiles = 0;
      for (int32_t i = 0; i < kPerThread; ++i) {
        if (requests.num_tiles[i] > 1) {
          own_number = r0 + i;
          own_first = at.tiles;
          own_cost = static_cast<int32_t>(at.cost);
          own_tiles = requests.num_tiles[i];
        }
        at += requests.sums[i];
      }
      auto* costs = reinterpret_cast<const Cost*>(block_.tile_costs());
      FI_ROLLED for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
        const int32_t from = lowest_bit(rest);
        const int32_t num_tiles = block_.shuffle(own_tiles, from);
        const int32_t r = block_.shuffle(own_number, from);
        const int32_t first = block_.shuffle(own_first, from);
        const auto before = static_cast<Cost>(block_.shuffle(own_cost, from));
        FI_ROLLED for (int32_t t = block_.lane(); t < num_tiles; t += block_.num_lanes()) {
          s.tile_request[first + t] = r;
          s.cost[first + t] = before + costs[t];
        }
        costs += num_tiles;
      }
    }
  }

  // The requests and the tiles of those that have one; `at`: what is before them.
  FI_HOST_DEVICE void write_requests(int32_t r0, const Requests& requests, Sums at,
                                     int32_t num_tiles, PlannedRequest* out) {
    int32_t tile_begin[kPerThread], number[kPerThread], shared_tokens[kPerThread];
    Cost cost[kPerThread];
    bool is_plain = num_tiles == kPerThread && at.tiles % kPerThread == 0;
    const int32_t first_tile = at.tiles;
    for (int32_t i = 0; i < kPerThread; ++i) {
      tile_begin[i] = at.tiles;
      number[i] = r0 + i;
      cost[i] = at.cost;
      is_plain &= requests.num_tiles[i] == 1;
      if constexpr (kMode.is_invariant) {
        if (requests.num_tiles[i] > 0) s.pieces[at.tiles] = at.pieces;
      }
      if constexpr (kMode.has_nodes) {
        const int32_t tokens = forest_.header().num_tokens + at.tokens;
        shared_tokens[i] = 2 * tokens + requests.is_member[i];
      }
      at += requests.sums[i];
    }
    store_run(s.tile_begin + r0, tile_begin);
    store_run(s.qo_begin + r0, requests.qo_begin);
    store_run(s.q_len + r0, requests.q_len);
    store_run(s.kv_len + r0, requests.kv_len);
    if (is_plain) {
      store_run(s.tile_request + first_tile, number);
      store_run(s.cost + first_tile, cost);
    } else {
      for (int32_t i = 0; i < kPerThread; ++i) {
        if (requests.num_tiles[i] != 1) continue;
        s.tile_request[tile_begin[i]] = number[i];
        s.cost[tile_begin[i]] = cost[i];
      }
    }
    if constexpr (kMode.has_nodes) {
      if (forest_.has_nodes()) {
        store_run(s.shared_tokens + r0, shared_tokens);
      }
    }
    if (!owns(block_, r0)) return;
    for (int32_t i = 0; i < kPerThread; ++i) {
      if (r0 + i >= num_requests_) return;
      int32_t* to = reinterpret_cast<int32_t*>(out + r0 + i);
      store_16(to, p.num_kv_heads.value * tile_begin[i], requests.num_tiles[i],
               requests.tile_class[i], requests.qo_begin[i]);
      const ForestRequest shared = shared_of(r0 + i);
      store_16(to + 4, requests.q_len[i], requests.kv_len[i], shared.link_begin,
               shared.link_begin + shared.num_links);
      if (shared.num_links < 1) store_16(to + 8, 0, 0, 0, 0);  // or as write_members() links it
    }
  }

  // What follows the last tile.
  FI_HOST_DEVICE void end_tables() {
    if (block_.thread() == 0) {
      s.cost[sums_.tiles] = sums_.cost + node_cost();
      if constexpr (kMode.is_invariant) s.pieces[sums_.tiles] = sums_.pieces;
      if constexpr (kMode.has_nodes) forest_.end_tables(sums_);
    }
    block_.sync();
  }

  // Leaves each request's number where its tiles begin and wherever a warp of sum_costs() does.
  FI_HOST_DEVICE void mark_requests() {
    FI_ROLLED for (int32_t t = 4 * block_.thread(); t < sums_.tiles;
                   t += 4 * block_.num_threads()) {
      store_16(s.tile_request + t, -1, -1, -1, -1);
    }
    block_.sync();
    const int32_t run = block_.num_lanes() * kPerThread;
    FI_ROLLED for (int32_t r = block_.thread(); r < num_requests_; r += block_.num_threads()) {
      const int32_t first = s.tile_begin[r], last = s.tile_begin[r + 1];
      if (first < last) s.tile_request[first] = r;
      FI_ROLLED for (int32_t t = (first / run + 1) * run; t < last; t += run) {
        s.tile_request[t] = r;
      }
    }
    block_.sync();
  }

  FI_HOST_DEVICE ForestRequest shared_of(int32_t r) const {
    if constexpr (kMode.has_nodes) {
      if (forest_.has_nodes()) return forest_view(p).requests[r];
    }
    return {};
  }

  // Costs anew, tile by tile, where many requests have several: requests spread from their marks.
  FI_HOST_DEVICE void sum_costs() {
    mark_requests();
    const Sums placed = sums_;
    const int32_t num_tiles = placed.tiles;
    sums_ = {};
    if constexpr (kMode.has_nodes) {  // these stay
      sums_.tokens = placed.tokens;
      sums_.node_cost = placed.node_cost;
      sums_.node_tiles = placed.node_tiles;
    }
    FI_ROLLED for (int32_t first = 0; first < num_tiles;
                   first += kPerThread * block_.num_threads()) {
      const int32_t t0 = first + kPerThread * block_.thread();
      int32_t request[kPerThread], last = -1;
      for (int32_t i = 0; i < kPerThread; ++i) {
        request[i] = t0 + i < num_tiles ? s.tile_request[t0 + i] : -1;
        last = max_i32(last, request[i]);
      }
      int32_t r = block_.last_before(last >= 0, last);
      Sums sum, sums[kPerThread];
      for (int32_t i = 0; i < kPerThread; ++i) {
        request[i] = r = request[i] >= 0 ? request[i] : r;
        if (t0 + i >= num_tiles) continue;
        const int32_t q_len = s.q_len[r], end = s.tile_begin[r + 1];
        sums[i] = tiles_.sums_of({q_len, shared_of(r).own_begin, s.kv_len[r]},
                                 tiles_.class_of(tiles_.packed_rows(q_len)), end - s.tile_begin[r],
                                 end - 1 - (t0 + i));
        sum += sums[i];
      }
      constexpr int32_t kTileWords = 2;
      Sums total, at = block_.scan(sum, &total, nullptr, kTileWords);
      at += sums_;
      sums_ += total;
      at.cost += node_cost();
      if (t0 < num_tiles) write_costs(t0, num_tiles, request, at, sums);
    }
    end_tables();
  }

  FI_HOST_DEVICE void write_costs(int32_t t0, int32_t num_tiles,
                                  const int32_t (&request)[kPerThread], Sums at,
                                  const Sums (&sums)[kPerThread]) {
    Cost cost[kPerThread];
    for (int32_t i = 0; i < kPerThread; ++i) {
      cost[i] = at.cost;
      if constexpr (kMode.is_invariant) {
        if (t0 + i < num_tiles) s.pieces[t0 + i] = at.pieces;
      }
      at += sums[i];
    }
    store_run(s.tile_request + t0, request);
    store_run(s.cost + t0, cost);
  }

  const PlanKernelParams& p;
  Scratch<Cost>& s;
  Block& block_;
  const TileRules<kMode> tiles_;
  ForestTables<Block, kMode> forest_;  // Mode::has_nodes
  int32_t num_requests_ = 0;
  Sums sums_;                  // over the tiles of rounds done
  int32_t findings_ = 0;       // of rounds done
  int32_t tokens_before_ = 0;  // the round, once lengths were found out of contract
  bool is_careful_ = false;
};

}  // namespace fi::planner
