// The planner on the device: the bytes of host/planner.cc, for steps without nodes or with those of
// a prefix forest.
//
// Every CTA reads all lengths and works out the same tables in its own scratch, with scans where
// the host has loops; then each writes its share of the plan. So no CTA waits for another, and one
// launch does it. The time is that of one thread's chain of instructions, so there are few passes:
//   StepTables   lengths -> requests and row tiles; tiles before each, and their cost
//   cut_spans    where the spans of the attention's CTAs begin, items before each
//   write_items  items and merge units, one thread per item
// NodePasses is what nodes and their members add to them.
// Block is the CTA as the passes see it: CudaBlock of planner_block.h, or threads of a CPU.
#pragma once

#include "fi/common/planner_nodes.h"

namespace fi::planner {

template <class Block, Mode kMode>
class StepPlanner {
  using Cost = typename CostType<kMode>::Type;

 public:
  FI_HOST_DEVICE StepPlanner(const PlanKernelParams& params, Scratch<Cost>& scratch, Block& block)
      : p(params), s(scratch), block_(block), tiles_(params, block.classes()), out_(params) {}

  FI_HOST_DEVICE void run() {
    totals_ = StepTables<Block, kMode>(p, s, block_).fill(out_.requests);
    if constexpr (kMode.is_invariant) {
      num_items_ = p.num_kv_heads.value * static_cast<int32_t>(totals_.pieces >> 32);
      num_partial_rows_ = p.num_kv_heads.value * static_cast<int32_t>(totals_.pieces);
      cut_chunks();
    } else {
      cut_spans();
    }
    write_items();
    write_header();
    if constexpr (kMode.has_nodes) nodes().write_members(view_plan(p.plan, p.layout));
  }

 private:
  // Where the arrays of the plan lie.
  struct Output {
    FI_HOST_DEVICE explicit Output(const PlanKernelParams& p) {
      const auto at = [&](int64_t offset) -> void* { return static_cast<char*>(p.plan) + offset; };
      header = static_cast<PlanHeader*>(p.plan);
      cta_ptr = static_cast<int32_t*>(at(p.layout.cta_ptr));
      first_items = static_cast<WorkItem*>(at(p.layout.first_items));
      items = static_cast<WorkItem*>(at(p.layout.items));
      units = static_cast<MergeUnit*>(at(p.layout.units));
      requests = static_cast<PlannedRequest*>(at(p.layout.requests));
    }
    PlanHeader* header;
    int32_t* cta_ptr;
    WorkItem *first_items, *items;
    MergeUnit* units;
    PlannedRequest* requests;
  };

  // Mode::has_nodes.
  FI_HOST_DEVICE NodePasses<Block, kMode> nodes() const { return {p, s, block_, totals_}; }

  FI_HOST_DEVICE bool has_large() const { return (totals_.findings & kLarge) != 0; }

  FI_HOST_DEVICE int32_t class_of_request(int32_t r) const {
    return tiles_.class_of(tiles_.packed_rows(s.q_len[r]));
  }

  // floor(cost_ / P), and the rest.
  FI_HOST_DEVICE Cost share_of_cta(int32_t* rest) const {
    if constexpr (kMode.is_narrow) {
      const int32_t share = p.num_ctas.quotient(static_cast<int32_t>(totals_.cost));
      *rest = static_cast<int32_t>(totals_.cost) - share * p.num_ctas.value;
      return static_cast<Cost>(share);
    } else {
      const Quotient64 share = p.wide.num_ctas.divide(totals_.cost);
      *rest = share.remainder;
      return share.quotient;
    }
  }

  // A step's only prefix in whole pieces, if it is.
  FI_HOST_DEVICE WholePieces find_pieces() const {
    if constexpr (!kMode.has_nodes) return {};
    int32_t remainder;
    return nodes().find_pieces(share_of_cta(&remainder));
  }

  // The place where span c begins, where pieces do not say it: after floor(W c / P) of the total
  // cost W = heads w. With
  //   w = P share + remainder, remainder c = P a + b:   W c / P = heads (share c + a) + heads b / P
  // all of it is in units of one head's cost, and small. *num_rows: packed rows of its row tile;
  // with nodes times 2, + 1 where all its pieces are partial.
  FI_HOST_DEVICE Cut find_cut(int32_t c, const WholePieces& pieces, int32_t* num_rows) const {
    const int32_t heads = p.num_kv_heads.value;
    Cut cut{heads * totals_.num_tiles + num_node_tiles(), 0, 0, 0};
    *num_rows = 0;
    if (c >= p.num_ctas.value || totals_.cost == 0) return cut;
    int32_t remainder;
    const Cost share = share_of_cta(&remainder);
    if constexpr (kMode.has_nodes) {
      if (pieces.per_tile > 0) {
        if (c < pieces.num_ctas) return nodes().begin_of_piece(c, pieces, num_rows);
        const int32_t at = (c - pieces.num_ctas) * pieces.request_span;
        const int32_t in_head = p.num_kv_heads.quotient(at);
        const Cost of_head = totals_.node_cost + static_cast<Cost>(in_head);
        if (of_head >= totals_.cost) return cut;
        return nodes().find_cut(of_head, at - in_head * heads, share, num_rows);
      }
    }
    const int32_t a = p.num_ctas.quotient(remainder * c);
    const int32_t b = remainder * c - a * p.num_ctas.value;
    const int32_t rest = p.num_ctas.quotient(heads * b);
    const Cost of_head = share * c + a;
    if constexpr (kMode.has_nodes) return nodes().find_cut(of_head, rest, share, num_rows);
    // Requests start at multiples of all heads' cost; this tile is one of the right request.
    const auto cost_before = [&](int32_t i) { return s.cost[i]; };
    const int32_t near = last_at_most(0, totals_.num_tiles, of_head, cost_before);
    const int32_t r = s.tile_request[near];
    int32_t first = near, last = near + 1;
    if (has_large()) {
      first = s.tile_begin[r];
      last = s.tile_begin[r + 1];
    }
    const Cost begin = s.cost[first];
    Cost budget;
    const int32_t head = tiles_.head_at(of_head - begin, rest, s.cost[last] - begin, &budget);
    const int32_t tile =
        last - first == 1 ? first : last_at_most(first, last, budget + begin, cost_before);
    cut.tile = heads * first + head * (last - first) + tile - first;
    budget -= s.cost[tile] - begin;
    const int32_t packed_rows = tiles_.packed_rows(s.q_len[r]);
    const int32_t tile_class = tiles_.class_of(packed_rows), index = last - 1 - tile;
    *num_rows =
        tiles_.row_end(s.q_len[r], tile_class, index) - index * tiles_.tile_class(tile_class).rows;
    if constexpr (kMode.is_invariant) {
      const OwnPart own{s.q_len[r], 0, s.kv_len[r]};
      cut.step = tiles_.row_tile(own, tile_class, last - first, index).steps_within(budget);
    } else {
      const Cost c_fixed = tiles_.fixed_cost(tile_class, false);
      const Cost tile_cost = s.cost[tile + 1] - s.cost[tile];
      cut.step = tiles_.steps_within(budget, tile_cost, c_fixed, tile_class);
      const Cost span = share * static_cast<Cost>(heads);
      if (tiles_.is_at_end(cut.step, budget, tile_cost, c_fixed, span, tile_class)) {
        cut = {cut.tile + 1, 0, 0, 0};
      }
    }
    return cut;
  }

  // Rows of the row tile of cut c.
  FI_HOST_DEVICE int32_t front_rows(int32_t c) const {
    return kMode.has_nodes ? s.cut_tile_rows[c] >> 1 : s.cut_tile_rows[c];
  }

  // Rows that become partial where a tile ends that was cut: none if it is partial anyway.
  FI_HOST_DEVICE int32_t tail_rows(int32_t c) const {
    if (kMode.has_nodes && (s.cut_tile_rows[c] & 1) != 0) return 0;
    return front_rows(c);
  }

  FI_HOST_DEVICE int32_t num_node_tiles() const {
    return kMode.has_nodes ? nodes().num_tiles() : 0;
  }

  // Cuts, then items and partial rows before each. A span that ends inside a tile has an item more
  // than tiles that it leaves behind; pieces of cut tiles are partial, whole tiles are not.
  FI_HOST_DEVICE void cut_spans() {
    const int32_t num_cuts = p.num_ctas.value + 1;
    if constexpr (kMode.has_nodes) nodes().clear_cuts();
    const WholePieces pieces = find_pieces();
    FI_ROLLED for (int32_t c = block_.thread(); c < num_cuts; c += block_.num_threads()) {
      s.cuts[c] = find_cut(c, pieces, &s.cut_tile_rows[c]);
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
        span.rows = (has_tail ? tail_rows(c - 1) : 0) + (has_front ? front_rows(c) : 0);
        if constexpr (kMode.has_nodes) {
          if (has_front) nodes().count_cut(end.tile);
        }
      }
      SpanSums total, before = block_.scan(span, &total);
      before += sums;
      sums += total;
      if (c >= num_cuts) continue;
      const int32_t items = before.items + span.items;
      mark_span(0, c - 1, before.items, items);
      s.cuts[c].items = items;
      s.cuts[c].rows = before.rows + span.rows;
      if (owns(block_, c)) out_.cta_ptr[c] = items;
    }
    num_items_ = sums.items;
    num_partial_rows_ = sums.rows;
    if constexpr (kMode.has_nodes) {
      num_partial_rows_ += nodes().num_partial_rows();
      block_.end_copies();
    }
    block_.sync();
  }

  // Items are written in rounds, in each round a run by each warp. Runs go round the CTAs, so that
  // few items still spread over the GPU: run k of this CTA is written by warp k of round 0, or a
  // later one.
  FI_HOST_DEVICE int32_t run_begin(int32_t k) const {
    return (block_.times_ctas(k) + block_.cta()) * block_.num_lanes();
  }

  FI_HOST_DEVICE int32_t num_warps() const { return block_.num_threads() / block_.num_lanes(); }

  // Leaves the span's number with this CTA's first item of it in each run of the round. Most spans
  // meet none.
  FI_HOST_DEVICE void mark_span(int32_t round, int32_t span, int32_t begin, int32_t end) {
    // The first run of this CTA that ends after `begin`.
    const int32_t next = begin / block_.num_lanes() - block_.cta() + block_.num_ctas() - 1;
    int32_t k = max_i32(block_.over_ctas(next), round * num_warps());
    FI_ROLLED for (; run_begin(k) < end && k < (round + 1) * num_warps(); ++k) {
      const int32_t at = max_i32(begin - run_begin(k), 0);
      if (begin < end) block_.marks()[(k - round * num_warps()) * block_.num_lanes() + at] = span;
    }
  }

  FI_HOST_DEVICE Place place_of(int32_t tile) const {
    if constexpr (kMode.has_nodes) return nodes().place_of(tile);
    const int32_t heads = p.num_kv_heads.value, near = p.num_kv_heads.quotient(tile);
    const int32_t r = s.tile_request[near];
    if (!has_large()) return {r, tile - heads * near, near, 1, 0};
    const int32_t first = s.tile_begin[r], count = s.tile_begin[r + 1] - first;
    const Quotient32 head =
        small_quotient(static_cast<uint32_t>(tile - heads * first), 1, 0, count);
    const auto in_head = static_cast<int32_t>(head.remainder);
    return {r, head.quotient, first, count, count - 1 - in_head};
  }

  // Item number `item`, which lies in span c.
  FI_HOST_DEVICE Piece piece_at(int32_t c, int32_t item) const {
    const int32_t num_ctas = p.num_ctas.value;
    const Cut begin = s.cuts[c], end = s.cuts[c + 1];
    const int32_t tile_after = s.cuts[min_i32(c + 2, num_ctas)].tile;
    const int32_t tile = begin.tile + item - begin.items;
    const bool is_first = item == begin.items, is_front = tile == end.tile;
    Piece piece{place_of(tile),   is_first ? begin.step : 0, is_front ? end.step : -1, -1, 0,
                is_first ? c : -1};
    if (is_front) {
      piece.partial_row = end.rows - front_rows(c + 1);
    } else if (piece.step_begin > 0) {
      piece.partial_row = begin.rows;
    } else if constexpr (kMode.has_nodes) {
      piece.partial_row = begin.rows + (begin.step > 0 ? tail_rows(c) : 0);
    }
    if (is_front && piece.step_begin == 0) {
      // The tile's last piece opens the span of the last cut inside it: this one, most often.
      int32_t last_item = end.items;
      if (tile_after <= tile) {
        const auto tile_of = [&](int32_t i) { return s.cuts[i].tile; };
        last_item = s.cuts[last_at_most_near(c + 2, num_ctas, tile, tile_of)].items;
      }
      piece.num_splits = last_item - item + 1;
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

  // Where a span is empty, the item that the next one begins with stands for its first: whether the
  // cut after it lies at the same place is not known here.
  FI_HOST_DEVICE void cut_chunks() {
    for (int32_t c = block_.thread(); c <= p.num_ctas.value; c += block_.num_threads()) {
      if (!owns(block_, c)) continue;
      int32_t num_rows;
      const Cut cut = find_cut(c, {}, &num_rows);
      out_.cta_ptr[c] = num_items_;
      if (cut.tile >= p.num_kv_heads.value * totals_.num_tiles) continue;
      const Place at = place_of(cut.tile);
      const int32_t first = items_before(at.first), end = items_before(at.first + at.count);
      const int32_t tile = at.first + at.count - 1 - at.index;
      const int32_t item = p.num_kv_heads.value * first + at.head * (end - first) +
                           items_before(tile) - first + cut.step;
      out_.cta_ptr[c] = item;
      store_item(out_.first_items + c, item_of(chunk_at(item)));
    }
  }

  FI_HOST_DEVICE Piece chunk_at(int32_t item) const {
    const int32_t near = last_at_most(0, totals_.num_tiles, item, [&](int32_t i) {
      return p.num_kv_heads.value * static_cast<int64_t>(items_before(i));
    });
    const int32_t r = s.tile_request[near];
    const int32_t first = s.tile_begin[r], last = s.tile_begin[r + 1];
    const int32_t per_head = items_before(last) - items_before(first);
    const int32_t in_request = item - p.num_kv_heads.value * items_before(first);
    const int32_t head = in_request / per_head, in_head = in_request - head * per_head;
    // Requests of several tiles are never cut: an item is a tile.
    if (last - first > 1 || per_head == 1) {
      return {{r, head, first, last - first, last - first - 1 - in_head}, 0, -1, -1, 0, -1};
    }
    const int32_t rows = rows_before(last) - rows_before(first);
    const int32_t row = p.num_kv_heads.value * rows_before(first) + head * rows +
                        in_head * tiles_.packed_rows(s.q_len[r]);
    return {{r, head, first, 1, 0}, in_head, in_head + 1, row, per_head, -1};
  }

  FI_HOST_DEVICE void write_items() {
    FI_ROLLED for (int32_t round = 0;; ++round) {
      const int32_t k = round * num_warps();
      if (run_begin(k) >= num_items_) return;
      const int32_t i = run_begin(k + block_.warp()) + block_.lane();
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

  // The item of a request; no nodes.
  FI_HOST_DEVICE WorkItem item_of(const Piece& piece) const {
    const auto [r, head, first, count, index] = piece.place;
    const int32_t q_len = s.q_len[r], kv_len = s.kv_len[r], c = class_of_request(r);
    WorkItem item;
    tiles_.fill_item({q_len, 0, kv_len}, c, count, index, piece.step_begin, piece.step_end, &item);
    item.table_row = item.request = r;
    item.kv_head = head;
    item.qo_begin = s.qo_begin[r];
    item.q_pos_begin = kv_len - q_len;
    item.partial_row = piece.partial_row;
    item.unit = p.num_kv_heads.value * first + head * count + index;
    item.tile_class = c;
    item.q_len = q_len;
    item.kv_len = kv_len;
    return item;
  }

  // The item, and with the first item of a tile its merge unit.
  FI_HOST_DEVICE void write_item(int32_t number, const Piece& piece) {
    if constexpr (kMode.has_nodes) {
      nodes().write_item(number, piece, view_plan(p.plan, p.layout));
      return;
    }
    const WorkItem item = item_of(piece);
    store_item(out_.items + number, item);
    if (piece.span >= 0) store_item(out_.first_items + piece.span, item);
    if (piece.step_begin > 0) return;
    const bool whole = piece.partial_row < 0;
    store_16(out_.units + item.unit, whole ? 0 : piece.num_splits, whole ? 0 : piece.partial_row,
             whole ? 0 : piece.num_splits, whole ? 0 : item.num_rows);
  }

  // The last CTA has the fewest items.
  FI_HOST_DEVICE void write_header() {
    if (block_.cta() != block_.num_ctas() - 1 || block_.thread() != 0) return;
    PlanHeader header{};
    header.total_cost = p.num_kv_heads.value * static_cast<int64_t>(totals_.cost);
    header.num_items = num_items_;
    header.num_units = p.num_kv_heads.value * totals_.num_tiles;
    header.num_partial_rows = num_partial_rows_;
    header.num_requests = totals_.num_requests;
    header.status = (totals_.findings & kStatusMask) |
                    (totals_.num_requests == p.num_requests ? 0 : kPlanTooManyRequests);
    if constexpr (kMode.has_nodes) {
      header.num_nodes = totals_.num_nodes;
      header.num_node_tiles = nodes().num_tiles();
      header.num_links = totals_.num_links;
      header.num_gathered = totals_.num_gathered;
    }
    *out_.header = header;
    if (header.status == 0 || !p.status) return;
    // Plans of a stream follow one another: nobody else writes here meanwhile.
    volatile int32_t* status = p.status;
    *status = *status | header.status;
  }

  const PlanKernelParams& p;
  Scratch<Cost>& s;
  Block& block_;
  const TileRules<kMode> tiles_;
  const Output out_;
  StepTotals<Cost> totals_;
  int32_t num_items_ = 0;
  int32_t num_partial_rows_ = 0;
};

}  // namespace fi::planner
