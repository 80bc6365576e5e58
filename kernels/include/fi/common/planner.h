// The planner on the device: the bytes of host/planner.cc for a step without nodes.
//
// Every CTA reads all lengths and works out the same tables in its own scratch, with scans where
// the host has loops; then each writes its share of the plan. So no CTA waits for another, and one
// launch does it. The passes are those of the host:
//   place_requests  lengths -> requests, row tiles before each
//   sum_costs       cost of the row tiles before each
//   cut_spans       where the spans of the attention's CTAs begin, items before each
//   write_items     items and merge units, one thread per item
// Block is the CTA as the passes see it: CudaBlock of planner_block.h, or threads of a CPU.
#pragma once

#include "fi/common/planner_params.h"

namespace fi::planner {

// Last index in [low, high) whose value is at most `limit`; values ascend, the first one is. Three
// probes a round hide each other's latency: half the rounds of a binary search.
template <class Value>
FI_HOST_DEVICE int32_t last_at_most(int32_t low, int32_t high, int64_t limit, const Value& value) {
  while (high - low > 1) {
    const int32_t quarter = (high - low + 3) >> 2;
    int32_t passed = 0;
    for (int32_t i = 1; i < 4; ++i) {
      const int32_t at = low + i * quarter;
      passed += at < high && value(min_i32(at, high - 1)) <= limit;
    }
    low += passed * quarter;
    high = min_i32(low + quarter, high);
  }
  return low;
}

struct alignas(16) Quad {
  int32_t x, y, z, w;
};

FI_HOST_DEVICE inline void store_16(void* to, int32_t x, int32_t y, int32_t z, int32_t w) {
  *static_cast<Quad*>(to) = {x, y, z, w};
}

// A row tile of one KV head. `tile` counts as in Scratch.
struct Place {
  int32_t request, head, tile;
};

// One work item to be: KV steps [step_begin, step_end) of a row tile; step_end -1: to its end.
struct Piece {
  Place place;
  int32_t step_begin, step_end;
  int32_t partial_row;  // -1: the whole tile
  int32_t num_splits;   // pieces of the tile; known to its first piece
};

// kInvariant: batch-invariant mode, a kernel of its own so that neither carries the other's code.
template <class Block, bool kInvariant>
class StepPlanner {
 public:
  FI_HOST_DEVICE StepPlanner(const PlanKernelParams& params, const Scratch& scratch, Block& block)
      : p(params), s(scratch), block_(block), out_(params) {}

  FI_HOST_DEVICE void run() {
    place_requests();
    sum_costs();
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

  static constexpr uint32_t kRun = 32;  // consecutive records that one CTA writes

  // True in the one CTA that writes record `index` of an array that all CTAs know.
  FI_HOST_DEVICE bool owns(int32_t index) const {
    const auto run = static_cast<uint32_t>(index) / kRun;
    return run % static_cast<uint32_t>(block_.num_ctas()) == static_cast<uint32_t>(block_.cta());
  }

  FI_HOST_DEVICE int64_t kv_len_of(int32_t r) const {
    return p.kv_len_is_int64 ? static_cast<const int64_t*>(p.kv_len)[r]
                             : static_cast<const int32_t*>(p.kv_len)[r];
  }

  // Query tokens [*begin, *end) of request r, this thread's of the round that starts with request
  // `first`; returns the PlanStatus bits of its qo_indptr. A token belongs to the first request
  // whose end reaches it: a request begins at the maximum of the ends before. If all are in order,
  // as one barrier tells, that maximum is qo_indptr[r] itself; else a scan finds it.
  FI_HOST_DEVICE int32_t token_range(int32_t first, int32_t r, int32_t* begin, int32_t* end) {
    const bool exists = r < num_requests_;
    const int32_t raw_begin = exists ? p.qo_indptr[r] : 0;
    const int32_t raw_end = exists ? p.qo_indptr[r + 1] : 0;
    const bool starts_wrong = r == 0 && raw_begin != 0;
    const bool in_order = raw_begin <= raw_end && !starts_wrong;
    *begin = min_i32(raw_begin, p.max_tokens);
    *end = min_i32(raw_end, p.max_tokens);
    if (block_.any(!in_order) && is_ordered_) {
      is_ordered_ = false;
      tokens_before_ = first == 0 ? 0 : min_i32(p.qo_indptr[first], p.max_tokens);
    }
    if (!is_ordered_) [[unlikely]] {
      int32_t last;
      *begin = max_i32(tokens_before_, block_.scan_max(max_i32(*end, 0), &last));
      tokens_before_ = max_i32(tokens_before_, last);
    }
    if (!exists) *end = *begin;
    const bool is_legal = !exists || (raw_end >= *begin && !starts_wrong);
    *end = max_i32(*end, *begin);
    return (is_legal ? 0 : kPlanBadIndptr) | (raw_end > p.max_tokens ? kPlanTooManyTokens : 0);
  }

  // Lengths -> PlannedRequest, clamped to capacity; every clamp sets a status bit.
  FI_HOST_DEVICE void place_requests() {
    num_requests_ = min_i32(max_i32(p.num_requests, 0), p.max_requests);
    for (int32_t first = 0; first < num_requests_; first += block_.num_threads()) {
      const int32_t r = first + block_.thread();
      const bool exists = r < num_requests_;
      const int64_t kv_len = exists ? kv_len_of(r) : 0;
      int32_t begin, end;
      int32_t bits = token_range(first, r, &begin, &end);
      if (kv_len < 0 || kv_len > p.max_kv_len) bits |= kPlanKvTooLong;
      if (bits != 0) block_.raise(bits);

      PlannedRequest request{};
      request.qo_begin = begin;
      request.q_len = end - begin;
      request.kv_len = kv_len < 0              ? 0
                       : kv_len > p.max_kv_len ? p.max_kv_len
                                               : static_cast<int32_t>(kv_len);
      const int32_t packed_rows = request.q_len * p.tiling.group.value;
      request.tile_class = p.tiling.class_of(packed_rows);
      request.num_tiles = p.tiling.rows[request.tile_class].ceil_quotient(packed_rows);
      int32_t sum;
      const int32_t tile_begin = num_tiles_ + block_.scan_sum(request.num_tiles, &sum);
      num_tiles_ += sum;
      request.unit_base = p.num_kv_heads.value * tile_begin;
      if (exists) place_request(r, tile_begin, request);
    }
    if (block_.thread() == 0) s.tile_begin[num_requests_] = num_tiles_;
    block_.sync();
  }

  FI_HOST_DEVICE void place_request(int32_t r, int32_t tile_begin, const PlannedRequest& request) {
    s.tile_begin[r] = tile_begin;
    s.qo_begin[r] = request.qo_begin;
    s.q_len[r] = request.q_len;
    s.kv_len[r] = request.kv_len;
    if (!owns(r)) return;
    int32_t* to = reinterpret_cast<int32_t*>(out_.requests + r);
    store_16(to, request.unit_base, request.num_tiles, request.tile_class, request.qo_begin);
    store_16(to + 4, request.q_len, request.kv_len, 0, 0);
  }

  FI_HOST_DEVICE int32_t tiles_of(int32_t r) const { return s.tile_begin[r + 1] - s.tile_begin[r]; }

  // Index of a tile within its request: they are numbered in descending order.
  FI_HOST_DEVICE int32_t index_in_request(int32_t r, int32_t tile) const {
    return s.tile_begin[r + 1] - 1 - tile;
  }

  FI_HOST_DEVICE RowTile row_tile(int32_t r, int32_t tile) const {
    PlannedRequest request{};
    request.q_len = s.q_len[r];
    request.kv_len = s.kv_len[r];
    request.num_tiles = tiles_of(r);
    request.tile_class = p.tiling.class_of(request.q_len * p.tiling.group.value);
    RowTile row = request_row_tile(request, p.tiling, 0, index_in_request(r, tile));
    if constexpr (!kInvariant) row.chunk = {};  // as it is: tells the compiler
    return row;
  }

  // Request of a tile; at once where all requests up to it have one tile each.
  FI_HOST_DEVICE int32_t request_of(int32_t tile) const {
    if (tile < num_requests_ && s.tile_begin[tile] == tile && s.tile_begin[tile + 1] > tile) {
      return tile;
    }
    return last_at_most(0, num_requests_, tile, [&](int32_t r) { return s.tile_begin[r]; });
  }

  // Scratch: tile_request, cost and pieces.
  FI_HOST_DEVICE void sum_costs() {
    int64_t pieces_sum = 0;
    for (int32_t first = 0; first < num_tiles_; first += block_.num_threads()) {
      const int32_t tile = first + block_.thread();
      const bool exists = tile < num_tiles_;
      int64_t cost = 0, pieces = 0, sum;
      if (exists) {
        const int32_t r = request_of(tile);
        const RowTile row = row_tile(r, tile);
        const int32_t items = max_i32(1, row.num_steps());
        s.tile_request[tile] = r;
        cost = row.cost();
        pieces = (static_cast<int64_t>(items) << 32) | (items > 1 ? items * row.num_rows : 0);
      }
      cost = total_cost_ + block_.scan_sum(cost, &sum);
      if (exists) s.cost[tile] = cost;
      total_cost_ += sum;
      if constexpr (kInvariant) {
        pieces = pieces_sum + block_.scan_sum(pieces, &sum);
        if (exists) s.pieces[tile] = pieces;
        pieces_sum += sum;
      }
    }
    if (block_.thread() == 0) {
      s.cost[num_tiles_] = total_cost_;
      if constexpr (kInvariant) s.pieces[num_tiles_] = pieces_sum;
    }
    num_items_ = p.num_kv_heads.value * static_cast<int32_t>(pieces_sum >> 32);
    num_partial_rows_ = p.num_kv_heads.value * static_cast<int32_t>(pieces_sum);
    total_cost_ *= p.num_kv_heads.value;
    block_.sync();
  }

  // The place where span c begins: after floor(W c / P) of the total cost W.
  FI_HOST_DEVICE Cut find_cut(int32_t c) const {
    const int64_t heads = p.num_kv_heads.value;
    const Quotient64 share = divide(total_cost_, p.num_ctas);
    const int64_t target = share.quotient * c + p.num_ctas.quotient(share.remainder * c);
    Cut cut{p.num_kv_heads.value * num_tiles_, 0, 0, 0, 0};
    if (target >= total_cost_) return cut;
    // Requests start at multiples of all heads' cost; this tile is one of the right request.
    const int32_t near =
        last_at_most(0, num_tiles_, target, [&](int32_t i) { return heads * s.cost[i]; });
    const int32_t r = s.tile_request[near];
    const int32_t first = s.tile_begin[r], last = s.tile_begin[r + 1];
    const int64_t head_cost = s.cost[last] - s.cost[first];
    const int64_t in_request = target - heads * s.cost[first];
    const int32_t head = quotient_of(in_request, head_cost);
    const int64_t in_head = in_request - head * head_cost + s.cost[first];
    const int32_t tile = last_at_most(first, last, in_head, [&](int32_t i) { return s.cost[i]; });
    const RowTile row = row_tile(r, tile);
    cut.tile = p.num_kv_heads.value * first + head * (last - first) + tile - first;
    // Less than the tile's cost is left: a cut never follows all its steps.
    cut.step = row.steps_within(in_head - s.cost[tile]);
    cut.num_rows = row.num_rows;
    return cut;
  }

  // Cuts, then items and partial rows before each. A span that ends inside a tile has an item more
  // than tiles that it leaves behind; pieces of cut tiles are partial, whole tiles are not.
  FI_HOST_DEVICE void cut_spans() {
    const int32_t num_cuts = p.num_ctas.value + 1;
    for (int32_t c = block_.thread(); c < num_cuts; c += block_.num_threads()) {
      s.cuts[c] = find_cut(c);
    }
    block_.sync();
    int64_t total = 0;
    for (int32_t first = 0; first < num_cuts; first += block_.num_threads()) {
      const int32_t c = first + block_.thread();
      int64_t span = 0, sum;
      if (0 < c && c < num_cuts) {
        const Cut begin = s.cuts[c - 1], end = s.cuts[c];
        const bool leaves_tile = end.tile > begin.tile;
        const bool has_tail = leaves_tile && begin.step > 0;
        const bool has_front = end.step > (leaves_tile ? 0 : begin.step);
        const int32_t rows = (has_tail ? begin.num_rows : 0) + (has_front ? end.num_rows : 0);
        span = (static_cast<int64_t>(end.tile - begin.tile + has_front) << 32) | rows;
      }
      const int64_t before = total + block_.scan_sum(span, &sum) + span;
      total += sum;
      if (c < num_cuts) {
        s.cuts[c].items = static_cast<int32_t>(before >> 32);
        s.cuts[c].rows = static_cast<int32_t>(before);
        if (owns(c)) out_.cta_ptr[c] = static_cast<int32_t>(before >> 32);
      }
    }
    num_items_ = static_cast<int32_t>(total >> 32);
    num_partial_rows_ = static_cast<int32_t>(total);
    block_.sync();
  }

  FI_HOST_DEVICE Place place_of(int32_t tile) const {
    const int32_t r = s.tile_request[p.num_kv_heads.quotient(tile)];
    const int32_t first = s.tile_begin[r], count = tiles_of(r);
    const int32_t in_request = tile - p.num_kv_heads.value * first;
    const int32_t head = static_cast<uint32_t>(in_request) / static_cast<uint32_t>(count);
    return {r, head, first + in_request - head * count};
  }

  FI_HOST_DEVICE Piece piece_at(int32_t item) const {
    const int32_t c =
        last_at_most(0, p.num_ctas.value, item, [&](int32_t i) { return s.cuts[i].items; });
    const Cut begin = s.cuts[c], end = s.cuts[c + 1];
    const int32_t tile = begin.tile + item - begin.items;
    const bool is_first = item == begin.items, is_front = tile == end.tile;
    Piece piece{place_of(tile), is_first ? begin.step : 0, is_front ? end.step : -1, -1, 0};
    if (is_front) {
      // The tile's last piece opens the span of the last cut inside it.
      const int32_t last = last_at_most(c + 1, p.num_ctas.value + 1, tile,
                                        [&](int32_t i) { return s.cuts[i].tile; });
      piece.partial_row = end.rows - end.num_rows;
      piece.num_splits = s.cuts[last].items - item + 1;
    } else if (piece.step_begin > 0) {
      piece.partial_row = begin.rows;
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
      const Cut cut = find_cut(c);
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

  // Runs of items go round the CTAs, so that few items still spread over the GPU.
  FI_HOST_DEVICE void write_items() {
    constexpr int32_t kWarp = Block::kWarp;
    const int32_t first_run = block_.thread() / kWarp * block_.num_ctas() + block_.cta();
    const int32_t stride = block_.num_threads() * block_.num_ctas();
    for (int32_t i = first_run * kWarp + block_.thread() % kWarp; i < num_items_; i += stride) {
      if constexpr (kInvariant) {
        write_item(i, chunk_at(i));
      } else {
        write_item(i, piece_at(i));
      }
    }
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
    header.status = block_.raised() | (num_requests_ == p.num_requests ? 0 : kPlanTooManyRequests);
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
  int64_t total_cost_ = 0;     // of all KV heads, once summed
  int32_t tokens_before_ = 0;  // of the round, once an indptr was out of order
  bool is_ordered_ = true;
};

}  // namespace fi::planner
