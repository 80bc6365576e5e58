// How a step with one prefix is cut. The host planner and its twin on the device decide with these
// functions alone.
#pragma once

#include "fi/plan/divide.h"

namespace fi {

// A node's row tiles, of all KV heads. All cost the same.
struct NodeTiles {
  int32_t count;
  int32_t num_steps;  // of each
  int64_t cost;       //
};

// The row tiles of a step's only node in equal pieces, each the span of one CTA; requests share the
// other CTAs. Cut by cost alone, a tile's pieces differ, its CTAs begin more often than they need
// to, and every request waits for the last of them.
//
// Worked example: 16 tiles of 64 steps, each of which costs as much as 5.7 of 264 spans. So a span
// holds 11.2 steps; pieces of 10 and 11 of them are 6 a tile and take 96 CTAs, and requests have
// 168 left, which are 3 % fewer than their cost asks for.
struct WholePieces {
  int32_t per_tile;      // 0: spans are cut by cost alone
  int32_t num_steps;     // of a piece, at least
  int32_t num_longer;    // pieces of each tile that have a step more: the first ones
  int32_t num_ctas;      // of all pieces
  int32_t request_span;  // cost of a span of requests

  // Steps of a tile before its piece number `piece`.
  FI_HOST_DEVICE int32_t steps_before(int32_t piece) const {
    return piece * num_steps + min_i32(piece, num_longer);
  }
};

// span: the total cost's share of one of num_ctas < 2^15 CTAs; c_fixed: what a request's tile costs
// to begin.
// Of the two lengths of a piece nearest to a span's the shorter one is taken that leaves requests
// enough CTAs: their spans may grow by an eighth, and by no more than c_fixed. Where spans are
// long, a third of a millisecond, nothing is to be won. Source:
// docs/notes/2026-11-28-whole-pieces.md.
FI_HOST_DEVICE inline WholePieces find_whole_pieces(const NodeTiles& node, int64_t request_cost,
                                                    int64_t span, int32_t num_ctas,
                                                    int32_t c_fixed) {
  constexpr int32_t kMaxSteps = 1 << 16, kMaxSpan = 1 << 15;  // quotients below 2^16
  if (span >= kMaxSpan || span >= node.cost || request_cost < 1) return {};
  if (node.num_steps < 1 || node.num_steps >= kMaxSteps) return {};
  const auto mean = static_cast<int32_t>(span), requests = static_cast<int32_t>(request_cost);
  const int32_t longest = mean + min_i32(mean / 8, c_fixed);
  int32_t steps = small_quotient(mean, node.num_steps, 0, static_cast<int32_t>(node.cost)).quotient;
  FI_ROLLED for (int32_t end = steps + 2; steps < end; ++steps) {
    if (steps < 1) continue;
    const int32_t per_tile = small_quotient(node.num_steps, 1, steps - 1, steps).quotient;
    const int32_t left = num_ctas - per_tile * node.count;
    if (left < 1) continue;
    const int32_t request_span = small_quotient(requests, 1, left - 1, left).quotient;
    if (request_span > longest) continue;
    const Quotient32 each = small_quotient(node.num_steps, 1, 0, per_tile);
    return {per_tile, each.quotient, static_cast<int32_t>(each.remainder), num_ctas - left,
            request_span};
  }
  return {};
}

}  // namespace fi
