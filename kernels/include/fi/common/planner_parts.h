// What the passes of the device planner (planner.h) are made of: searches, sums that scans carry,
// and places in the plan.
#pragma once

#include "fi/common/planner_params.h"

namespace fi::planner {

FI_HOST_DEVICE inline int32_t count_bits(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __popc(word);
#else
  return __builtin_popcount(word);
#endif
}

// Number of the lowest bit that is set; there is one.
FI_HOST_DEVICE inline int32_t lowest_bit(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __ffs(static_cast<int32_t>(word)) - 1;
#else
  return __builtin_ctz(word);
#endif
}

// Number of the highest bit that is set; there is one.
FI_HOST_DEVICE inline int32_t highest_bit(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return 31 - __clz(static_cast<int32_t>(word));
#else
  return 31 - __builtin_clz(word);
#endif
}

// Last index in [low, high) whose value is at most `limit`; values ascend, the first one is and
// value(high) is not. Three probes a round hide each other's latency: half the rounds of a binary
// search. Strides are powers of four, so that they are known before the round.
template <class Limit, class Value>
FI_HOST_DEVICE int32_t last_at_most(int32_t low, int32_t high, Limit limit, const Value& value) {
  if (high - low <= 1) return low;
  FI_ROLLED for (int32_t stride = 1 << (highest_bit(high - low - 1) & ~1); stride > 0;
                 stride >>= 2) {
    const int32_t first = min_i32(low + stride, high), second = min_i32(low + 2 * stride, high);
    const int32_t third = min_i32(low + 3 * stride, high);
    const bool one = value(first) <= limit, two = value(second) <= limit;
    const bool three = value(third) <= limit;
    low = three ? third : two ? second : one ? first : low;
  }
  return low;
}

// The same where the answer is near `low`: steps from there grow fourfold.
template <class Limit, class Value>
FI_HOST_DEVICE int32_t last_at_most_near(int32_t low, int32_t high, Limit limit,
                                         const Value& value) {
  int32_t step = 1;
  FI_ROLLED while (low + step < high && value(low + step) <= limit) {
    low += step;
    step *= 4;
  }
  return last_at_most(low, min_i32(low + step, high), limit, value);
}

// True in the one CTA that writes record `index` of an array that all CTAs know: runs of records go
// round the CTAs.
template <class Block>
FI_HOST_DEVICE bool owns(const Block& block, int32_t index) {
  const int32_t run = index >> 5;
  return run - block.times_ctas(block.over_ctas(run)) == block.cta();
}

struct alignas(16) Quad {
  int32_t x, y, z, w;
};

FI_HOST_DEVICE inline Quad load_16(const void* from) { return *static_cast<const Quad*>(from); }

struct alignas(8) Pair {
  int32_t x, y;
};

FI_HOST_DEVICE inline Pair load_8(const void* from) { return *static_cast<const Pair*>(from); }

FI_HOST_DEVICE inline void store_16(void* to, int32_t x, int32_t y, int32_t z, int32_t w) {
  *static_cast<Quad*>(to) = {x, y, z, w};
}

FI_HOST_DEVICE inline void store_item(WorkItem* to, const WorkItem& item) {
  const auto* from = reinterpret_cast<const Quad*>(&item);
  for (int32_t i = 0; i < 4; ++i) reinterpret_cast<Quad*>(to)[i] = from[i];
}

// Consecutive entries of one thread, `to` on a multiple of them: 16 bytes at a time where there are
// four, which neighbours do without bank conflicts.
template <class T, int32_t kCount>
FI_HOST_DEVICE void store_run(T* to, const T (&values)[kCount]) {
  constexpr int32_t kQuad = 16 / sizeof(T);
  struct alignas(kCount % kQuad == 0 ? 16 : sizeof(T)) Part {
    T values[kCount % kQuad == 0 ? kQuad : 1];
  };
  constexpr int32_t kPart = sizeof(Part) / sizeof(T);
  for (int32_t i = 0; i < kCount; i += kPart) {
    Part part;
    for (int32_t j = 0; j < kPart; ++j) part.values[j] = values[i + j];
    *reinterpret_cast<Part*>(to + i) = part;
  }
}

// What is summed over row tiles. kIsWords: two sums of 32 bits, for which scans have a shorter way.
// mapped(): each member through a function.
template <class Cost>
struct TileSums {
  static constexpr bool kIsWords = sizeof(Cost) == 4;
  Cost cost = 0;
  int32_t tiles = 0;

  FI_HOST_DEVICE void add_pieces(int32_t, int32_t) {}
  template <class Map>
  FI_HOST_DEVICE TileSums mapped(const Map& map) const {
    return {map(cost), map(tiles)};
  }
  FI_HOST_DEVICE void operator+=(const TileSums& other) {
    cost += other.cost;
    tiles += other.tiles;
  }
};

// The same in batch-invariant mode.
struct ChunkSums {
  static constexpr bool kIsWords = false;
  int64_t cost = 0;
  int64_t pieces = 0;  // items << 32 | partial rows
  int32_t tiles = 0;

  FI_HOST_DEVICE void add_pieces(int32_t items, int32_t num_rows) {
    pieces += (static_cast<int64_t>(items) << 32) | (items > 1 ? items * num_rows : 0);
  }
  template <class Map>
  FI_HOST_DEVICE ChunkSums mapped(const Map& map) const {
    return {map(cost), map(pieces), map(tiles)};
  }
  FI_HOST_DEVICE void operator+=(const ChunkSums& other) {
    cost += other.cost;
    pieces += other.pieces;
    tiles += other.tiles;
  }
};

// The same beside nodes. Words that are zero in many warps stand last.
template <class Cost>
struct SharedSums {
  static constexpr bool kIsWords = sizeof(Cost) == 4;
  Cost cost = 0;  // of requests
  int32_t tiles = 0;
  int32_t tokens = 0;  // query tokens of members
  Cost node_cost = 0;
  int32_t node_tiles = 0;

  FI_HOST_DEVICE void add_pieces(int32_t, int32_t) {}
  template <class Map>
  FI_HOST_DEVICE SharedSums mapped(const Map& map) const {
    return {map(cost), map(tiles), map(tokens), map(node_cost), map(node_tiles)};
  }
  FI_HOST_DEVICE void operator+=(const SharedSums& other) {
    cost += other.cost;
    tiles += other.tiles;
    tokens += other.tokens;
    node_cost += other.node_cost;
    node_tiles += other.node_tiles;
  }
};

// What is summed over spans.
struct SpanSums {
  static constexpr bool kIsWords = true;
  int32_t items = 0;
  int32_t rows = 0;  // partial ones

  template <class Map>
  FI_HOST_DEVICE SpanSums mapped(const Map& map) const {
    return {map(items), map(rows)};
  }
  FI_HOST_DEVICE void operator+=(const SpanSums& other) {
    items += other.items;
    rows += other.rows;
  }
};

// A "sum" that is a maximum, of numbers from 0 on.
struct Latest {
  static constexpr bool kIsWords = false;
  int32_t token = 0;

  template <class Map>
  FI_HOST_DEVICE Latest mapped(const Map& map) const {
    return {map(token)};
  }
  FI_HOST_DEVICE void operator+=(const Latest& other) { token = max_i32(token, other.token); }
};

// Query tokens of a request, and the KV that it reads by itself.
struct OwnPart {
  int32_t q_len;
  int32_t kv_begin;  // 0 without nodes
  int32_t kv_len;    // its end
};

// A row tile of one KV head of a request, or a node, whose tiles begin at `first`, counted as in
// Scratch.
struct Place {
  int32_t request;  // or ~node
  int32_t head, first;
  int32_t count;  // tiles of the row block
  int32_t index;  // of this one
};

// One work item to be: KV steps [step_begin, step_end) of a row tile; step_end -1: to its end.
struct Piece {
  Place place;
  int32_t step_begin, step_end;
  int32_t partial_row;  // as Cut::rows counts them; -1: the whole tile
  int32_t num_splits;   // pieces of the tile; known to its first piece
  int32_t span;         // that begins with this piece; -1: none does
};

}  // namespace fi::planner
