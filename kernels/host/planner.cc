#include "host/planner.h"

#include <algorithm>
#include <cstring>

#include "fi/plan/whole_pieces.h"

namespace fi::host {
namespace {

// A typed, writable view of the plan being built.
struct PlanWriter {
  PlanHeader* header;
  int32_t* cta_ptr;
  WorkItem* first_items;
  WorkItem* items;
  MergeUnit* units;
  PlannedRequest* requests;
  PlannedNode* nodes;
  NodeTile* node_tiles;
  NodeLink* links;
  GatheredToken* gathered;
};

PlanWriter write_view(void* plan, const PlanLayout& layout) {
  const PlanView v = view_plan(plan, layout);
  return {const_cast<PlanHeader*>(v.header),    const_cast<int32_t*>(v.cta_ptr),
          const_cast<WorkItem*>(v.first_items), const_cast<WorkItem*>(v.items),
          const_cast<MergeUnit*>(v.units),      const_cast<PlannedRequest*>(v.requests),
          const_cast<PlannedNode*>(v.nodes),    const_cast<NodeTile*>(v.node_tiles),
          const_cast<NodeLink*>(v.links),       const_cast<GatheredToken*>(v.gathered)};
}

// The nodes of a prefix forest as Nodes: their members ascending, from the requests' links.
class ForestNodes {
 public:
  ForestNodes(const ForestView& forest, int32_t num_requests) {
    const int32_t num_nodes = forest.header->num_nodes;
    member_ptr_.assign(1, 0);
    for (int32_t n = 0; n < num_nodes; ++n) {
      const ForestNode& node = forest.nodes[n];
      table_row_.push_back(node.table_row);
      kv_begin_.push_back(node.kv_begin);
      kv_end_.push_back(node.kv_end);
      member_ptr_.push_back(member_ptr_.back() + node.num_members);
    }
    members_.resize(member_ptr_.back());
    std::vector<int32_t> next(member_ptr_.begin(), member_ptr_.end() - 1);
    for (int32_t r = 0; num_nodes > 0 && r < num_requests; ++r) {
      const ForestRequest& request = forest.requests[r];
      for (int32_t l = 0; l < request.num_links; ++l) {
        members_[next[forest.links[request.link_begin + l].node]++] = r;
      }
    }
  }

  Nodes view() const {
    return {static_cast<int32_t>(table_row_.size()),
            table_row_.data(),
            kv_begin_.data(),
            kv_end_.data(),
            member_ptr_.data(),
            members_.data(),
            nullptr};
  }

 private:
  std::vector<int32_t> table_row_, kv_begin_, kv_end_, member_ptr_, members_;
};

// Builds one plan in four passes: requests, nodes, spans, arrivals. The device planner runs the
// same passes with scans in place of loops.
class PlanBuilder {
 public:
  PlanBuilder(const PlanConfig& config, const PlanLayout& layout, void* plan)
      : config_(config),
        layout_(layout),
        tiling_(make_tiling(config)),
        out_(write_view(plan, layout)) {
    std::memset(out_.header, 0, sizeof(PlanHeader));
  }

  int32_t build(const StepLengths& lengths, const Nodes& nodes) {
    place_requests(lengths);
    return build_from(nodes);
  }

  int32_t build(const StepLengths& lengths, const void* forest) {
    place_requests(lengths);
    if (!forest || out_.header->status != kPlanOk) return build_from(Nodes{});
    const ForestView view = view_forest(forest, make_forest_layout(config_.capacity));
    out_.header->status |= view.header->status & kPlanNodesDeclined;
    return build_from(ForestNodes(view, num_requests_).view());
  }

 private:
  // The passes that follow the requests.
  int32_t build_from(const Nodes& nodes) {
    own_begin_.assign(num_requests_, 0);
    if (nodes.own_begin) own_begin_.assign(nodes.own_begin, nodes.own_begin + num_requests_);
    place_nodes(nodes);
    sum_costs();
    cut_spans();
    count_arrivals();
    return out_.header->status;
  }

  // Lengths -> PlannedRequest, clamped to capacity; every clamp sets a status bit.
  void place_requests(const StepLengths& lengths) {
    const PlanCapacity& cap = config_.capacity;
    num_requests_ = std::clamp(lengths.num_requests, 0, cap.max_requests);
    if (num_requests_ != lengths.num_requests) flag(kPlanTooManyRequests);
    int32_t unit_base = 0, token = 0;
    for (int32_t r = 0; r < num_requests_; ++r) {
      int32_t end = lengths.qo_indptr[r + 1];
      if (end < token || (r == 0 && lengths.qo_indptr[0] != 0)) flag(kPlanBadIndptr);
      if (end > cap.max_tokens) flag(kPlanTooManyTokens);
      end = std::clamp(end, token, std::max(token, cap.max_tokens));
      const int64_t kv_len = lengths.kv_len_is_int64
                                 ? static_cast<const int64_t*>(lengths.kv_len)[r]
                                 : static_cast<const int32_t*>(lengths.kv_len)[r];
      if (kv_len < 0 || kv_len > cap.max_kv_len) flag(kPlanKvTooLong);
      PlannedRequest& request = out_.requests[r];
      request.qo_begin = token;
      request.q_len = end - token;
      request.kv_len =
          static_cast<int32_t>(std::clamp<int64_t>(kv_len, 0, config_.capacity.max_kv_len));
      request.tile_class = tiling_.class_of(request.q_len * tiling_.group.value);
      request.num_tiles =
          ceil_div(request.q_len * tiling_.group.value, tiling_.classes[request.tile_class].rows);
      request.unit_base = unit_base;
      request.link_begin = request.link_end = 0;
      request.first_link = {};
      unit_base += config_.num_kv_heads * request.num_tiles;
      token = end;
    }
    out_.header->num_requests = num_requests_;
    out_.header->num_units = unit_base;
    for (int32_t u = 0; u < unit_base; ++u) out_.units[u] = {0, 0, 0, 0};
  }

  // True when node n fits and, in prefix-forest mode, continues what its members share already.
  bool accepts(const Nodes& nodes, int32_t n, int32_t tokens, int32_t members) const {
    const PlanCapacity& cap = config_.capacity;
    const PlanHeader& h = *out_.header;
    if (h.num_nodes + 1 > cap.max_nodes || h.num_links + members > cap.max_links ||
        h.num_gathered + tokens > cap.max_shared_tokens) {
      return false;
    }
    if (nodes.own_begin) return true;
    for (int32_t m = nodes.member_ptr[n]; m < nodes.member_ptr[n + 1]; ++m) {
      if (own_begin_[nodes.members[m]] != nodes.kv_begin[n]) return false;
    }
    return true;
  }

  // Accepted nodes -> PlannedNode, their gathered tokens and node tiles; counts links per request.
  void place_nodes(const Nodes& nodes) {
    accepted_.clear();
    int32_t tile_base = 0;
    PlanHeader& h = *out_.header;
    for (int32_t n = 0; n < nodes.num_nodes; ++n) {
      const int32_t members = nodes.member_ptr[n + 1] - nodes.member_ptr[n];
      int32_t tokens = 0;
      for (int32_t m = nodes.member_ptr[n]; m < nodes.member_ptr[n + 1]; ++m) {
        tokens += out_.requests[nodes.members[m]].q_len;
      }
      if (!accepts(nodes, n, tokens, members)) {
        flag(kPlanNodesDeclined);
        continue;
      }
      PlannedNode& node = out_.nodes[h.num_nodes];
      node.tile_class = tiling_.class_of(tokens * tiling_.group.value);
      node.num_tiles =
          ceil_div(tokens * tiling_.group.value, tiling_.classes[node.tile_class].rows);
      node.tile_base = tile_base;
      node.gather_begin = h.num_gathered;
      node.num_tokens = tokens;
      node.table_row = nodes.table_row[n];
      node.kv_begin = nodes.kv_begin[n];
      node.kv_end = nodes.kv_end[n];
      tile_base += config_.num_kv_heads * node.num_tiles;
      gather_members(nodes, n);
      accepted_.push_back(n);
      h.num_nodes += 1;
      h.num_links += members;
    }
    h.num_node_tiles = tile_base;
    for (int32_t t = 0; t < tile_base; ++t) out_.node_tiles[t] = {0, 0, 0, 0};
    link_members(nodes);
  }

  void gather_members(const Nodes& nodes, int32_t n) {
    for (int32_t m = nodes.member_ptr[n]; m < nodes.member_ptr[n + 1]; ++m) {
      const int32_t r = nodes.members[m];
      PlannedRequest& request = out_.requests[r];
      for (int32_t i = 0; i < request.q_len; ++i) {
        out_.gathered[out_.header->num_gathered++] = {request.qo_begin + i,
                                                      request.kv_len - request.q_len + i, r, i};
      }
      request.link_end += 1;  // a count until link_members() turns it into an end
      if (!nodes.own_begin) own_begin_[r] = nodes.kv_end[n];
    }
  }

  // Requests' link lists, ascending by node, as CSR.
  void link_members(const Nodes& nodes) {
    int32_t next = 0;
    for (int32_t r = 0; r < num_requests_; ++r) {
      const int32_t count = out_.requests[r].link_end;
      out_.requests[r].link_begin = out_.requests[r].link_end = next;
      next += count;
    }
    for (int32_t a = 0; a < out_.header->num_nodes; ++a) {
      const int32_t n = accepted_[a];
      const PlannedNode& node = out_.nodes[a];
      int32_t row_offset = 0;
      for (int32_t m = nodes.member_ptr[n]; m < nodes.member_ptr[n + 1]; ++m) {
        PlannedRequest& request = out_.requests[nodes.members[m]];
        const NodeLink link = {a, row_offset, node.tile_base, node.tile_class};
        if (request.link_end == request.link_begin) request.first_link = link;
        out_.links[request.link_end++] = link;
        row_offset += request.q_len * tiling_.group.value;
      }
    }
  }

  // Row blocks in plan order: nodes first, so that what others wait for is computed early.
  int32_t num_blocks() const { return out_.header->num_nodes + num_requests_; }

  RowTile row_tile(int32_t block, int32_t tile) const {
    const int32_t num_nodes = out_.header->num_nodes;
    if (block < num_nodes) {
      const PlannedNode& node = out_.nodes[block];
      return node_row_tile(node, tiling_, tile);
    }
    const int32_t r = block - num_nodes;
    return request_row_tile(out_.requests[r], tiling_, own_begin_[r], tile);
  }

  int32_t tiles_of(int32_t block) const {
    const int32_t num_nodes = out_.header->num_nodes;
    return block < num_nodes ? out_.nodes[block].num_tiles
                             : out_.requests[block - num_nodes].num_tiles;
  }

  // cost_prefix_: cost of one KV head's row tiles before each (block, tile descending).
  void sum_costs() {
    block_begin_.assign(1, 0);
    cost_prefix_.assign(1, 0);
    for (int32_t b = 0; b < num_blocks(); ++b) {
      for (int32_t t = tiles_of(b) - 1; t >= 0; --t) {
        cost_prefix_.push_back(cost_prefix_.back() + row_tile(b, t).cost());
      }
      block_begin_.push_back(static_cast<int64_t>(cost_prefix_.size()) - 1);
    }
    out_.header->total_cost = config_.num_kv_heads * cost_prefix_.back();
  }

  // A place in the linear order (block, KV head, tile descending, KV step).
  struct Cut {
    int32_t block, head, index;  // index: tiles from the last one down
    int32_t step;                // KV steps of this row tile that lie before the cut
  };

  Cut cut_at(int64_t cost) const {
    const int64_t heads = config_.num_kv_heads;
    if (cost >= out_.header->total_cost) return {num_blocks(), 0, 0, 0};
    // Last block whose start is <= cost; blocks without tiles share their start with the next.
    int32_t low = 0, high = num_blocks();
    while (high - low > 1) {
      const int32_t mid = (low + high) / 2;
      (heads * cost_prefix_[block_begin_[mid]] <= cost ? low : high) = mid;
    }
    const int64_t first = block_begin_[low], last = block_begin_[low + 1];
    const int64_t block_cost = cost_prefix_[last] - cost_prefix_[first];
    const int64_t in_block = cost - heads * cost_prefix_[first];
    const int32_t head = static_cast<int32_t>(in_block / block_cost);
    const int64_t in_head = in_block % block_cost + cost_prefix_[first];
    const auto it =
        std::upper_bound(cost_prefix_.begin() + first, cost_prefix_.begin() + last + 1, in_head);
    const int64_t at = it - cost_prefix_.begin() - 1;
    const int32_t index = static_cast<int32_t>(at - first);
    const RowTile tile = row_tile(low, tiles_of(low) - 1 - index);
    const Cut cut = {low, head, index, tile.steps_within(in_head - cost_prefix_[at])};
    const int64_t rest = cost_prefix_[at + 1] - in_head;
    // Where chunks are whole, less than the tile's cost is left: a cut never follows all its steps.
    const bool moves =
        cut.step == tile.num_steps() || is_short_rest(rest, tile.c_fixed, span_cost());
    return !tile.whole_chunks() && cut.step > 0 && moves ? next_row_tile(cut) : cut;
  }

  Cut next_row_tile(Cut c) const {
    c.step = 0;
    if (++c.index < tiles_of(c.block)) return c;
    c.index = 0;
    if (++c.head < config_.num_kv_heads) return c;
    c.head = 0;
    ++c.block;
    while (c.block < num_blocks() && tiles_of(c.block) == 0) ++c.block;
    return c;
  }

  // The total cost's share of a CTA, as the device planner rounds it.
  int64_t span_cost() const {
    return cost_prefix_.back() / config_.num_ctas * config_.num_kv_heads;
  }

  // Of row tiles of nodes, which come first in the linear order.
  int64_t node_cost() const {
    return config_.num_kv_heads * cost_prefix_[block_begin_[out_.header->num_nodes]];
  }

  WholePieces find_pieces() const {
    if (out_.header->num_nodes != 1 || config_.invariant_chunk > 0) return {};
    const RowTile tile = row_tile(0, 0);
    const NodeTiles node = {out_.header->num_node_tiles, tile.num_steps(), tile.cost()};
    const int64_t request_cost = out_.header->total_cost - node_cost();
    return find_whole_pieces(node, request_cost, span_cost(), config_.num_ctas,
                             tiling_.classes[0].c_fixed);
  }

  // Where span p begins.
  Cut begin_of_span(int32_t p, const WholePieces& pieces) const {
    if (pieces.per_tile == 0) {
      const int64_t total = out_.header->total_cost, p_count = config_.num_ctas;
      return cut_at(total / p_count * p + total % p_count * p / p_count);
    }
    if (p >= pieces.num_ctas) {
      return cut_at(node_cost() + static_cast<int64_t>(p - pieces.num_ctas) * pieces.request_span);
    }
    const int32_t tile = p / pieces.per_tile, count = tiles_of(0);
    return {0, tile / count, tile % count, pieces.steps_before(p % pieces.per_tile)};
  }

  void cut_spans() {
    const WholePieces pieces = find_pieces();
    Cut begin = begin_of_span(0, pieces);
    for (int32_t p = 0; p < config_.num_ctas; ++p) {
      out_.cta_ptr[p] = out_.header->num_items;
      const Cut end = begin_of_span(p + 1, pieces);
      while (begin.block != end.block || begin.head != end.head || begin.index != end.index) {
        emit(begin, -1);
        begin = next_row_tile(begin);
      }
      if (end.step > begin.step) emit(begin, end.step);
      begin = end;
    }
    out_.cta_ptr[config_.num_ctas] = out_.header->num_items;
    for (int32_t p = 0; p < config_.num_ctas; ++p) {
      // In batch-invariant mode a cut on the device does not know the next one.
      const int32_t first = out_.cta_ptr[p];
      const bool is_invariant = config_.invariant_chunk > 0;
      const int32_t end = is_invariant ? out_.header->num_items : out_.cta_ptr[p + 1];
      if (first < end) out_.first_items[p] = out_.items[first];
    }
  }

  // Items for steps [from.step, end_step) of a row tile; end_step -1: to its end.
  void emit(const Cut& from, int32_t end_step) {
    const RowTile tile = row_tile(from.block, tiles_of(from.block) - 1 - from.index);
    const int32_t end = end_step < 0 ? tile.num_steps() : end_step;
    int32_t step = from.step;
    do {
      const int32_t next = tile.whole_chunks() ? min_i32(step + 1, end) : end;
      emit_item(from, tile, step, next);
      step = next;
    } while (step < end);
  }

  void emit_item(const Cut& from, const RowTile& tile, int32_t step_begin, int32_t step_end) {
    PlanHeader& h = *out_.header;
    WorkItem& item = out_.items[h.num_items++];
    const bool is_node = from.block < h.num_nodes;
    const int32_t tile_index = tiles_of(from.block) - 1 - from.index;
    tile.fill_range(step_begin, step_end, &item);
    item.kv_head = from.head;
    item.row_begin = tile.row_begin;
    item.num_rows = tile.num_rows;
    item.tile_class = tile.tile_class;
    if (is_node) {
      const PlannedNode& node = out_.nodes[from.block];
      item.table_row = node.table_row;
      item.qo_begin = node.gather_begin;
      item.q_pos_begin = item.q_len = item.kv_len = 0;
      item.request = ~from.block;
      item.unit = node.tile_base + tile_index * config_.num_kv_heads + from.head;
      item.partial_row = take_partial_rows(tile.num_rows);
      NodeTile& record = out_.node_tiles[item.unit];
      if (record.num_splits++ == 0) record.partial_row = item.partial_row;
      record.num_rows = tile.num_rows;
      return;
    }
    const int32_t r = from.block - h.num_nodes;
    const PlannedRequest& request = out_.requests[r];
    item.table_row = item.request = r;
    item.qo_begin = request.qo_begin;
    item.q_pos_begin = request.kv_len - request.q_len;
    item.q_len = request.q_len;
    item.kv_len = request.kv_len;
    item.unit = request.unit_base + from.head * request.num_tiles + tile_index;
    const bool whole = step_begin == 0 && step_end == tile.num_steps();
    item.partial_row = -1;
    if (whole && request.link_begin == request.link_end) return;
    item.partial_row = take_partial_rows(tile.num_rows);
    MergeUnit& unit = out_.units[item.unit];
    if (unit.num_splits++ == 0) unit.partial_row = item.partial_row;
    unit.num_rows = tile.num_rows;
    unit.expected += 1;
  }

  int32_t take_partial_rows(int32_t rows) {
    const int32_t first = out_.header->num_partial_rows;
    out_.header->num_partial_rows += rows;
    return first;
  }

  // Every split of a node tile arrives once at each merge unit whose rows it holds.
  void count_arrivals() {
    for (int32_t r = 0; r < num_requests_; ++r) {
      const PlannedRequest& request = out_.requests[r];
      const int32_t rows = request.q_len * tiling_.group.value;
      const int32_t tile_rows = tiling_.classes[request.tile_class].rows;
      for (int32_t l = request.link_begin; l < request.link_end; ++l) {
        const NodeLink& link = out_.links[l];
        const PlannedNode& node = out_.nodes[link.node];
        const int32_t node_rows = tiling_.classes[node.tile_class].rows;
        for (int32_t u = 0; u < config_.num_kv_heads * request.num_tiles; ++u) {
          const int32_t head = u / request.num_tiles, tile = u % request.num_tiles;
          const int32_t row_end = min_i32((tile + 1) * tile_rows, rows);
          const int32_t first = (link.row_offset + tile * tile_rows) / node_rows;
          const int32_t last = (link.row_offset + row_end - 1) / node_rows;
          for (int32_t t = first; t <= last; ++t) {
            out_.units[request.unit_base + u].expected +=
                out_.node_tiles[node.tile_base + t * config_.num_kv_heads + head].num_splits;
          }
        }
      }
    }
  }

  void flag(PlanStatus bit) { out_.header->status |= bit; }

  const PlanConfig& config_;
  const PlanLayout& layout_;
  const Tiling tiling_;
  PlanWriter out_;
  int32_t num_requests_ = 0;
  std::vector<int32_t> own_begin_;    // per request: first KV position of its own part
  std::vector<int32_t> accepted_;     // planned node -> input node
  std::vector<int64_t> block_begin_;  // row block -> index into cost_prefix_
  std::vector<int64_t> cost_prefix_;  //
};

}  // namespace

Tiling make_tiling(const PlanConfig& config) {
  Tiling tiling{};
  tiling.group = make_divisor(config.num_qo_heads / config.num_kv_heads);
  if (config.invariant_chunk > 0) tiling.chunk = make_divisor(config.invariant_chunk);
  tiling.band = config.band;
  tiling.num_classes = static_cast<int32_t>(config.classes.size());
  for (int32_t c = 0; c < tiling.num_classes; ++c) {
    tiling.classes[c] = config.classes[c];
    tiling.rows[c] = make_divisor(config.classes[c].rows);
    tiling.kv_tile[c] = make_divisor(config.classes[c].kv_tile);
  }
  return tiling;
}

int32_t make_plan(const PlanConfig& config, const PlanLayout& layout, const StepLengths& lengths,
                  const Nodes& nodes, void* plan) {
  return PlanBuilder(config, layout, plan).build(lengths, nodes);
}

int32_t make_plan(const PlanConfig& config, const PlanLayout& layout, const StepLengths& lengths,
                  const void* forest, void* plan) {
  return PlanBuilder(config, layout, plan).build(lengths, forest);
}

}  // namespace fi::host
