// Compile-time shape of the sm80-class kernel: what the JIT's generated line names, and where its
// shared memory goes. Host code includes this too: it must know how much to ask for.
#pragma once

#include "fi/core/types.h"

namespace fi::sm80 {

FI_HOST_DEVICE constexpr int max_int(int a, int b) { return a > b ? a : b; }
template <class... Ints>
FI_HOST_DEVICE constexpr int most_of(int first, Ints... others) {
  ((first = max_int(first, others)), ...);
  return first;
}
FI_HOST_DEVICE constexpr int min_int(int a, int b) { return a < b ? a : b; }
FI_HOST_DEVICE constexpr int log_of(int power) { return power > 1 ? 1 + log_of(power / 2) : 0; }

// How many warps split the rows of a tile.
FI_HOST_DEVICE constexpr int warps_of_rows(int rows, int num_warps) {
  return min_int(max_int(rows / 16, 1), num_warps);
}

// Rows of the smallest tiles, whose products widen no fp8.
constexpr int kNarrowRows = 8;

// A tile class: `kRows` packed query rows by `kKvTile` KV tokens, in `kStages` shared-memory
// stages, for CTAs of `kWarps` warps. Warps split the rows into blocks of 16 or 32 first, then the
// KV tokens; states of the same rows merge at the end of an item. 16 rows leave warps past the
// fourth idle: a warp takes at least 16 tokens. Tiles of kNarrowRows are narrow: what multiplies
// them has tokens where others have rows (narrow_loop.h).
template <int kRows_, int kKvTile_, int kStages_, int kWarps_>
struct Tile {
  static constexpr int kRows = kRows_;
  static constexpr int kKvTile = kKvTile_;
  static constexpr int kStages = kStages_;
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = kWarps * 32;
  static constexpr bool kIsNarrow = kRows == kNarrowRows;
  static constexpr int kWarpsM = warps_of_rows(kRows, kWarps);
  static constexpr int kWarpsN = kKvTile / 16 < kWarps / kWarpsM ? kKvTile / 16 : kWarps / kWarpsM;
  static constexpr int kRowBlocks = kIsNarrow ? 1 : kRows / (16 * kWarpsM);  // m16 blocks of a warp
  static constexpr int kWarpCols = kKvTile / kWarpsN;                        // KV tokens of a warp
  static_assert((kRows % 16 == 0 || kIsNarrow) && kWarpCols % 16 == 0 &&
                1 << log_of(kRows) == kRows);
};

// The tile classes of a launch, in the planner's order.
template <class... Tiles>
struct TileClasses {
  static constexpr int kMaxRows = most_of(Tiles::kRows...);
  static constexpr int kThreads = most_of(Tiles::kThreads...);

  // Packed rows of a class are 1 << log_rows. Without an array, which would live in local memory.
  FI_HOST_DEVICE static int log_rows(int tile_class) {
    int c = 0, log = 0;
    ((tile_class == c++ ? log = log_of(Tiles::kRows) : 0), ...);
    return log;
  }

  // Whether tiles of class T hold all rows of their block, as all but those of the largest do, and
  // those of one decoded token.
  template <class T>
  static constexpr bool kHoldsBlock = T::kRows <= 16 || T::kRows < kMaxRows;
};

// Element: of q and out. KvElement: of the cache, Element or Float8E4M3.
template <class Element_, class KvElement_, int kHeadDimQk_, int kHeadDimVo_, int kGroupSize_,
          bool kPlainPages_, bool kAligned_, bool kBoxes_, bool kDecodes_>
struct Shape {
  using Element = Element_;
  using KvElement = KvElement_;
  static constexpr int kHeadDimQk = kHeadDimQk_;
  static constexpr int kHeadDimVo = kHeadDimVo_;
  static constexpr int kGroupSize = kGroupSize_;
  static constexpr int kKvBytes = sizeof(KvElement);
  static constexpr bool kFp8 = kKvBytes == 1;
  // Table entries are page ids and the page size is a power of two: no slot divisor, no page map,
  // no division. Worth 2 to 4 % of prefill.
  static constexpr bool kPlainPages = kPlainPages_;
  // Addresses and strides are multiples of 16 bytes; otherwise rows are copied by element.
  static constexpr bool kAligned = kAligned_;
  // K and V are copied as boxes of tensor maps: plain pages of kLeastBoxTokens or more, rows of
  // whole kBoxBytes, everything aligned.
  static constexpr bool kBoxes = kBoxes_;
  // Steps without shared prefixes, of one query token a request; longer ones cost more. Code for
  // prefixes, and for what is not worth its compile time then, is left out.
  static constexpr bool kDecodes = kDecodes_;
  static_assert(kHeadDimQk % 16 == 0 && kHeadDimVo % 16 == 0);
};

// Rows of shared memory are padded to an odd number of 16-byte chunks: eight consecutive rows of
// one chunk column then fall into different banks, for ldmatrix and its transposed form alike.
FI_HOST_DEVICE constexpr int row_pitch(int row_bytes) { return (row_bytes / 16 | 1) * 16; }

// Boxes of tensor maps (ptx/tensor_map.h): rows of 128 bytes, 64 or 128 elements of a token's K or
// V, swizzled in atoms of 1024 bytes that no padding keeps apart.
constexpr int kBoxBytes = 128, kBoxAtom = 1024;
constexpr int kLeastBoxTokens = 16, kMostBoxTokens = 64;
FI_HOST_DEVICE constexpr int whole_atoms(int bytes) {
  return (bytes + kBoxAtom - 1) / kBoxAtom * kBoxAtom;
}

// Shared memory of one CTA: byte offsets from its start.
struct SharedPlan {
  int pitch_q, pitch_k, pitch_v;  // bytes between rows
  int stage_k;                    // bytes of K in a stage; V follows
  int stage_bytes;                // of K and V
  int stages;                     // after the query tile
  int offsets;                    // RowOffsets of the KV tokens of each stage, none of boxes
  int rows;                       // VariantRow of each packed row
  int bytes;                      //
};

constexpr int kRowInfoBytes = 24;    // sizeof(VariantRow)
constexpr int kRowOffsetBytes = 16;  // sizeof(RowOffsets)
constexpr int kStaticBytes = 384;    // what a kernel declares beside, at most (kernel.h)

// Whether tiles of a class come as boxes where the cache allows it: they hold whole ones, and have
// few query rows or, which the host need not know (their padded rows take more), multiply by
// warpgroups.
constexpr int kMostBoxRows = 16;
FI_HOST_DEVICE constexpr bool takes_boxes(int rows, int kv_tile) {
  return rows <= kMostBoxRows && kv_tile % kMostBoxTokens == 0;
}

// in_boxes: K and V rows lie as boxes leave them, parts of kBoxBytes of all rows one after the
// other. That takes no more than padded rows do.
FI_HOST_DEVICE constexpr SharedPlan plan_shared(int head_dim_qk, int head_dim_vo, int kv_bytes,
                                                int rows, int kv_tile, int num_stages,
                                                int num_warps, bool in_boxes = false) {
  SharedPlan s{};
  s.pitch_q = row_pitch(head_dim_qk * 2);
  s.pitch_k = in_boxes ? kBoxBytes : row_pitch(head_dim_qk * kv_bytes);
  s.pitch_v = in_boxes ? kBoxBytes : row_pitch(head_dim_vo * kv_bytes);
  s.stage_k = kv_tile * (in_boxes ? head_dim_qk * kv_bytes : s.pitch_k);
  s.stage_bytes = s.stage_k + kv_tile * (in_boxes ? head_dim_vo * kv_bytes : s.pitch_v);
  s.stages = in_boxes ? whole_atoms(rows * s.pitch_q) : rows * s.pitch_q;
  int stage_area = num_stages * s.stage_bytes;
  // Where warps split the KV tokens, their states of the same rows meet in the stages' place.
  const int warps_per_row = min_int(num_warps / warps_of_rows(rows, num_warps), kv_tile / 16);
  if (warps_per_row > 1) {
    stage_area = max_int(stage_area, warps_per_row * rows * (head_dim_vo + 4) * 4);
  }
  s.offsets = s.stages + stage_area;
  s.rows = s.offsets + (in_boxes ? 0 : num_stages * kv_tile * kRowOffsetBytes);
  s.bytes = s.rows + (rows * kRowInfoBytes + 15) / 16 * 16;
  return s;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kHasWarpgroups = true;
#else
constexpr bool kHasWarpgroups = false;
#endif

// Whether a tile class multiplies by warpgroups: four warps that split the rows, and operands that
// wgmma can read. Where they lie is not padded but swizzled (ptx/wgmma.h), within the same places.
template <class S, class T>
constexpr bool kByWarpgroups =
    kHasWarpgroups && S::kAligned && !S::kFp8 && S::kHeadDimQk % 64 == 0 &&
    S::kHeadDimVo % 64 == 0 && S::kHeadDimQk != 192 && T::kKvTile % 64 == 0 && T::kWarpsN == 1 &&
    T::kWarpsM % 4 == 0 && (T::kRowBlocks == 1 || T::kWarpsM == 4);

template <class S, class T>
constexpr bool kInBoxes =
    S::kBoxes && (takes_boxes(T::kRows, T::kKvTile) ||
                  (kByWarpgroups<S, T> && T::kStages == 2 && T::kKvTile % kMostBoxTokens == 0));

// Whether classes of a launch have their KV in boxes: any; and the one with an index, with tiles
// of as many tokens as T has, and no more stages.
template <class S, class Classes>
constexpr bool kAnyBoxes = false;
template <class S, class... Tiles>
constexpr bool kAnyBoxes<S, TileClasses<Tiles...>> = (kInBoxes<S, Tiles> || ...);
template <class S, class T, class... Tiles>
FI_HOST_DEVICE bool has_boxes_of(TileClasses<Tiles...>, int tile_class) {
  int c = 0;
  bool has = false;
  ((tile_class == c++ ? void(has = kInBoxes<S, Tiles> && Tiles::kKvTile == T::kKvTile &&
                                   Tiles::kStages <= T::kStages)
                      : void()),
   ...);
  return has;
}

template <class S, class T>
constexpr SharedPlan kShared = plan_shared(S::kHeadDimQk, S::kHeadDimVo, S::kKvBytes, T::kRows,
                                           T::kKvTile, T::kStages, T::kWarps, kInBoxes<S, T>);

}  // namespace fi::sm80
