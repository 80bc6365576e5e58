// The planner on the device: the bytes of host/planner.cc for a step without nodes.
//
// Every CTA reads all lengths and works out the same tables in its own scratch, with scans where
// the host has loops; then each writes its share of the plan. So no CTA waits for another, and one
// launch does it. The time is that of one thread's chain of instructions, so there are few passes:
//   place_requests  lengths -> requests and row tiles; tiles before each, and their cost
//   cut_spans       where the spans of the attention's CTAs begin, items before each
//   write_items     items and merge units, one thread per item
// Block is the CTA as the passes see it: CudaBlock of planner_block.h, or threads of a CPU.
#pragma once

#include "fi/common/planner_tiles.h"

namespace fi::planner {

template <class Block, Mode kMode>
class StepPlanner {
  using Cost = typename CostType<kMode>::Type;
  using Sums = typename SumsType<kMode>::Type;
  static constexpr int32_t kPerThread = kMode.per_thread;

 public:
  FI_HOST_DEVICE StepPlanner(const PlanKernelParams& params, const Scratch<Cost>& scratch,
                             Block& block)
      : p(params), s(scratch), block_(block), tiles_(params), out_(params) {}

  FI_HOST_DEVICE void run() {
    place_requests();
    if (has_many_large_) [[unlikely]] sum_costs();
    if constexpr (kMode.is_invariant) {
      cut_chunks();
    } else {
      cut_spans();
    }
    write_items();
    write_header();
  }

 private:
  // Where the arrays of the plan lie.
  struct Output {
    FI_HOST_DEVICE explicit Output(const PlanKernelParams& p) {
      const auto at = [&](int64_t offset) -> void* { return static_cast<char*>(p.plan) + offset; };
      header = static_cast<PlanHeader*>(p.plan);
      cta_ptr = static_cast<int32_t*>(at(p.layout.cta_ptr));
      items = static_cast<WorkItem*>(at(p.layout.items));
      units = static_cast<MergeUnit*>(at(p.layout.units));
      requests = static_cast<PlannedRequest*>(at(p.layout.requests));
    }
    PlanHeader* header;
    int32_t* cta_ptr;
    WorkItem* items;
    MergeUnit* units;
    PlannedRequest* requests;
  };

  // Findings of one thread that concern all, beside the PlanStatus bits.
  static constexpr int32_t kOdd = 1 << 16;        // lengths out of contract
  static constexpr int32_t kLarge = 1 << 17;      // a request of several row tiles
  static constexpr int32_t kManyLarge = 1 << 18;  // more than a warp spreads
  static constexpr int32_t kStatusMask = kOdd - 1;

  // Large requests that a warp spreads, and tiles of one: beyond, all threads together are faster.
  static constexpr int32_t kMostLarge = 2, kMostTiles = 128;

  FI_HOST_DEVICE int32_t num_lanes() const { return min_i32(Block::kWarp, block_.num_threads()); }
  FI_HOST_DEVICE int32_t lane() const { return block_.thread() % num_lanes(); }

  // True in the one CTA that writes record `index` of an array that all CTAs know: runs of records
  // go round the CTAs.
  FI_HOST_DEVICE bool owns(int32_t index) const {
    const int32_t run = index / 32;
    return run - block_.times_ctas(block_.over_ctas(run)) == block_.cta();
  }

  // A KV length as its two words (little-endian), so that nothing waits for the load yet.
  struct RawLength {
    int32_t low, high;
  };

  FI_HOST_DEVICE RawLength load_kv_len(int32_t r) const {
    const int32_t* words = static_cast<const int32_t*>(p.kv_len);
    if (!p.kv_len_is_int64) return {words[r], 0};
    return {words[2 * r], words[2 * r + 1]};
  }

  FI_HOST_DEVICE bool is_legal(const RawLength& kv_len) const {
    return (!p.kv_len_is_int64 || kv_len.high == 0) &&
           static_cast<uint32_t>(kv_len.low) <= static_cast<uint32_t>(p.max_kv_len);
  }

  FI_HOST_DEVICE bool is_negative(const RawLength& kv_len) const {
    return (p.kv_len_is_int64 ? kv_len.high : kv_len.low) < 0;
  }

  // Lengths -> PlannedRequest.
  FI_HOST_DEVICE void place_requests() {
    num_requests_ = min_i32(max_i32(p.num_requests, 0), p.max_requests);
    Lengths lengths = load_lengths(0);
    // Time to use while they are on the way.
    block_.template prepare<kMode.is_narrow ? kNarrowBytes : sizeof(PlanKernelParams)>(p);
    for (int32_t first = 0; first < num_requests_;) {
      const bool is_done = is_careful_ ? place_round<true>(first, lengths)
                                       : place_round<false>(first, lengths);
      if (is_done) {
        first += kPerThread * block_.num_threads();
        if (first < num_requests_) lengths = load_lengths(first);
      } else {
        is_careful_ = true;
        tokens_before_ = first == 0 ? 0 : p.qo_indptr[first];
      }
    }
    if (block_.thread() == 0) s.tile_begin[num_requests_] = sums_.tiles;
    end_tables();
  }

  // Requests of one round, whose tokens are those between neighbours of qo_indptr.
  struct Requests {
    int32_t qo_begin[kPerThread], q_len[kPerThread], kv_len[kPerThread];
    int32_t tile_class[kPerThread], num_tiles[kPerThread];
    Sums sums[kPerThread];
  };

  // As they lie in memory.
  struct Lengths {
    int32_t tokens[kPerThread + 1];
    RawLength kv_len[kPerThread];
  };

  FI_HOST_DEVICE Lengths load_lengths(int32_t first) const {
    const int32_t r0 = first + kPerThread * block_.thread();
    Lengths lengths{};
    for (int32_t i = 0; i <= kPerThread; ++i) {
      if (r0 < num_requests_ && r0 + i <= num_requests_) lengths.tokens[i] = p.qo_indptr[r0 + i];
    }
    for (int32_t i = 0; i < kPerThread; ++i) {
      if (r0 + i < num_requests_) lengths.kv_len[i] = load_kv_len(r0 + i);
    }
    return lengths;
  }

  // kCareful: clamps to capacity, and every clamp sets a status bit. Otherwise lengths are taken to
  // be within contract; false, with nothing done, if they are not: to be called carefully then.
  template <bool kCareful>
  FI_HOST_DEVICE bool place_round(int32_t first, const Lengths& lengths) {
    const int32_t r0 = first + kPerThread * block_.thread();
    Requests requests;
    int32_t bits;
    if constexpr (kCareful) {
      bits = clamp_tokens(r0, lengths.tokens, &requests) | clamp_kv(lengths.kv_len, &requests);
    } else {
      bits = take_lengths(r0, lengths, &requests);
    }
    for (int32_t i = 0; i < kPerThread; ++i) bits |= place_request(i, &requests);
    const uint32_t large_lanes = add_large(&requests, &bits);
    Sums sum;
    for (const Sums& of_request : requests.sums) sum += of_request;
    int32_t all_bits = bits;
    Sums total, before = block_.scan(sum, &total, &all_bits);
    if (!kCareful && (all_bits & kOdd) != 0) return false;
    before += sums_;
    sums_ += total;
    status_ |= all_bits & kStatusMask;
    has_large_ |= (all_bits & kLarge) != 0;
    has_many_large_ |= (all_bits & kManyLarge) != 0;
    if (r0 < num_requests_) write_requests(r0, requests, before, sum.tiles);
    if (large_lanes != 0) spread_large(large_lanes, r0, requests, before);
    return true;
  }

  FI_HOST_DEVICE int32_t take_lengths(int32_t r0, const Lengths& lengths,
                                      Requests* requests) const {
    const auto max_tokens = static_cast<uint32_t>(p.max_tokens);
    bool is_odd = static_cast<uint32_t>(lengths.tokens[0]) > max_tokens ||
                  (r0 == 0 && lengths.tokens[0] != 0);
    for (int32_t i = 0; i < kPerThread; ++i) {
      const int32_t begin = lengths.tokens[i], end = lengths.tokens[i + 1];
      const bool exists = r0 + i < num_requests_;
      is_odd |= exists && (end < begin || static_cast<uint32_t>(end) > max_tokens);
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

  FI_HOST_DEVICE int32_t clamp_kv(const RawLength (&kv_len)[kPerThread],
                                  Requests* requests) const {
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
    const int32_t q_len = requests->q_len[i], kv_len = requests->kv_len[i];
    const int32_t c = tiles_.class_of(tiles_.packed_rows(q_len));
    const int32_t num_tiles = tiles_.num_tiles(q_len, c);
    requests->tile_class[i] = c;
    requests->num_tiles[i] = num_tiles;
    if (kMode.from_start || num_tiles == 1) {
      const Sums only = tiles_.sums_of_only(q_len, kv_len, c);
      if (num_tiles == 1) requests->sums[i] = only;
    }
    requests->sums[i].tiles = num_tiles;
    return num_tiles > 1 ? kLarge : 0;
  }

  // A request of several row tiles, known to all lanes of its thread's warp.
  struct Large {
    int32_t index;  // within its thread
    int32_t q_len, kv_len, num_tiles;
  };

  FI_HOST_DEVICE Large large_of(const Requests& requests) const {
    Large large{0, requests.q_len[0], requests.kv_len[0], requests.num_tiles[0]};
    for (int32_t i = 1; i < kPerThread; ++i) {
      if (requests.num_tiles[i] <= 1) continue;
      large = {i, requests.q_len[i], requests.kv_len[i], requests.num_tiles[i]};
    }
    return large;
  }

  FI_HOST_DEVICE Large from_lane(const Large& large, int32_t from) const {
    return {large.index, block_.shuffle(large.q_len, from), block_.shuffle(large.kv_len, from),
            block_.shuffle(large.num_tiles, from)};
  }

  // Costs of large requests, a lane per row tile, where a warp has few of them; returns the lanes
  // that have one.
  FI_HOST_DEVICE uint32_t add_large(Requests* requests, int32_t* bits) {
    if constexpr (!kMode.is_narrow) {
      if ((*bits & kLarge) != 0) *bits |= kManyLarge;
      return 0;
    } else {
      const uint32_t lanes = block_.ballot((*bits & kLarge) != 0);
      if (lanes == 0) return 0;
      const Large own = large_of(*requests);
      int32_t num_large = 0;
      for (const int32_t tiles : requests->num_tiles) num_large += tiles > 1;
      const bool is_much = num_large > 1 || own.num_tiles > kMostTiles;
      if (block_.ballot(is_much) != 0 || count_bits(lanes) > kMostLarge) {
        *bits |= kManyLarge;
        return 0;
      }
      FI_ROLLED for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
        const int32_t from = lowest_bit(rest);
        const Large large = from_lane(own, from);
        Cost cost = 0;
        FI_ROLLED for (int32_t t = lane(); t < large.num_tiles; t += num_lanes()) {
          cost += cost_of_tile(large, t);
        }
        cost = block_.warp_sum(cost);
        if (lane() != from) continue;
        for (int32_t i = 0; i < kPerThread; ++i) {
          if (i == own.index) requests->sums[i].cost = cost;
        }
      }
      return lanes;
    }
  }

  // Of its tile number t in plan order: descending.
  FI_HOST_DEVICE Cost cost_of_tile(const Large& large, int32_t t) const {
    const int32_t c = tiles_.class_of(tiles_.packed_rows(large.q_len));
    return tiles_
        .sums_of(large.q_len, large.kv_len, c, large.num_tiles, large.num_tiles - 1 - t)
        .cost;
  }

  // Enters the tiles of these lanes' large requests, a lane per row tile. `at`: before the thread.
  FI_HOST_DEVICE void spread_large(uint32_t lanes, int32_t r0, const Requests& requests, Sums at) {
    if constexpr (kMode.is_narrow) {
      const Large own = large_of(requests);
      for (int32_t i = 0; i < kPerThread; ++i) {
        if (i < own.index) at += requests.sums[i];
      }
      FI_ROLLED for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
        const int32_t from = lowest_bit(rest);
        const Large large = from_lane(own, from);
        const int32_t r = block_.shuffle(r0 + own.index, from);
        const int32_t first = block_.shuffle(at.tiles, from);
        Cost before = static_cast<Cost>(block_.shuffle(static_cast<int32_t>(at.cost), from));
        FI_ROLLED for (int32_t t0 = 0; t0 < large.num_tiles; t0 += num_lanes()) {
          const int32_t t = t0 + lane();
          const Cost cost = t < large.num_tiles ? cost_of_tile(large, t) : 0;
          const Cost through = block_.warp_scan(cost);
          if (t < large.num_tiles) {
            s.tile_request[first + t] = r;
            s.cost[first + t] = before + through - cost;
          }
          before += static_cast<Cost>(
              block_.shuffle(static_cast<int32_t>(through), num_lanes() - 1));
        }
      }
    }
  }

  // The requests and the tiles of those that have one; `at`: what is before them.
  FI_HOST_DEVICE void write_requests(int32_t r0, const Requests& requests, Sums at,
                                     int32_t num_tiles) {
    int32_t tile_begin[kPerThread], number[kPerThread];
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
    if (!owns(r0)) return;
    for (int32_t i = 0; i < kPerThread; ++i) {
      if (r0 + i >= num_requests_) return;
      int32_t* to = reinterpret_cast<int32_t*>(out_.requests + r0 + i);
      store_16(to, p.num_kv_heads.value * tile_begin[i], requests.num_tiles[i],
               requests.tile_class[i], requests.qo_begin[i]);
      store_16(to + 4, requests.q_len[i], requests.kv_len[i], 0, 0);
    }
  }

  // What follows the last tile.
  FI_HOST_DEVICE void end_tables() {
    num_tiles_ = sums_.tiles;
    cost_ = sums_.cost;
    if (block_.thread() == 0) {
      s.cost[num_tiles_] = cost_;
      if constexpr (kMode.is_invariant) s.pieces[num_tiles_] = sums_.pieces;
    }
    if constexpr (kMode.is_invariant) {
      num_items_ = p.num_kv_heads.value * static_cast<int32_t>(sums_.pieces >> 32);
      num_partial_rows_ = p.num_kv_heads.value * static_cast<int32_t>(sums_.pieces);
    }
    block_.sync();
  }

  FI_HOST_DEVICE int32_t tiles_of(int32_t r) const { return s.tile_begin[r + 1] - s.tile_begin[r]; }

  // Index of a tile within its request: they are numbered in descending order.
  FI_HOST_DEVICE int32_t index_in_request(int32_t r, int32_t tile) const {
    return s.tile_begin[r + 1] - 1 - tile;
  }

  FI_HOST_DEVICE int32_t class_of_request(int32_t r) const {
    return tiles_.class_of(tiles_.packed_rows(s.q_len[r]));
  }

  // Leaves each request's number where its tiles begin and wherever a warp of sum_costs() does.
  FI_HOST_DEVICE void mark_requests() {
    FI_ROLLED for (int32_t t = 4 * block_.thread(); t < num_tiles_; t += 4 * block_.num_threads()) {
      store_16(s.tile_request + t, -1, -1, -1, -1);
    }
    block_.sync();
    const int32_t run = num_lanes() * kPerThread;
    FI_ROLLED for (int32_t r = block_.thread(); r < num_requests_; r += block_.num_threads()) {
      const int32_t first = s.tile_begin[r], last = s.tile_begin[r + 1];
      if (first < last) s.tile_request[first] = r;
      FI_ROLLED for (int32_t t = (first / run + 1) * run; t < last; t += run) {
        s.tile_request[t] = r;
      }
    }
    block_.sync();
  }

  // Costs anew, tile by tile, where many requests have several: requests spread from their marks.
  FI_HOST_DEVICE void sum_costs() {
    mark_requests();
    sums_ = {};
    FI_ROLLED for (int32_t first = 0; first < num_tiles_;
                   first += kPerThread * block_.num_threads()) {
      const int32_t t0 = first + kPerThread * block_.thread();
      int32_t request[kPerThread], last = -1;
      for (int32_t i = 0; i < kPerThread; ++i) {
        request[i] = t0 + i < num_tiles_ ? s.tile_request[t0 + i] : -1;
        last = max_i32(last, request[i]);
      }
      int32_t r = block_.last_before(last >= 0, last);
      Sums sum, sums[kPerThread];
      for (int32_t i = 0; i < kPerThread; ++i) {
        request[i] = r = request[i] >= 0 ? request[i] : r;
        if (t0 + i >= num_tiles_) continue;
        sums[i] = tiles_.sums_of(s.q_len[r], s.kv_len[r], class_of_request(r), tiles_of(r),
                                 index_in_request(r, t0 + i));
        sum += sums[i];
      }
      Sums total, at = block_.scan(sum, &total);
      at += sums_;
      sums_ += total;
      if (t0 < num_tiles_) write_costs(t0, request, at, sums);
    }
    end_tables();
  }

  FI_HOST_DEVICE void write_costs(int32_t t0, const int32_t (&request)[kPerThread], Sums at,
                                  const Sums (&sums)[kPerThread]) {
    Cost cost[kPerThread];
    for (int32_t i = 0; i < kPerThread; ++i) {
      cost[i] = at.cost;
      if constexpr (kMode.is_invariant) {
        if (t0 + i < num_tiles_) s.pieces[t0 + i] = at.pieces;
      }
      at += sums[i];
    }
    store_run(s.tile_request + t0, request);
    store_run(s.cost + t0, cost);
  }

  // floor(cost_ / P), and the rest.
  FI_HOST_DEVICE Cost share_of_cta(int32_t* rest) const {
    if constexpr (kMode.is_narrow) {
      const int32_t share = p.num_ctas.quotient(static_cast<int32_t>(cost_));
      *rest = static_cast<int32_t>(cost_) - share * p.num_ctas.value;
      return static_cast<Cost>(share);
    } else {
      const Quotient64 share = p.wide.num_ctas.divide(cost_);
      *rest = share.remainder;
      return share.quotient;
    }
  }

  // KV head of a place and the cost before it within that head's tiles of the request: the place is
  // `heads * in_head + rest` after the request's beginning.
  FI_HOST_DEVICE int32_t head_at(Cost in_head, int32_t rest, Cost head_cost, Cost* left) const {
    const int32_t heads = p.num_kv_heads.value;
    if constexpr (kMode.is_narrow) {
      const Quotient32 head =
          small_quotient(in_head, heads, rest, static_cast<int32_t>(head_cost));
      *left = head.remainder;
      return head.quotient;
    } else {
      const int32_t head = quotient_of(heads * in_head + rest, head_cost);
      *left = heads * in_head + rest - head * head_cost;
      return head;
    }
  }

  // The place where span c begins: after floor(W c / P) of the total cost W = heads w. With
  //   w = P share + remainder, remainder c = P a + b:   W c / P = heads (share c + a) + heads b / P
  // all of it is in units of one head's cost, and small. *num_rows: packed rows of its row tile.
  FI_HOST_DEVICE Cut find_cut(int32_t c, int32_t* num_rows) const {
    const int32_t heads = p.num_kv_heads.value;
    Cut cut{heads * num_tiles_, 0, 0, 0};
    *num_rows = 0;
    if (c >= p.num_ctas.value || cost_ == 0) return cut;
    int32_t remainder;
    const Cost share = share_of_cta(&remainder);
    const int32_t a = p.num_ctas.quotient(remainder * c);
    const int32_t b = remainder * c - a * p.num_ctas.value;
    const int32_t rest = p.num_ctas.quotient(heads * b);
    const Cost of_head = share * c + a;
    // Requests start at multiples of all heads' cost; this tile is one of the right request.
    const auto cost_before = [&](int32_t i) { return s.cost[i]; };
    const int32_t near = last_at_most(0, num_tiles_, of_head, cost_before);
    const int32_t r = s.tile_request[near];
    int32_t first = near, last = near + 1;
    if (has_large_) {
      first = s.tile_begin[r];
      last = s.tile_begin[r + 1];
    }
    const Cost begin = s.cost[first];
    Cost budget;
    const int32_t head = head_at(of_head - begin, rest, s.cost[last] - begin, &budget);
    const int32_t tile =
        last - first == 1 ? first : last_at_most(first, last, budget + begin, cost_before);
    cut.tile = heads * first + head * (last - first) + tile - first;
    budget -= s.cost[tile] - begin;
    const int32_t packed_rows = tiles_.packed_rows(s.q_len[r]);
    const int32_t tile_class = tiles_.class_of(packed_rows), index = last - 1 - tile;
    *num_rows = tiles_.row_end(s.q_len[r], tile_class, index) -
                index * tiles_.tile_class(tile_class).rows;
    if constexpr (kMode.is_invariant) {
      cut.step = tiles_.row_tile(s.q_len[r], s.kv_len[r], tile_class, last - first, index)
                     .steps_within(budget);
    } else {
      cut.step = tiles_.steps_within(budget, tile_class);
    }
    return cut;
  }

  // Cuts, then items and partial rows before each. A span that ends inside a tile has an item more
  // than tiles that it leaves behind; pieces of cut tiles are partial, whole tiles are not.
  FI_HOST_DEVICE void cut_spans() {
    const int32_t num_cuts = p.num_ctas.value + 1;
    FI_ROLLED for (int32_t c = block_.thread(); c < num_cuts; c += block_.num_threads()) {
      s.cuts[c] = find_cut(c, &s.cut_tile_rows[c]);
    }
    block_.sync();
    SpanSums sums;
    FI_ROLLED for (int32_t first = 0; first < num_cuts; first += block_.num_threads()) {
      const int32_t c = first + block_.thread();
      SpanSums span;
      if (0 < c && c < num_cuts) {
        const Cut begin = s.cuts[c - 1], end = s.cuts[c];
        const bool leaves_tile = end.tile > begin.tile;
        const bool has_tail = leaves_tile && begin.step > 0;
        const bool has_front = end.step > (leaves_tile ? 0 : begin.step);
        span.items = end.tile - begin.tile + has_front;
        span.rows = (has_tail ? s.cut_tile_rows[c - 1] : 0) + (has_front ? s.cut_tile_rows[c] : 0);
      }
      SpanSums total, before = block_.scan(span, &total);
      before += sums;
      sums += total;
      if (c >= num_cuts) continue;
      const int32_t items = before.items + span.items;
      mark_span(0, c - 1, before.items, items);
      s.cuts[c].items = items;
      s.cuts[c].rows = before.rows + span.rows;
      if (owns(c)) out_.cta_ptr[c] = items;
    }
    num_items_ = sums.items;
    num_partial_rows_ = sums.rows;
    block_.sync();
  }

  // Items are written in rounds, in each round a run by each warp. Runs go round the CTAs, so that
  // few items still spread over the GPU: run k of this CTA is written by warp k of round 0, or a
  // later one.
  FI_HOST_DEVICE int32_t run_begin(int32_t k) const {
    return (block_.times_ctas(k) + block_.cta()) * num_lanes();
  }

  FI_HOST_DEVICE int32_t num_warps() const { return block_.num_threads() / num_lanes(); }

  // Leaves the span's number with this CTA's first item of it in each run of the round. Most spans
  // meet none.
  FI_HOST_DEVICE void mark_span(int32_t round, int32_t span, int32_t begin, int32_t end) {
    // The first run of this CTA that ends after `begin`.
    const int32_t next = begin / num_lanes() - block_.cta() + block_.num_ctas() - 1;
    int32_t k = max_i32(block_.over_ctas(next), round * num_warps());
    FI_ROLLED for (; run_begin(k) < end && k < (round + 1) * num_warps(); ++k) {
      const int32_t at = max_i32(begin - run_begin(k), 0);
      if (begin < end) block_.marks()[(k - round * num_warps()) * num_lanes() + at] = span;
    }
  }

  FI_HOST_DEVICE Place place_of(int32_t tile) const {
    const int32_t heads = p.num_kv_heads.value, near = p.num_kv_heads.quotient(tile);
    const int32_t r = s.tile_request[near];
    if (!has_large_) return {r, tile - heads * near, near, 1, 0};
    const int32_t first = s.tile_begin[r], count = s.tile_begin[r + 1] - first;
    const Quotient32 head =
        small_quotient(static_cast<uint32_t>(tile - heads * first), 1, 0, count);
    const auto in_head = static_cast<int32_t>(head.remainder);
    return {r, head.quotient, first, count, count - 1 - in_head};
  }

  // Item number `item`, which lies in span c.
  FI_HOST_DEVICE Piece piece_at(int32_t c, int32_t item) const {
    const Cut begin = s.cuts[c], end = s.cuts[c + 1];
    const int32_t tile = begin.tile + item - begin.items;
    const bool is_first = item == begin.items, is_front = tile == end.tile;
    Piece piece{place_of(tile), is_first ? begin.step : 0, is_front ? end.step : -1, -1, 0};
    if (is_front) {
      piece.partial_row = end.rows - s.cut_tile_rows[c + 1];
    } else if (piece.step_begin > 0) {
      piece.partial_row = begin.rows;
    }
    if (is_front && piece.step_begin == 0) {
      // The tile's last piece opens the span of the last cut inside it.
      const int32_t last = last_at_most_near(c + 1, p.num_ctas.value, tile,
                                             [&](int32_t i) { return s.cuts[i].tile; });
      piece.num_splits = s.cuts[last].items - item + 1;
    }
    return piece;
  }

  // Batch-invariant mode: items and their partial rows do not depend on the cuts.
  FI_HOST_DEVICE int32_t items_before(int32_t tile) const {
    return static_cast<int32_t>(s.pieces[tile] >> 32);
  }

  FI_HOST_DEVICE int32_t rows_before(int32_t tile) const {
    return static_cast<int32_t>(s.pieces[tile]);
  }

  FI_HOST_DEVICE void cut_chunks() {
    for (int32_t c = block_.thread(); c <= p.num_ctas.value; c += block_.num_threads()) {
      if (!owns(c)) continue;
      int32_t num_rows;
      const Cut cut = find_cut(c, &num_rows);
      out_.cta_ptr[c] = num_items_;
      if (cut.tile >= p.num_kv_heads.value * num_tiles_) continue;
      const Place at = place_of(cut.tile);
      const int32_t first = items_before(at.first), end = items_before(at.first + at.count);
      const int32_t tile = at.first + at.count - 1 - at.index;
      out_.cta_ptr[c] = p.num_kv_heads.value * first + at.head * (end - first) +
                        items_before(tile) - first + cut.step;
    }
  }

  FI_HOST_DEVICE Piece chunk_at(int32_t item) const {
    const int32_t near = last_at_most(0, num_tiles_, item, [&](int32_t i) {
      return p.num_kv_heads.value * static_cast<int64_t>(items_before(i));
    });
    const int32_t r = s.tile_request[near];
    const int32_t first = s.tile_begin[r], last = s.tile_begin[r + 1];
    const int32_t per_head = items_before(last) - items_before(first);
    const int32_t in_request = item - p.num_kv_heads.value * items_before(first);
    const int32_t head = in_request / per_head, in_head = in_request - head * per_head;
    // Requests of several tiles are never cut: an item is a tile.
    if (last - first > 1 || per_head == 1) {
      return {{r, head, first, last - first, last - first - 1 - in_head}, 0, -1, -1, 0};
    }
    const int32_t rows = rows_before(last) - rows_before(first);
    const int32_t row = p.num_kv_heads.value * rows_before(first) + head * rows +
                        in_head * tiles_.packed_rows(s.q_len[r]);
    return {{r, head, first, 1, 0}, in_head, in_head + 1, row, per_head};
  }

  FI_HOST_DEVICE void write_items() {
    FI_ROLLED for (int32_t round = 0;; ++round) {
      const int32_t k = round * num_warps();
      if (run_begin(k) >= num_items_) return;
      const int32_t i = run_begin(k + block_.thread() / num_lanes()) + lane();
      if constexpr (kMode.is_invariant) {
        if (i < num_items_) write_item(i, chunk_at(i));
      } else {
        if (round > 0) mark_spans(round);
        const int32_t mark = block_.marks()[block_.thread()];
        const int32_t before = block_.last_before(mark >= 0, mark);
        if (i < num_items_) write_item(i, piece_at(mark >= 0 ? mark : before, i));
      }
    }
  }

  FI_HOST_DEVICE void mark_spans(int32_t round) {
    block_.sync();
    block_.marks()[block_.thread()] = -1;
    block_.sync();
    FI_ROLLED for (int32_t c = block_.thread(); c < p.num_ctas.value; c += block_.num_threads()) {
      mark_span(round, c, s.cuts[c].items, s.cuts[c + 1].items);
    }
    block_.sync();
  }

  // The item, and with the first item of a tile its merge unit.
  FI_HOST_DEVICE void write_item(int32_t number, const Piece& piece) {
    const auto [r, head, first, count, index] = piece.place;
    const int32_t q_len = s.q_len[r], kv_len = s.kv_len[r], c = class_of_request(r);
    const int32_t unit = p.num_kv_heads.value * first + head * count + index;
    WorkItem item;
    tiles_.fill_item(q_len, kv_len, c, count, index, piece.step_begin, piece.step_end, &item);
    int32_t* to = reinterpret_cast<int32_t*>(out_.items + number);
    store_16(to, r, item.kv_begin, item.kv_end, item.hole_begin);
    store_16(to + 4, item.hole_end, head, s.qo_begin[r], kv_len - q_len);
    store_16(to + 8, item.row_begin, item.num_rows, piece.partial_row, unit);
    store_16(to + 12, c, r, q_len, kv_len);
    if (piece.step_begin > 0) return;
    const bool whole = piece.partial_row < 0;
    store_16(out_.units + unit, whole ? 0 : piece.num_splits, whole ? 0 : piece.partial_row,
             whole ? 0 : piece.num_splits, whole ? 0 : item.num_rows);
  }

  // The last CTA has the fewest items.
  FI_HOST_DEVICE void write_header() {
    if (block_.cta() != block_.num_ctas() - 1 || block_.thread() != 0) return;
    PlanHeader header{};
    header.total_cost = p.num_kv_heads.value * static_cast<int64_t>(cost_);
    header.num_items = num_items_;
    header.num_units = p.num_kv_heads.value * num_tiles_;
    header.num_partial_rows = num_partial_rows_;
    header.num_requests = num_requests_;
    header.status = status_ | (num_requests_ == p.num_requests ? 0 : kPlanTooManyRequests);
    *out_.header = header;
    if (header.status == 0 || !p.status) return;
    // Plans of a stream follow one another: nobody else writes here meanwhile.
    volatile int32_t* status = p.status;
    *status = *status | header.status;
  }

  const PlanKernelParams& p;
  const Scratch<Cost>& s;
  Block& block_;
  const TileRules<kMode> tiles_;
  const Output out_;
  int32_t num_requests_ = 0;
  int32_t num_tiles_ = 0;  // of one KV head
  Cost cost_ = 0;          // of one KV head
  int32_t num_items_ = 0;
  int32_t num_partial_rows_ = 0;
  Sums sums_;                  // over the tiles of rounds done
  int32_t status_ = 0;         // PlanStatus bits
  int32_t tokens_before_ = 0;  // the round, once lengths were found out of contract
  bool is_careful_ = false;
  bool has_large_ = false;
  bool has_many_large_ = false;
};

}  // namespace fi::planner
