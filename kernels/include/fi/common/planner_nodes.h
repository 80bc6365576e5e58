// Nodes in the later passes of the device planner (planner.h): where they are cut, their items,
// what their members add to the plan.
#pragma once

#include "fi/common/planner_tables.h"
#include "fi/plan/whole_pieces.h"

namespace fi::planner {

template <class Block, Mode kMode>
class NodePasses {
  using Cost = typename CostType<kMode>::Type;

 public:
  FI_HOST_DEVICE NodePasses(const PlanKernelParams& params, const Scratch<Cost>& scratch,
                            Block& block, const StepTotals<Cost>& totals)
      : p(params), s(scratch), block_(block), totals_(totals), tiles_(params, block.classes()) {}

  FI_HOST_DEVICE bool has_nodes() const { return totals_.num_nodes > 0; }
  FI_HOST_DEVICE bool has_large() const { return (totals_.findings & kLarge) != 0; }

  // Row tiles of all heads and nodes: they come first in the linear order.
  FI_HOST_DEVICE int32_t num_tiles() const { return p.num_kv_heads.value * totals_.node_tiles; }

  FI_HOST_DEVICE int32_t num_partial_rows() const {
    return of_heads(totals_.num_gathered + totals_.member_tokens);
  }

  // share: floor(one head's cost / CTAs).
  FI_HOST_DEVICE WholePieces find_pieces(Cost share) const {
    if (totals_.num_nodes != 1) return {};
    const NodePlace<Cost> node = s.nodes[0];
    const int32_t heads = p.num_kv_heads.value, c = class_of(node.num_tokens);
    const Cost c_fixed = tiles_.fixed_cost(c, true);
    const NodeTiles tiles = {num_tiles(), tiles_.num_steps(node.tile_cost, c_fixed, c),
                             static_cast<int64_t>(node.tile_cost)};
    const auto request_cost = static_cast<int64_t>(totals_.cost - totals_.node_cost) * heads;
    return find_whole_pieces(tiles, request_cost, static_cast<int64_t>(share) * heads,
                             p.num_ctas.value, p.tiling.classes[0].c_fixed);
  }

  // Where span c begins, one of a node's pieces.
  FI_HOST_DEVICE Cut begin_of_piece(int32_t c, const WholePieces& pieces, int32_t* num_rows) const {
    const Quotient32 tile = small_quotient(c, 1, 0, pieces.per_tile);
    const NodePlace<Cost> node = s.nodes[0];
    const Quotient32 head = small_quotient(tile.quotient, 1, 0, node.num_tiles);
    const int32_t index = node.num_tiles - 1 - static_cast<int32_t>(head.remainder);
    *num_rows = rows_of_tile(node.num_tokens, class_of(node.num_tokens), index, 1);
    return {tile.quotient, pieces.steps_before(static_cast<int32_t>(tile.remainder)), 0, 0};
  }

  // The end of StepPlanner::find_cut(). All tiles of a node cost the same.
  FI_HOST_DEVICE Cut find_cut(Cost of_head, int32_t rest, Cost share, int32_t* num_rows) const {
    const bool is_node = of_head < totals_.node_cost;
    const Cost* table = is_node ? s.node_cost : s.cost;
    const auto cost_before = [&](int32_t i) { return table[i]; };
    const int32_t near =
        last_at_most(0, is_node ? totals_.num_nodes : totals_.num_tiles, of_head, cost_before);
    int32_t first = near, count = 1, num_tokens, is_member = 1;
    Cost tile_cost = 0, head_cost, in_head;
    if (is_node) {
      const NodePlace<Cost> node = s.nodes[near];
      first = node.tile_begin;
      count = node.num_tiles;
      num_tokens = node.num_tokens;
      tile_cost = node.tile_cost;
      head_cost = tile_cost * static_cast<Cost>(count);
      in_head = of_head - table[near];
    } else {
      const int32_t r = s.tile_request[near];
      if (has_large()) {
        first = s.tile_begin[r];
        count = s.tile_begin[r + 1] - first;
      }
      num_tokens = s.q_len[r];
      is_member = has_nodes() ? s.shared_tokens[r] & 1 : 0;
      head_cost = table[first + count] - table[first];
      tile_cost = head_cost;
      in_head = of_head - table[first];
    }
    const int32_t head = tiles_.head_at(in_head, rest, head_cost, &in_head);
    int32_t tile = 0;
    if (is_node) {
      tile = tiles_.tile_at(in_head, tile_cost, &in_head);
    } else if (count > 1) {
      const Cost at = in_head + table[first];
      tile = last_at_most(first, first + count, at, cost_before) - first;
      in_head = at - table[first + tile];
      tile_cost = table[first + tile + 1] - table[first + tile];
    }
    const int32_t c = class_of(num_tokens), index = count - 1 - tile;
    *num_rows = rows_of_tile(num_tokens, c, index, is_member);
    const int32_t before =
        p.num_kv_heads.value * first + head * count + (is_node ? 0 : num_tiles());
    const Cost c_fixed = tiles_.fixed_cost(c, is_node);
    const int32_t step = tiles_.steps_within(in_head, tile_cost, c_fixed, c);
    const Cost span = share * static_cast<Cost>(p.num_kv_heads.value);
    if (tiles_.is_at_end(step, in_head, tile_cost, c_fixed, span, c)) {
      return {before + tile + 1, 0, 0, 0};
    }
    return {before + tile, step, 0, 0};
  }

  // Before spans are known.
  FI_HOST_DEVICE void clear_cuts() {
    FI_ROLLED for (int32_t t = block_.thread(); 2 * t < num_tiles(); t += block_.num_threads()) {
      s.node_cuts[t] = 0;
    }
  }

  // A span ends inside this tile.
  FI_HOST_DEVICE void count_cut(int32_t tile) {
    if (tile < num_tiles()) block_.add(&s.node_cuts[tile >> 1], 1 << ((tile & 1) * 16));
  }

  FI_HOST_DEVICE Place place_of(int32_t tile) const {
    const int32_t heads = p.num_kv_heads.value;
    const bool is_node = tile < num_tiles();
    Place place{};
    if (is_node) {
      const int32_t n = last_at_most(0, totals_.num_nodes, tile,
                                     [&](int32_t i) { return heads * s.nodes[i].tile_begin; });
      place = {~n, 0, s.nodes[n].tile_begin, s.nodes[n].num_tiles, 0};
    } else {
      tile -= num_tiles();
      const int32_t near = p.num_kv_heads.quotient(tile), r = s.tile_request[near];
      place = {r, tile - heads * near, near, 1, 0};
      if (!has_large()) return place;
      place.first = s.tile_begin[r];
      place.count = s.tile_begin[r + 1] - place.first;
    }
    const Quotient32 head =
        small_quotient(static_cast<uint32_t>(tile - heads * place.first), 1, 0, place.count);
    place.head = head.quotient;
    place.index = place.count - 1 - static_cast<int32_t>(head.remainder);
    return place;
  }

  // The item. With the first one of a tile its merge unit or NodeTile, with a node's first one the
  // PlannedNode.
  FI_HOST_DEVICE void write_item(int32_t number, const Piece& piece, const PlanView& plan) const {
    const auto [block, head, first, count, index] = piece.place;
    ForestNode node{};
    ForestRequest shared{};
    OwnPart own;
    int32_t tokens_before = 0, is_member = 1, qo_begin;
    if (block < 0) {
      node = forest_view(p).nodes[~block];
      own = {node.num_tokens, node.kv_begin, node.kv_end};
      tokens_before = qo_begin = node.token_begin;
    } else {
      if (has_nodes()) {
        shared = forest_view(p).requests[block];
        tokens_before = s.shared_tokens[block];
      }
      is_member = tokens_before & 1;
      tokens_before >>= 1;
      own = {s.q_len[block], shared.own_begin, s.kv_len[block]};
      qo_begin = s.qo_begin[block];
    }
    const int32_t packed_rows = tiles_.packed_rows(own.q_len), c = tiles_.class_of(packed_rows);
    const int32_t heads = p.num_kv_heads.value;
    const int32_t unit = heads * first + (block < 0 ? index * heads + head : head * count + index);
    WorkItem item;
    tiles_.fill_range(own, c, block < 0, piece, &item);
    const int32_t row_end = item.row_begin + item.num_rows;
    const bool is_whole = piece.step_begin == 0 && piece.step_end < 0;
    const bool is_partial = !is_whole || is_member;
    int32_t partial_row = piece.partial_row + of_heads(tokens_before);
    if (is_member) partial_row += (head + 1) * packed_rows - row_end;
    if (!is_partial) partial_row = -1;
    const int32_t num_splits = is_whole ? is_member : piece.num_splits;
    const bool is_request = block >= 0;
    item.table_row = is_request ? block : node.table_row;
    item.hole_begin = item.hole_end = 0;
    item.kv_head = head;
    item.qo_begin = qo_begin;
    item.q_pos_begin = is_request ? own.kv_len - own.q_len : 0;
    item.partial_row = partial_row;
    item.unit = unit;
    item.tile_class = c;
    item.request = block;
    item.q_len = is_request ? own.q_len : 0;
    item.kv_len = is_request ? own.kv_len : 0;
    store_item(const_cast<WorkItem*>(plan.items + number), item);
    if (piece.span >= 0) store_item(const_cast<WorkItem*>(plan.first_items + piece.span), item);
    if (piece.step_begin > 0) return;
    if (is_request) {
      const int32_t expected = num_splits + (is_member ? arrivals(piece.place, shared, item) : 0);
      store_16(const_cast<MergeUnit*>(plan.units + unit), expected, is_partial ? partial_row : 0,
               num_splits, is_partial ? item.num_rows : 0);
      return;
    }
    store_16(const_cast<NodeTile*>(plan.node_tiles + unit), partial_row, num_splits, item.num_rows,
             0);
    if (head > 0 || index < count - 1) return;
    PlannedNode* record = const_cast<PlannedNode*>(plan.nodes + ~block);
    store_16(record, p.num_kv_heads.value * first, count, c, node.token_begin);
    store_16(&record->num_tokens, node.num_tokens, node.table_row, node.kv_begin, node.kv_end);
  }

  // Links and gathered tokens. A few lanes take a request: one for each link, or several where
  // there are fewer, which share its tokens. From the last warp on: the first ones write items.
  FI_HOST_DEVICE void write_members(const PlanView& plan) const {
    if (!has_nodes()) return;
    const int32_t log_slots = highest_bit(min_i32(block_.num_lanes(), kMaxForestLevels));
    const int32_t num_warps = block_.num_threads() / block_.num_lanes();
    const int32_t per_warp = block_.num_lanes() >> log_slots;
    const int32_t slot = block_.lane() & ((1 << log_slots) - 1);
    const int32_t warp = block_.times_ctas(num_warps - 1 - block_.warp()) + block_.cta();
    FI_ROLLED for (int32_t r = warp * per_warp + (block_.lane() >> log_slots);
                   r < totals_.num_requests; r += block_.times_ctas(num_warps * per_warp)) {
      const ForestRequest shared = forest_view(p).requests[r];
      const int32_t log_links =
          shared.num_links < 2 ? 0 : min_i32(highest_bit(shared.num_links - 1) + 1, log_slots);
      const int32_t stride = 1 << log_links;
      FI_ROLLED for (int32_t l = slot & (stride - 1); l < shared.num_links; l += stride) {
        const int32_t lanes = 1 << (log_slots - log_links);
        write_link(r, shared.link_begin, l, slot >> log_links, lanes, plan);
      }
    }
  }

 private:
  FI_HOST_DEVICE int32_t of_heads(int32_t num_tokens) const {
    return p.num_kv_heads.value * tiles_.packed_rows(num_tokens);
  }

  FI_HOST_DEVICE int32_t class_of(int32_t num_tokens) const {
    return tiles_.class_of(tiles_.packed_rows(num_tokens));
  }

  // As Scratch::cut_tile_rows has them.
  FI_HOST_DEVICE int32_t rows_of_tile(int32_t num_tokens, int32_t c, int32_t index,
                                      int32_t is_member) const {
    return 2 * (tiles_.row_end(num_tokens, c, index) - index * tiles_.tile_class(c).rows) +
           is_member;
  }

  // Of a node tile, by its place in the linear order.
  FI_HOST_DEVICE int32_t num_splits(int32_t tile) const {
    return 1 + (s.node_cuts[tile >> 1] >> ((tile & 1) * 16) & 0xffff);
  }

  FI_HOST_DEVICE ForestLink link_at(int32_t l) const {
    const Pair link = load_8(forest_view(p).links + l);
    return {link.x, link.y};
  }

  // Link number `l` of request r, and every `stride`-th of its gathered tokens.
  FI_HOST_DEVICE void write_link(int32_t r, int32_t link_begin, int32_t l, int32_t first,
                                 int32_t stride, const PlanView& plan) const {
    const ForestLink link = link_at(link_begin + l);
    const int32_t begin = forest_view(p).nodes[link.node].token_begin + link.token_offset;
    if (first == 0) {
      const NodePlace<Cost> node = s.nodes[link.node];
      const int32_t row_offset = tiles_.packed_rows(link.token_offset);
      const int32_t tile_base = p.num_kv_heads.value * node.tile_begin;
      const int32_t c = class_of(node.num_tokens);
      NodeLink* to = const_cast<NodeLink*>(plan.links + link_begin + l);
      store_16(to, link.node, row_offset, tile_base, c);
      if (l == 0) {
        NodeLink* copy = &const_cast<PlannedRequest*>(plan.requests + r)->first_link;
        store_16(copy, link.node, row_offset, tile_base, c);
      }
    }
    const int32_t token = s.qo_begin[r], q_len = s.q_len[r], q_pos = s.kv_len[r] - q_len;
    GatheredToken* to = const_cast<GatheredToken*>(plan.gathered + begin);
    FI_ROLLED for (int32_t i = first; i < q_len; i += stride) {
      store_16(to + i, token + i, q_pos + i, r, i);
    }
  }

  // Every split of a node tile arrives once at each merge unit whose rows it holds.
  FI_HOST_DEVICE int32_t arrivals(const Place& place, const ForestRequest& shared,
                                  const WorkItem& item) const {
    const int32_t end = shared.link_begin + shared.num_links;
    ForestLink link = s.first_links[place.request];
    int32_t sum = 0;
    FI_ROLLED for (int32_t l = shared.link_begin + 1;; ++l) {
      const ForestLink next = l < end ? link_at(l) : link;
      const NodePlace<Cost> node = s.nodes[link.node];
      const Divisor rows = tiles_.rows(class_of(node.num_tokens));
      const int32_t row = tiles_.packed_rows(link.token_offset) + item.row_begin;
      const int32_t first = rows.quotient(row), last = rows.quotient(row + item.num_rows - 1);
      // In plan order the tiles of a head descend.
      const int32_t begin =
          p.num_kv_heads.value * node.tile_begin + (place.head + 1) * node.num_tiles;
      FI_ROLLED for (int32_t t = first; t <= last; ++t) sum += num_splits(begin - 1 - t);
      if (l >= end) return sum;
      link = next;
    }
  }

  const PlanKernelParams& p;
  const Scratch<Cost>& s;
  Block& block_;
  const StepTotals<Cost>& totals_;
  const TileRules<kMode> tiles_;
};

}  // namespace fi::planner
