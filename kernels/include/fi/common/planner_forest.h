// The prefix forest (fi/plan/forest.h) as the tables of the device planner take it in.
#pragma once

#include "fi/common/planner_tiles.h"

namespace fi::planner {

// What was read once stays in the L1 cache: later passes read it again instead of keeping it.
FI_HOST_DEVICE inline ForestView forest_view(const PlanKernelParams& p) {
  PlanCapacity capacity{};  // the rest of it moves nothing
  capacity.max_requests = p.max_requests;
  capacity.max_nodes = p.max_nodes;
  return view_forest(p.forest, make_forest_layout(capacity));
}

// Header and nodes. Each thread takes a node, beside its requests: one scan sums both.
template <class Block, Mode kMode>
class ForestTables {
  using Cost = typename CostType<kMode>::Type;
  using Sums = typename SumsType<kMode>::Type;

 public:
  FI_HOST_DEVICE ForestTables(const PlanKernelParams& params, const Scratch<Cost>& scratch,
                              Block& block)
      : p(params), s(scratch), block_(block), tiles_(params, block.classes()) {}

  // Asks for the header and this thread's first node, of which there may be none.
  FI_HOST_DEVICE void load(bool is_wanted) {
    if (is_wanted) {
      const Quad header = load_16(forest_view(p).header);
      header_ = {header.x, header.y, header.z, header.w};
    }
    load_node(0, p.max_nodes);
  }

  FI_HOST_DEVICE void ignore() { header_ = {}; }

  FI_HOST_DEVICE const ForestHeader& header() const { return header_; }
  FI_HOST_DEVICE bool has_nodes() const { return header_.num_nodes > 0; }

  // More nodes follow than this round takes.
  FI_HOST_DEVICE bool has_rounds() const {
    return first_node_ + block_.num_threads() < header_.num_nodes;
  }

  FI_HOST_DEVICE void next_round() {
    load_node(first_node_ + block_.num_threads(), header_.num_nodes);
  }

  // After the last round of nodes.
  FI_HOST_DEVICE void end_rounds() { first_node_ = header_.num_nodes; }

  // Words of the sums that are not zero in the whole warp. A vote is known to be the same in all
  // its lanes: scans need not provide for any that stay behind.
  FI_HOST_DEVICE int32_t num_words() const {
    if (!has_nodes()) return 2;
    return block_.ballot(number() < header_.num_nodes) != 0 ? 5 : 3;
  }

  // This thread's node, if it has one.
  FI_HOST_DEVICE NodePlace<Cost> add_node(Sums* sum) const {
    NodePlace<Cost> place{};
    if (number() >= header_.num_nodes) return place;
    const int32_t c = tiles_.class_of(tiles_.packed_rows(node_.num_tokens));
    place.num_tiles = tiles_.num_tiles(node_.num_tokens, c);
    place.num_tokens = node_.num_tokens;
    place.tile_cost = tiles_.sums_of_range(c, node_.kv_begin, node_.kv_end).cost +
                      node_fixed(tiles_.tile_class(c).rows);
    sum->node_tiles = place.num_tiles;
    sum->node_cost = place.tile_cost * static_cast<Cost>(place.num_tiles);
    return place;
  }

  FI_HOST_DEVICE void write_node(NodePlace<Cost> place, const Sums& before) const {
    if (number() >= header_.num_nodes) return;
    place.tile_begin = before.node_tiles;
    s.nodes[number()] = place;
    s.node_cost[number()] = before.node_cost;
  }

  // What follows the last node: searches end there.
  FI_HOST_DEVICE void end_tables(const Sums& all) const {
    s.nodes[header_.num_nodes].tile_begin = all.node_tiles;
    s.node_cost[header_.num_nodes] = all.node_cost;
  }

  // Copies the first link of request r, which items want, while others are at work. There may be
  // none where the forest is not of these lengths.
  FI_HOST_DEVICE void copy_first_link(int32_t r, const ForestRequest& shared) const {
    const bool exists =
        static_cast<uint32_t>(shared.link_begin) < static_cast<uint32_t>(header_.num_links);
    if (shared.num_links <= 0 || !exists) return;
    block_.copy_8(s.first_links + r, forest_view(p).links + shared.link_begin);
  }

 private:
  FI_HOST_DEVICE int32_t number() const { return first_node_ + block_.thread(); }

  FI_HOST_DEVICE void load_node(int32_t first, int32_t end) {
    first_node_ = first;
    if (number() < end) node_ = forest_view(p).nodes[number()];
  }

  const PlanKernelParams& p;
  const Scratch<Cost>& s;
  Block& block_;
  const TileRules<kMode> tiles_;
  ForestHeader header_{};
  ForestNode node_{};
  int32_t first_node_ = 0;
};

}  // namespace fi::planner
