// RoPE inside attention: q and the K rows of a tile turned by their slots where they lie in shared
// memory, rounded to their type as K is when it is turned before it is stored.
//
// Scores depend on differences of slots only, so that an item counts them from where the window of
// its first row begins: K of a tile turns once for all rows, and angles are few however long the
// text. Where angles are known to be multiples, a thread reads those of its first row of a tile,
// before the tile has landed, and turns them on from row to row. Leading tokens keep their slots;
// for them the rows of q turn by others, and are loaded again after them. A tile has leading tokens
// or others (advance_item).
#pragma once

#include "fi/attention/variant.h"
#include "fi/core/elements.h"
#include "fi/sm80/load.h"

namespace fi::sm80 {

template <class S, class V, class T>
class Rotator {
  using Ops = ElementOps<typename S::Element>;
  static constexpr SharedPlan kPlan = kShared<S, T>;
  static constexpr bool kSwizzles = kByWarpgroups<S, T>;
  static_assert(!S::kFp8, "a turned row has no room in the place of an fp8 one");

 public:
  static constexpr int kWide = 8;  // pairs that a lane turns at once, 16 bytes at either place

  // What a thread turns its rows of K of a tile by: angles of the first, and from one to the next.
  struct Angles {
    float cos[kWide], sin[kWide];
    float next_cos[kWide], next_sin[kWide];
  };
  // Tiles of few rows have registers to hold them, from before the tile has landed.
  static constexpr bool kBySteps =
      V::kMultiples && S::kHeadDimQk <= 128 && (T::kRows == 16 || (T::kIsNarrow && S::kDecodes));

  __device__ Rotator(const KernelParams& p, const CurrentItem& current, const VariantRow* rows,
                     uint32_t smem_q)
      : p_(p), current_(current), rows_(rows), smem_q_(smem_q) {}

  // Reads the angles of this thread's first row of tile `t`, and those of kNextRow slots: both are
  // in the table if the thread has two rows.
  __device__ void fetch(const KvTiles<T::kKvTile, false>& tiles, int t, Angles& angles) const {
    const Rotation& rotation = p_.rotation;
    const TurnedRows rows = rows_of(tiles, t);
    const int half = rotation.rotary_dim / 2, thread = ptx::thread_index();
    const int i = thread % kWideLanes * kWide;
    if (!turns_by_steps(rows) || i >= half) return;
    const int row = min_i32(thread / kWideLanes, rows.count - 1);
    const float* from = rotation.cos_sin + (rows.first_slot + row) * rotation.stride + i;
    load_angles(from, angles.cos);
    load_angles(from + half, angles.sin);
    const float* step = rotation.cos_sin + (rows.count > kNextRow ? kNextRow : 0) * rotation.stride;
    load_angles(step + i, angles.next_cos);
    load_angles(step + half + i, angles.next_sin);
  }

  // Turns what tile `t`, which has landed, is multiplied with, K by angles that were fetched where
  // kBySteps. For all threads; a barrier before and after.
  __device__ void turn(const KvTiles<T::kKvTile, false>& tiles, int t, uint32_t smem_k,
                       Angles& angles) const {
    const TurnedRows rows = rows_of(tiles, t);
    const bool has_sinks = rows.has_sinks;
    const int base = V::kRolls ? gone_before(current_.box.q_pos_min) : 0;
    if (V::kRolls && t > 0 && t == tiles.before_hole) {
      load_q<S, T>(p_, current_.item.num_rows, rows_, smem_q_);
      ptx::cp_async_wait_all();
      __syncthreads();
    }
    if (t == 0 || (V::kRolls && t == tiles.before_hole)) {
      turn_rows<2>(
          T::kRows, [&](int row, int d) { return place_in_q(row, d); },
          [&](int row) {
            const int q_pos = max_i32(rows_[row].q_pos, 0);  // before the first: sees nothing
            return q_pos - (has_sinks ? gone_before(q_pos) : base);
          });
    }
    const auto place = [&](int row, int d) { return place_in_k(smem_k, row, d); };
    // Before the first row's window: seen by nobody.
    const auto slot = [&](int row) { return max_i32(rows.first_slot + row, 0); };
    if (kBySteps && turns_by_steps(rows)) {
      turn_by_steps(rows, place, angles);
    } else if (is_wide()) {
      turn_rows<kWide>(rows.count, place, slot);
    } else {
      turn_rows<2>(rows.count, place, slot);
    }
    if constexpr (kSwizzles) ptx::publish_to_products();
    __syncthreads();
  }

 private:
  static constexpr int kWideLanes = 64 / kWide;              // of a row
  static constexpr int kNextRow = T::kThreads / kWideLanes;  // from one row of a thread to the next

  // Rows of K of a tile, from its first one on.
  struct TurnedRows {
    int count, first_slot;
    bool has_sinks;
  };
  __device__ TurnedRows rows_of(const KvTiles<T::kKvTile, false>& tiles, int t) const {
    const int begin = tiles.begin(t);
    const bool has_sinks = V::kRolls && begin < p_.rotation.sink_prefix;
    // Between the leading tokens and a hole: seen by nobody, and perhaps of no slot.
    const int end = has_sinks ? min_i32(tiles.end(t), p_.rotation.sink_prefix) : tiles.end(t);
    const int base = V::kRolls && !has_sinks ? gone_before(current_.box.q_pos_min) : 0;
    return {min_i32(end - begin, T::kKvTile), begin - base, has_sinks};
  }

  // Whether the slots of a tile's rows follow one another, none before the first, and angles can be
  // read 16 bytes at a time.
  __device__ bool turns_by_steps(const TurnedRows& rows) const {
    return is_wide() && rows.first_slot >= 0 && rows.count > 0;
  }

  // Turns rows whose slots follow one another.
  template <class Place>
  __device__ void turn_by_steps(const TurnedRows& rows, Place place, Angles& angles) const {
    const int half = p_.rotation.rotary_dim / 2, thread = ptx::thread_index();
    const int i = thread % kWideLanes * kWide;
    if (i >= half) return;
#pragma unroll 1
    for (int row = thread / kWideLanes; row < rows.count; row += kNextRow) {
      const uint32_t one = place(row, V::kIsInterleaved ? 2 * i : i);
      const uint32_t other = place(row, V::kIsInterleaved ? 2 * i + kWide : half + i);
      turn_pairs(one, other, angles.cos, angles.sin);
#pragma unroll
      for (int k = 0; k < kWide; ++k) {
        const float cos = angles.cos[k], sin = angles.sin[k];
        angles.cos[k] = cos * angles.next_cos[k] - sin * angles.next_sin[k];
        angles.sin[k] = sin * angles.next_cos[k] + cos * angles.next_sin[k];
      }
    }
  }

  // Tokens that a query no longer sees.
  __device__ int gone_before(int q_pos) const {
    if constexpr (!V::kRolls) return 0;
    return max_i32(q_pos + 1 - p_.rotation.sink_prefix - p_.rotation.window, 0);
  }

  // Component d of a row, even.
  __device__ uint32_t place_in_q(int row, int d) const {
    const uint32_t place = place_of_row<S, T>(row), chunk = d / 8;
    const uint32_t at =
        kSwizzles ? swizzled_chunk<T::kRows>(place, chunk) : place * kPlan.pitch_q + chunk * 16;
    return smem_q_ + at + d % 8 * 2;
  }
  __device__ uint32_t place_in_k(uint32_t smem_k, int row, int d) const {
    const uint32_t chunk = d / 8;
    const uint32_t at =
        kSwizzles ? swizzled_chunk<T::kKvTile>(row, chunk) : row * kPlan.pitch_k + chunk * 16;
    return smem_k + at + d % 8 * 2;
  }

  // Whether angles can be read, and rows turned, 16 bytes at a time.
  __device__ bool is_wide() const {
    const Rotation& r = p_.rotation;
    return r.rotary_dim % 16 == 0 && r.stride % 4 == 0 &&
           reinterpret_cast<uint64_t>(r.cos_sin) % 16 == 0;
  }

  // Turns rows; kPairs pairs of components a lane. Turning is bound by its instructions: eight
  // pairs take half as many each as two.
  template <int kPairs, class Place, class Slot>
  __device__ void turn_rows(int num_rows, Place place, Slot slot_of) const {
    constexpr int kLanes = 64 / kPairs;           // of a row
    constexpr int kAtOnce = kPairs == 8 ? 2 : 4;  // rows whose angles are on their way together
    constexpr int kNext = T::kThreads / kLanes;   // from one row of a thread to the next
    const int half = p_.rotation.rotary_dim / 2;
    const int thread = ptx::thread_index(), lane = thread % kLanes;
#pragma unroll 1
    for (int first = thread / kLanes; first < num_rows; first += kNext * kAtOnce) {
#pragma unroll 1
      for (int i = lane * kPairs; i < half; i += kLanes * kPairs) {
        float cos[kAtOnce][kPairs], sin[kAtOnce][kPairs];
#pragma unroll
        for (int r = 0; r < kAtOnce; ++r) {
          const int row = min_i32(first + r * kNext, num_rows - 1);
          const float* from = p_.rotation.cos_sin + slot_of(row) * p_.rotation.stride + i;
          load_angles(from, cos[r]);
          load_angles(from + half, sin[r]);
        }
#pragma unroll
        for (int r = 0; r < kAtOnce; ++r) {
          const int row = first + r * kNext;
          if (row >= num_rows) break;
          const uint32_t one = place(row, V::kIsInterleaved ? 2 * i : i);
          const uint32_t other = place(row, V::kIsInterleaved ? 2 * i + kPairs : half + i);
          turn_pairs(one, other, cos[r], sin[r]);
        }
      }
    }
  }

  template <int kPairs>
  __device__ static void load_angles(const float* from, float (&angles)[kPairs]) {
    if constexpr (kPairs % 4 == 0) {
#pragma unroll
      for (int k = 0; k < kPairs; k += 4) {
        const float4 four = __ldg(reinterpret_cast<const float4*>(from + k));
        angles[k] = four.x, angles[k + 1] = four.y, angles[k + 2] = four.z, angles[k + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int k = 0; k < kPairs; ++k) angles[k] = __ldg(from + k);
    }
  }

  // Pairs of a row, whose components are half at `one` and half at `other`.
  template <int kPairs>
  __device__ static void turn_pairs(uint32_t one, uint32_t other, const float (&cos)[kPairs],
                                    const float (&sin)[kPairs]) {
    constexpr int kWords = kPairs / 2;  // at either place
    uint32_t words[2 * kWords];
    ptx::load_shared<kWords>(one, words);
    ptx::load_shared<kWords>(other, words + kWords);
#pragma unroll
    for (int k = 0; k < kPairs; k += 2) {
      // Two pairs in two words: one each, or the first components of both and the second ones.
      uint32_t& first = words[V::kIsInterleaved ? k : k / 2];
      uint32_t& second = words[V::kIsInterleaved ? k + 1 : kWords + k / 2];
      float x[2], y[2];
      Ops::unpack(first, x[0], V::kIsInterleaved ? y[0] : x[1]);
      Ops::unpack(second, V::kIsInterleaved ? x[1] : y[0], y[1]);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float turned = x[j] * cos[k + j] - y[j] * sin[k + j];
        y[j] = y[j] * cos[k + j] + x[j] * sin[k + j];
        x[j] = turned;
      }
      first = Ops::pack(x[0], V::kIsInterleaved ? y[0] : x[1]);
      second = Ops::pack(V::kIsInterleaved ? x[1] : y[0], y[1]);
    }
    ptx::store_shared<kWords>(one, words);
    ptx::store_shared<kWords>(other, words + kWords);
  }

  const KernelParams& p_;
  const CurrentItem& current_;
  const VariantRow* rows_;
  uint32_t smem_q_;
};

// The rotation of a tile, of variants that turn.
template <class S, class V, class T, bool kTurns = V::kTurns>
class TileRotation {
 public:
  __device__ TileRotation(const KernelParams& p, const CurrentItem& current, const VariantRow* rows,
                          uint32_t smem_q)
      : rotator_(p, current, rows, smem_q) {}

  __device__ void fetch(const KvTiles<T::kKvTile, false>& tiles, int t) {
    if constexpr (Rotator<S, V, T>::kBySteps) rotator_.fetch(tiles, t, angles_);
  }
  __device__ void turn(const KvTiles<T::kKvTile, false>& tiles, int t, uint32_t smem_k) {
    rotator_.turn(tiles, t, smem_k, angles_);
  }

 private:
  Rotator<S, V, T> rotator_;
  typename Rotator<S, V, T>::Angles angles_;
};

template <class S, class V, class T>
class TileRotation<S, V, T, false> {
 public:
  __device__ TileRotation(const KernelParams&, const CurrentItem&, const VariantRow*, uint32_t) {}
  __device__ void fetch(const KvTiles<T::kKvTile, false>&, int) {}
  __device__ void turn(const KvTiles<T::kKvTile, false>&, int, uint32_t) {}
};

}  // namespace fi::sm80
