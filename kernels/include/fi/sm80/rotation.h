// RoPE inside attention: q and the K rows of a tile turned by their slots where they lie in shared
// memory, rounded to their type as K is when it is turned before it is stored.
//
// Scores depend on differences of slots only, so that an item counts them from where the window of
// its first row begins: K of a tile turns once for all rows, and angles are few however long the
// text. Leading tokens keep their slots; for them the rows of q turn by others, and are loaded
// again after them. A tile has leading tokens or others (advance_item).
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
  __device__ Rotator(const KernelParams& p, const CurrentItem& current, const VariantRow* rows,
                     uint32_t smem_q)
      : p_(p), current_(current), rows_(rows), smem_q_(smem_q) {}

  // Turns what tile `t`, which has landed, is multiplied with. For all threads; a barrier before
  // and after.
  __device__ void turn(const KvTiles<T::kKvTile, false>& tiles, int t, uint32_t smem_k) const {
    const Rotation& rotation = p_.rotation;
    const int begin = tiles.begin(t);
    const bool has_sinks = V::kRolls && begin < rotation.sink_prefix;
    // Between the leading tokens and a hole: seen by nobody, and perhaps of no slot.
    const int end = has_sinks ? min_i32(tiles.end(t), rotation.sink_prefix) : tiles.end(t);
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
    const int num_rows = min_i32(end - begin, T::kKvTile);
    const auto place = [&](int row, int d) { return place_in_k(smem_k, row, d); };
    // Before the first row's window: seen by nobody.
    const auto slot = [&](int row) { return max_i32(begin + row - (has_sinks ? 0 : base), 0); };
    if (is_wide()) {
      turn_rows<8>(num_rows, place, slot);
    } else {
      turn_rows<2>(num_rows, place, slot);
    }
    if constexpr (kSwizzles) ptx::publish_to_products();
    __syncthreads();
  }

 private:
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

}  // namespace fi::sm80
