// The planner on the device: the bytes of host/planner.cc for a step without nodes.
//
// Every CTA reads all lengths and works out the same tables in its own scratch, with scans where
// the host has loops; then each writes its share of the plan. So no CTA waits for another, and one
// launch does it. The time is that of one thread's chain of instructions, so there are few passes:
//   place_requests  lengths -> requests; row tiles before each, and their cost
//   sum_costs       the same cost where requests have several row tiles
//   cut_spans       where the spans of the attention's CTAs begin, items before each
//   write_items     items and merge units, one thread per item
// Block is the CTA as the passes see it: CudaBlock of planner_block.h, or threads of a CPU.
#pragma once

#include "fi/common/planner_parts.h"

namespace fi::planner {

// kInvariant: batch-invariant mode, a kernel of its own so that neither carries the other's code.
// kPerThread: requests, or row tiles, that a thread takes in one round; 1 or 4.
template <class Block, bool kInvariant, int32_t kPerThread>
class StepPlanner {
 public:
  FI_HOST_DEVICE StepPlanner(const PlanKernelParams& params, const Scratch& scratch, Block& block)
      : p(params), s(scratch), block_(block), out_(params) {}

  FI_HOST_DEVICE void run() {
    place_requests();
    if (has_large_requests_) sum_costs();
    if constexpr (kInvariant) {
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

  using Sums = TileSums<kInvariant>;

  // Findings of one thread that concern all, beside the PlanStatus bits.
  static constexpr int32_t kOutOfOrder = 1 << 16;  // qo_indptr does not ascend from 0
  static constexpr int32_t kLarge = 1 << 17;       // a request of several row tiles
  static constexpr int32_t kStatusMask = kOutOfOrder - 1;

  // True in the one CTA that writes record `index` of an array that all CTAs know: runs of records
  // go round the CTAs. Few rounds, so that subtracting beats dividing.
  FI_HOST_DEVICE bool owns(int32_t index) const {
    constexpr int32_t kRun = 32;
    int32_t run = index / kRun - block_.cta();
    FI_ROLLED while (run > 0) run -= block_.num_ctas();
    return run == 0;
  }

  // Threads whose last_before() sees each other.
  FI_HOST_DEVICE int32_t num_lanes() const { return min_i32(Block::kWarp, block_.num_threads()); }

  // Row tiles that the lanes of a warp take in one round of sum_costs().
  FI_HOST_DEVICE int32_t tile_run() const { return num_lanes() * kPerThread; }

  FI_HOST_DEVICE void clear_marks() {
    block_.marks()[block_.thread()] = -1;
    FI_ROLLED for (int32_t t = 4 * block_.thread(); t < p.max_row_tiles;
                   t += 4 * block_.num_threads()) {
      store_16(s.tile_request + t, -1, -1, -1, -1);
    }
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

  // Lengths -> PlannedRequest, clamped to capacity; every clamp sets a status bit.
  FI_HOST_DEVICE void place_requests() {
    num_requests_ = min_i32(max_i32(p.num_requests, 0), p.max_requests);
    int32_t first = 0;
    Lengths lengths = load_lengths(0);
    // Time to use while they are on the way.
    block_.await_parameters(p);
    clear_marks();
    while (first < num_requests_) {
      if (place_round(first, lengths)) {
        first += kPerThread * block_.num_threads();
        lengths = load_lengths(first);
      } else {
        is_ordered_ = false;
        tokens_before_ = first == 0 ? 0 : min_i32(p.qo_indptr[first], p.max_tokens);
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

  // False, with nothing done, if qo_indptr turns out not to ascend: to be called again then.
  FI_HOST_DEVICE bool place_round(int32_t first, const Lengths& lengths) {
    const int32_t r0 = first + kPerThread * block_.thread();
    Requests requests;
    int32_t bits = take_tokens(r0, lengths.tokens, &requests);
    for (int32_t i = 0; i < kPerThread; ++i) {
      bits |= place_request(i, lengths.kv_len[i], &requests);
    }
    add_costs(&requests);
    Sums sum;
    for (const Sums& of_request : requests.sums) sum += of_request;
    int32_t all_bits = bits;
    Sums total, before = block_.scan(sum, &total, &all_bits);
    if (is_ordered_ && (all_bits & kOutOfOrder) != 0) return false;
    before += sums_;
    sums_ += total;
    status_ |= all_bits & kStatusMask;
    has_large_requests_ |= (all_bits & kLarge) != 0;
    if (r0 < num_requests_) write_requests(r0, requests, before, sum.tiles, (bits & kLarge) != 0);
    return true;
  }

  // Query tokens of requests r0 and following from their qo_indptr; returns what is wrong with it.
  // A token belongs to the first request whose end reaches it: a request begins at the maximum of
  // the ends before. If all are in order, that is its entry of qo_indptr; else a scan finds it.
  FI_HOST_DEVICE int32_t take_tokens(int32_t r0, const int32_t (&tokens)[kPerThread + 1],
                                     Requests* requests) {
    int32_t bits = 0, begin = min_i32(tokens[0], p.max_tokens);
    if (!is_ordered_) [[unlikely]] {
      Latest latest, last;
      for (int32_t i = 0; i < kPerThread; ++i) latest += {min_i32(tokens[i + 1], p.max_tokens)};
      begin = max_i32(tokens_before_, block_.scan(latest, &last).token);
      tokens_before_ = max_i32(tokens_before_, last.token);
    }
    for (int32_t i = 0; i < kPerThread; ++i) {
      const bool exists = r0 + i < num_requests_;
      const bool starts_wrong = r0 + i == 0 && tokens[0] != 0;
      if (exists && (tokens[i + 1] < tokens[i] || starts_wrong)) bits |= kOutOfOrder;
      if (exists && (tokens[i + 1] < begin || starts_wrong)) bits |= kPlanBadIndptr;
      if (exists && tokens[i + 1] > p.max_tokens) bits |= kPlanTooManyTokens;
      const int32_t end = exists ? max_i32(min_i32(tokens[i + 1], p.max_tokens), begin) : begin;
      requests->qo_begin[i] = begin;
      requests->q_len[i] = end - begin;
      begin = end;
    }
    return bits;
  }

  // All else of request i of this thread; returns findings.
  FI_HOST_DEVICE int32_t place_request(int32_t i, const RawLength& kv_len,
                                       Requests* requests) const {
    const bool fits = is_legal(kv_len);
    PlannedRequest request{};
    request.q_len = requests->q_len[i];
    request.kv_len = fits ? kv_len.low : is_negative(kv_len) ? 0 : p.max_kv_len;
    const int32_t packed_rows = request.q_len * p.tiling.group.value;
    request.tile_class = p.tiling.class_of(packed_rows);
    request.num_tiles = p.tiling.rows[request.tile_class].ceil_quotient(packed_rows);
    requests->kv_len[i] = request.kv_len;
    requests->tile_class[i] = request.tile_class;
    requests->num_tiles[i] = request.num_tiles;
    requests->sums[i].tiles = request.num_tiles;
    return (fits ? 0 : kPlanKvTooLong) | (request.num_tiles > 1 ? kLarge : 0);
  }

  // Costs of requests of one tile; of others they are not known yet.
  FI_HOST_DEVICE void add_costs(Requests* requests) const {
    if (sees_from_start()) {
      for (int32_t i = 0; i < kPerThread; ++i) {
        // The tile's last row is the last token's, which sees all.
        const int64_t cost = cost_of(requests->tile_class[i], requests->kv_len[i]);
        requests->sums[i].cost = requests->num_tiles[i] == 1 ? cost : 0;
      }
      return;
    }
    for (int32_t i = 0; i < kPerThread; ++i) {
      if (requests->num_tiles[i] != 1) continue;
      PlannedRequest request{};
      request.q_len = requests->q_len[i];
      request.kv_len = requests->kv_len[i];
      request.tile_class = requests->tile_class[i];
      request.num_tiles = 1;
      requests->sums[i] = sums_of(row_tile(request, 0));
    }
  }

  // The requests with their tiles: those before them are `at`. Large requests do not know their
  // tiles' costs: they leave their number where the tile begins and wherever a warp of sum_costs()
  // does.
  FI_HOST_DEVICE void write_requests(int32_t r0, const Requests& requests, Sums at,
                                     int32_t num_tiles, bool has_large) {
    int32_t tile_begin[kPerThread], number[kPerThread];
    int64_t cost[kPerThread];
    const bool is_plain = !has_large && num_tiles == kPerThread && at.tiles % kPerThread == 0;
    const int32_t first_tile = at.tiles;
    for (int32_t i = 0; i < kPerThread; ++i) {
      const int32_t r = r0 + i;
      tile_begin[i] = at.tiles;
      number[i] = r;
      cost[i] = at.cost;
      if (requests.num_tiles[i] > 0) {
        if constexpr (kInvariant) s.pieces[at.tiles] = at.pieces;
        if (!is_plain) mark_tiles(r, at, requests.num_tiles[i]);
      }
      if (r < num_requests_ && owns(r)) {
        int32_t* to = reinterpret_cast<int32_t*>(out_.requests + r);
        store_16(to, p.num_kv_heads.value * at.tiles, requests.num_tiles[i], requests.tile_class[i],
                 requests.qo_begin[i]);
        store_16(to + 4, requests.q_len[i], requests.kv_len[i], 0, 0);
      }
      at += requests.sums[i];
    }
    store_run(s.tile_begin + r0, tile_begin);
    store_run(s.qo_begin + r0, requests.qo_begin);
    store_run(s.q_len + r0, requests.q_len);
    store_run(s.kv_len + r0, requests.kv_len);
    if (!is_plain) return;
    store_run(s.tile_request + first_tile, number);
    store_run(s.cost + first_tile, cost);
  }

  FI_HOST_DEVICE void mark_tiles(int32_t r, const Sums& at, int32_t num_tiles) {
    s.tile_request[at.tiles] = r;
    s.cost[at.tiles] = at.cost;
    if (num_tiles == 1) return;
    const int32_t run = tile_run();
    FI_ROLLED for (int32_t t = (at.tiles / run + 1) * run; t < at.tiles + num_tiles; t += run) {
      s.tile_request[t] = r;
    }
  }

  // What follows the last tile.
  FI_HOST_DEVICE void end_tables() {
    if (block_.thread() == 0) {
      s.cost[sums_.tiles] = sums_.cost;
      if constexpr (kInvariant) s.pieces[sums_.tiles] = sums_.pieces;
    }
    num_tiles_ = sums_.tiles;
    total_cost_ = p.num_kv_heads.value * sums_.cost;
    if constexpr (kInvariant) {
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

  FI_HOST_DEVICE RowTile row_tile(const PlannedRequest& request, int32_t index) const {
    RowTile row = request_row_tile(request, p.tiling, 0, index);
    if constexpr (!kInvariant) row.chunk = {};  // as it is: tells the compiler
    return row;
  }

  FI_HOST_DEVICE RowTile row_tile(int32_t r, int32_t tile) const {
    PlannedRequest request{};
    request.q_len = s.q_len[r];
    request.kv_len = s.kv_len[r];
    request.num_tiles = tiles_of(r);
    request.tile_class = p.tiling.class_of(request.q_len * p.tiling.group.value);
    return row_tile(request, index_in_request(r, tile));
  }

  FI_HOST_DEVICE static Sums sums_of(const RowTile& row) {
    Sums sums;
    sums.cost = row.cost();
    sums.tiles = 1;
    sums.add_pieces(max_i32(1, row.num_steps()), row.num_rows);
    return sums;
  }

  // Neither window nor chunks: rows see KV from position 0.
  FI_HOST_DEVICE bool sees_from_start() const { return !kInvariant && p.tiling.band.left < 0; }

  // RowTile::cost() there, of a tile whose rows see KV [0, kv_end) together.
  FI_HOST_DEVICE int64_t cost_of(int32_t tile_class, int32_t kv_end) const {
    const TileClass& tc = p.tiling.classes[tile_class];
    const int32_t num_tiles = p.tiling.kv_tile[tile_class].ceil_quotient(kv_end);
    return tc.c_fixed + static_cast<int64_t>(tc.c_tile) * num_tiles;
  }

  // The same of tile `index` of a request. Without branches, so that a thread's tiles are worked
  // out side by side.
  FI_HOST_DEVICE int64_t cost_from_start(int32_t q_len, int32_t kv_len, int32_t tile_class,
                                         int32_t index) const {
    const Tiling& tiling = p.tiling;
    const int32_t row_end =
        min_i32((index + 1) * tiling.classes[tile_class].rows, q_len * tiling.group.value);
    const int64_t tokens_after =
        q_len - 1 - static_cast<int64_t>(tiling.group.quotient(row_end - 1));
    const int64_t hidden = tiling.band.right < 0 ? 0 : tokens_after - tiling.band.right;
    const int32_t kv_end = hidden <= 0       ? kv_len
                           : hidden < kv_len ? kv_len - static_cast<int32_t>(hidden)
                                             : 0;
    return cost_of(tile_class, kv_end);
  }

  // Costs anew, tile by tile: a request's number stands at its first tile and spreads from there.
  FI_HOST_DEVICE void sum_costs() {
    sums_ = {};
    for (int32_t first = 0; first < num_tiles_; first += kPerThread * block_.num_threads()) {
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
      }
      if (sees_from_start()) {
        for (int32_t i = 0; i < kPerThread; ++i) {
          const bool exists = t0 + i < num_tiles_;
          const int32_t of = exists ? request[i] : 0;
          const int32_t packed_rows = s.q_len[of] * p.tiling.group.value;
          const int64_t cost =
              cost_from_start(s.q_len[of], s.kv_len[of], p.tiling.class_of(packed_rows),
                              exists ? index_in_request(of, t0 + i) : 0);
          sums[i].cost = exists ? cost : 0;
          sums[i].tiles = exists;
        }
      } else {
        for (int32_t i = 0; i < kPerThread; ++i) {
          if (t0 + i < num_tiles_) sums[i] = sums_of(row_tile(request[i], t0 + i));
        }
      }
      for (const Sums& of_tile : sums) sum += of_tile;
      Sums total, at = block_.scan(sum, &total);
      at += sums_;
      sums_ += total;
      if (t0 < num_tiles_) write_costs(t0, request, at, sums);
    }
    end_tables();
  }

  FI_HOST_DEVICE void write_costs(int32_t t0, const int32_t (&request)[kPerThread], Sums at,
                                  const Sums (&sums)[kPerThread]) {
    int64_t cost[kPerThread];
    for (int32_t i = 0; i < kPerThread; ++i) {
      cost[i] = at.cost;
      if constexpr (kInvariant) {
        if (t0 + i < num_tiles_) s.pieces[t0 + i] = at.pieces;
      }
      at += sums[i];
    }
    store_run(s.tile_request + t0, request);
    store_run(s.cost + t0, cost);
  }

  // The place where span c begins: after floor(W c / P) of the total cost W. *num_rows: packed rows
  // of its row tile.
  FI_HOST_DEVICE Cut find_cut(int32_t c, int32_t* num_rows) const {
    const int64_t heads = p.num_kv_heads.value;
    const Quotient64 share = p.long_ctas.divide(total_cost_);
    const int64_t target = share.quotient * c + p.num_ctas.quotient(share.remainder * c);
    Cut cut{p.num_kv_heads.value * num_tiles_, 0, 0, 0};
    *num_rows = 0;
    if (target >= total_cost_) return cut;
    // Requests start at multiples of all heads' cost; this tile is one of the right request.
    const int64_t of_each_head = p.long_kv_heads.divide(target).quotient;
    const int32_t near =
        last_at_most(0, num_tiles_, of_each_head, [&](int32_t i) { return s.cost[i]; });
    const int32_t r = s.tile_request[near];
    const int32_t first = s.tile_begin[r], last = s.tile_begin[r + 1];
    const int64_t head_cost = s.cost[last] - s.cost[first];
    const int64_t in_request = target - heads * s.cost[first];
    const int32_t head = quotient_of(in_request, head_cost);
    const int64_t in_head = in_request - head * head_cost + s.cost[first];
    const int32_t tile = last_at_most(first, last, in_head, [&](int32_t i) { return s.cost[i]; });
    cut.tile = p.num_kv_heads.value * first + head * (last - first) + tile - first;
    // Less than the tile's cost is left: a cut never follows all its steps.
    const int64_t budget = in_head - s.cost[tile];
    const int32_t packed_rows = s.q_len[r] * p.tiling.group.value;
    const int32_t tile_class = p.tiling.class_of(packed_rows);
    const TileClass& tc = p.tiling.classes[tile_class];
    *num_rows = min_i32(tc.rows, packed_rows - (last - 1 - tile) * tc.rows);
    if constexpr (kInvariant) {
      cut.step = row_tile(r, tile).steps_within(budget);
    } else if (budget > tc.c_fixed) {
      cut.step = static_cast<int32_t>(p.c_tile[tile_class].divide(budget - tc.c_fixed).quotient);
    }
    return cut;
  }

  // Cuts, then items and partial rows before each. A span that ends inside a tile has an item more
  // than tiles that it leaves behind; pieces of cut tiles are partial, whole tiles are not.
  FI_HOST_DEVICE void cut_spans() {
    const int32_t num_cuts = p.num_ctas.value + 1;
    for (int32_t c = block_.thread(); c < num_cuts; c += block_.num_threads()) {
      s.cuts[c] = find_cut(c, &s.cut_tile_rows[c]);
    }
    block_.sync();
    SpanSums sums;
    for (int32_t first = 0; first < num_cuts; first += block_.num_threads()) {
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
  // few items still spread over the GPU.
  FI_HOST_DEVICE int32_t run_begin(int32_t round, int32_t warp) const {
    const int32_t num_warps = block_.num_threads() / num_lanes();
    return ((round * num_warps + warp) * block_.num_ctas() + block_.cta()) * num_lanes();
  }

  // Leaves the span's number with this CTA's first item of it in each run of the round.
  FI_HOST_DEVICE void mark_span(int32_t round, int32_t span, int32_t begin, int32_t end) {
    if (begin == end) return;
    FI_ROLLED for (int32_t w = 0; w < block_.num_threads() / num_lanes(); ++w) {
      const int32_t first = run_begin(round, w);
      if (first >= end) return;
      if (begin < first + num_lanes()) {
        block_.marks()[w * num_lanes() + max_i32(begin - first, 0)] = span;
      }
    }
  }

  FI_HOST_DEVICE Place place_of(int32_t tile) const {
    const int32_t r = s.tile_request[p.num_kv_heads.quotient(tile)];
    const int32_t first = s.tile_begin[r], count = tiles_of(r);
    const int32_t in_request = tile - p.num_kv_heads.value * first;
    const int32_t head = count == 1 ? in_request
                                    : static_cast<int32_t>(static_cast<uint32_t>(in_request) /
                                                           static_cast<uint32_t>(count));
    return {r, head, first + in_request - head * count};
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
      const int32_t first = items_before(s.tile_begin[at.request]);
      const int32_t per_head = items_before(s.tile_begin[at.request + 1]) - first;
      out_.cta_ptr[c] = p.num_kv_heads.value * first + at.head * per_head + items_before(at.tile) -
                        first + cut.step;
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
    if (last - first > 1 || per_head == 1) return {{r, head, first + in_head}, 0, -1, -1, 0};
    const int32_t rows = rows_before(last) - rows_before(first);
    const int32_t row = p.num_kv_heads.value * rows_before(first) + head * rows +
                        in_head * (s.q_len[r] * p.tiling.group.value);
    return {{r, head, first}, in_head, in_head + 1, row, per_head};
  }

  FI_HOST_DEVICE void write_items() {
    const int32_t warp = block_.thread() / num_lanes(), lane = block_.thread() % num_lanes();
    for (int32_t round = 0; run_begin(round, 0) < num_items_; ++round) {
      const int32_t i = run_begin(round, warp) + lane;
      if constexpr (kInvariant) {
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
    for (int32_t c = block_.thread(); c < p.num_ctas.value; c += block_.num_threads()) {
      mark_span(round, c, s.cuts[c].items, s.cuts[c + 1].items);
    }
    block_.sync();
  }

  // The item, and with the first item of a tile its merge unit.
  FI_HOST_DEVICE void write_item(int32_t index, const Piece& piece) {
    const auto [r, head, tile] = piece.place;
    const RowTile row = row_tile(r, tile);
    const int32_t step_end = piece.step_end < 0 ? row.num_steps() : piece.step_end;
    const int32_t q_len = s.q_len[r], kv_len = s.kv_len[r];
    const int32_t unit =
        p.num_kv_heads.value * s.tile_begin[r] + head * tiles_of(r) + index_in_request(r, tile);
    WorkItem item;
    row.fill_range(piece.step_begin, step_end, &item);
    int32_t* to = reinterpret_cast<int32_t*>(out_.items + index);
    store_16(to, r, item.kv_begin, item.kv_end, item.hole_begin);
    store_16(to + 4, item.hole_end, head, s.qo_begin[r], kv_len - q_len);
    store_16(to + 8, row.row_begin, row.num_rows, piece.partial_row, unit);
    store_16(to + 12, row.tile_class, r, q_len, kv_len);
    if (piece.step_begin > 0) return;
    const bool whole = piece.partial_row < 0;
    store_16(out_.units + unit, whole ? 0 : piece.num_splits, whole ? 0 : piece.partial_row,
             whole ? 0 : piece.num_splits, whole ? 0 : row.num_rows);
  }

  // The last CTA has the fewest items.
  FI_HOST_DEVICE void write_header() {
    if (block_.cta() != block_.num_ctas() - 1 || block_.thread() != 0) return;
    PlanHeader header{};
    header.total_cost = total_cost_;
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
  const Scratch& s;
  Block& block_;
  const Output out_;
  int32_t num_requests_ = 0;
  int32_t num_tiles_ = 0;  // of one KV head
  int32_t num_items_ = 0;
  int32_t num_partial_rows_ = 0;
  int64_t total_cost_ = 0;     // of all KV heads
  Sums sums_;                  // over the tiles of rounds done
  int32_t status_ = 0;         // PlanStatus bits
  int32_t tokens_before_ = 0;  // the round, once qo_indptr was found out of order
  bool is_ordered_ = true;
  bool has_large_requests_ = false;
};

}  // namespace fi::planner
