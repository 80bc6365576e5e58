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
  __device__ void turn(const KvTiles<T::kKvTile>& tiles, int t, uint32_t smem_k) const {
    const Rotation& rotation = p_.rotation;
    const int begin = tiles.begin(t), end = tiles.end(t);
    const bool has_sinks = V::kRolls && begin < rotation.sink_prefix;
    const int base = V::kRolls ? gone_before(current_.box.q_pos_min) : 0;
    if (V::kRolls && t > 0 && t == tiles.before_hole) {
      load_q<S, T>(p_, current_.item.num_rows, rows_, smem_q_);
      ptx::cp_async_wait_all();
      __syncthreads();
    }
    if (t == 0 || (V::kRolls && t == tiles.before_hole)) {
      turn_rows(
          T::kRows, [&](int row, int d) { return place_in_q(row, d); },
          [&](int row) {
            const int q_pos = max_i32(rows_[row].q_pos, 0);  // before the first: sees nothing
            return q_pos - (has_sinks ? gone_before(q_pos) : base);
          });
    }
    turn_rows(
        min_i32(end - begin, T::kKvTile),
        [&](int row, int d) { return place_in_k(smem_k, row, d); },
        // Before the first row's window: seen by nobody.
        [&](int row) { return max_i32(begin + row - (has_sinks ? 0 : base), 0); });
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

  // A row a warp, two pairs of components a lane.
  template <class Place, class Slot>
  __device__ void turn_rows(int num_rows, Place place, Slot slot_of) const {
    const int half = p_.rotation.rotary_dim / 2;
    const int warp = ptx::thread_index() / 32, lane = ptx::thread_index() % 32;
#pragma unroll 1
    for (int row = warp; row < num_rows; row += T::kWarps) {
      const float* cos = p_.rotation.cos_sin + slot_of(row) * p_.rotation.stride;
      const float* sin = cos + half;
#pragma unroll 1
      for (int i = lane * 2; i < half; i += 64) {
        const uint32_t one = place(row, V::kIsInterleaved ? 2 * i : i);
        const uint32_t other = place(row, V::kIsInterleaved ? 2 * i + 2 : half + i);
        float x[2], y[2];
        const uint32_t first = ptx::load_shared_4(one), second = ptx::load_shared_4(other);
        if constexpr (V::kIsInterleaved) {
          Ops::unpack(first, x[0], y[0]);
          Ops::unpack(second, x[1], y[1]);
        } else {
          Ops::unpack(first, x[0], x[1]);
          Ops::unpack(second, y[0], y[1]);
        }
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const float c = __ldg(cos + i + k), s = __ldg(sin + i + k);
          const float turned = x[k] * c - y[k] * s;
          y[k] = y[k] * c + x[k] * s;
          x[k] = turned;
        }
        ptx::store_shared_4(one, V::kIsInterleaved ? Ops::pack(x[0], y[0]) : Ops::pack(x[0], x[1]));
        ptx::store_shared_4(other,
                            V::kIsInterleaved ? Ops::pack(x[1], y[1]) : Ops::pack(y[0], y[1]));
      }
    }
  }

  const KernelParams& p_;
  const CurrentItem& current_;
  const VariantRow* rows_;
  uint32_t smem_q_;
};

}  // namespace fi::sm80
