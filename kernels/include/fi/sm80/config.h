// Compile-time shape of the sm80-class kernel: what the JIT's generated line names.
#pragma once

#include "fi/core/types.h"

namespace fi::sm80 {

constexpr int kThreads = 128;
constexpr int kWarps = 4;

// A tile class: `kRows` packed query rows by `kKvTile` KV tokens, in `kStages` shared-memory
// stages. kRows 16: the four warps split the KV tile and merge at the end. 64, 128: they split the
// rows, 16 or 32 each; 32 rows use each K and V fragment twice, which shared-memory bandwidth needs
// (a 16-row warp would read 256 B per mma, more than 128 B per cycle at full rate).
template <int kRows_, int kKvTile_, int kStages_>
struct Tile {
  static constexpr int kRows = kRows_;
  static constexpr int kKvTile = kKvTile_;
  static constexpr int kStages = kStages_;
  static constexpr int kWarpsM = kRows == 16 ? 1 : 4;
  static constexpr int kWarpsN = kWarps / kWarpsM;
  static constexpr int kRowBlocks = kRows / (16 * kWarpsM);  // m16 blocks of a warp
  static constexpr int kWarpCols = kKvTile / kWarpsN;        // KV tokens of a warp
  static_assert(kWarpCols % 16 == 0);
};

template <class Element_, int kHeadDimQk_, int kHeadDimVo_, int kGroupSize_, int kPageSize_,
          bool kPlainPages_>
struct Shape {
  using Element = Element_;
  static constexpr int kHeadDimQk = kHeadDimQk_;
  static constexpr int kHeadDimVo = kHeadDimVo_;
  static constexpr int kGroupSize = kGroupSize_;
  static constexpr int kPageSize = kPageSize_;  // tokens; 0: known at run time
  // Table entries are page ids: no slot divisor, no page map. Worth 2 to 4 % of prefill.
  static constexpr bool kPlainPages = kPlainPages_;
  // Rows of shared memory are padded to an odd number of 16-byte chunks: eight consecutive rows of
  // one chunk column then fall into different banks, for ldmatrix and its transposed form alike.
  static constexpr int kPitchQk = (kHeadDimQk / 8 | 1) * 8;  // elements
  static constexpr int kPitchVo = (kHeadDimVo / 8 | 1) * 8;
  static constexpr int kPitchMax = kPitchQk > kPitchVo ? kPitchQk : kPitchVo;
  static_assert(kHeadDimQk % 16 == 0 && kHeadDimVo % 16 == 0);
};

// Shared memory of one CTA, in bytes from its start. The query tile's place later holds the output.
template <class S, class T>
struct SharedPlan {
  static constexpr int kStageK = T::kKvTile * S::kPitchQk * 2;
  static constexpr int kStageV = T::kKvTile * S::kPitchVo * 2;
  static constexpr int kQuery = 0;
  static constexpr int kStages = kQuery + T::kRows * S::kPitchMax * 2;
  static constexpr int kRowInfo = kStages + T::kStages * (kStageK + kStageV);
  static constexpr int kFlag = kRowInfo + T::kRows * 8;
  static constexpr int kBytes = kFlag + 16;
  // The four warps' states of a 16-row tile meet in the stages' place.
  static constexpr int kMergeBytes = kWarps * 16 * (S::kHeadDimVo + 4 + 2) * 4;
  static_assert(T::kRows != 16 || kMergeBytes <= T::kStages * (kStageK + kStageV));
};

}  // namespace fi::sm80
