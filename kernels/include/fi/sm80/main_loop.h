// One KV tile of one warp: qk_gemm, variant, mask, online_softmax, pv_gemm.
//
// FlashAttention-2's loop (Dao, 2023) over tiles gathered through a page table. An fp8 cache is
// widened between shared memory and the products. A 32-bit register then holds four e4m3 values
// where mma wants two pairs of 16-bit ones from different places, so both products run in an order
// of their own, which costs no instruction:
//   qk: the contraction index is permuted, for K by ldmatrix and for Q by load_q alike.
//   pv: of each 16 components of V one n8 block takes the even ones and the next the odd ones.
#pragma once

#include "fi/core/elements.h"
#include "fi/ptx/mma.h"
#include "fi/ptx/wgmma.h"
#include "fi/sm80/tile_loop.h"

namespace fi::sm80 {

// What a warp knows of its rows. Lane l holds rows r = l / 4 and r + 8 of each 16-row block.
template <class S, class T, bool kIsNarrow = T::kIsNarrow>
struct WarpState {
  float o[T::kRowBlocks][S::kHeadDimVo / 8][4];
  float row_max[T::kRowBlocks][2];  // of scaled logits, base 2
  float row_sum[T::kRowBlocks][2];  // this lane's columns only, until the end

  __device__ void clear() {
#pragma unroll
    for (int b = 0; b < T::kRowBlocks; ++b) {
#pragma unroll
      for (int n = 0; n < S::kHeadDimVo / 8; ++n) {
        o[b][n][0] = o[b][n][1] = o[b][n][2] = o[b][n][3] = 0.0f;
      }
      row_max[b][0] = row_max[b][1] = neg_infinity();
      row_sum[b][0] = row_sum[b][1] = 0.0f;
    }
  }
};

// KV tokens that a warp takes through qk, softmax and pv at once. A warp of 32 rows by 128
// components of o has registers for 64 columns of logits, but not for a variant's functions or the
// widening of fp8 beside them; head dimensions between 64 and 128 leave fewer, for addresses.
template <class S, class V, class T>
constexpr int kStepCols =
    T::kRowBlocks == 1 || S::kHeadDimVo <= 64 ||
            (S::kHeadDimVo == 128 && !S::kFp8 && V::kFoldsScale && !V::kHasMasks)
        ? T::kWarpCols
        : 32;

template <class S, class V, class T, bool kIsNarrow = T::kIsNarrow>
class WarpLoop : public TileLoop<S, V, T> {
  using Base = TileLoop<S, V, T>;
  using Base::apply_variant;
  using Base::chunk_at;
  using Base::crosses_band;
  using Base::current_;
  using Base::finite_or_zero;
  using Base::first_chunk;
  using Base::mask_kind;
  using Base::masked_value;
  using Base::p_;
  using Base::reach;
  using Base::rows_;
  using Element = typename S::Element;
  using Ops = ElementOps<Element>;
  static constexpr SharedPlan kPlan = kShared<S, T>;
  static constexpr int kColBlocks = kStepCols<S, V, T> / 8;  // n8 blocks of logits
  static constexpr int kStepsQk = S::kHeadDimQk / 16;
  using Logits = float[T::kRowBlocks][kColBlocks][4];
  // What a maximum grows before the state is rescaled (base 2), unless it always is.
  static constexpr float kSlack = 8.0f;
  static constexpr bool kAlways = T::kWarpsN > 1;  // few products, nothing to spare

 public:
  using Base::Base;
  using Base::first_col;
  using Base::lane;

  __device__ static int first_row() {
    if constexpr (T::kWarpsN == T::kWarps) return 0;
    return ptx::thread_index() / 32 / T::kWarpsN * T::kRowBlocks * 16;
  }
  // No rows, or no tokens, for this warp.
  __device__ bool is_idle() const {
    if constexpr (T::kWarpsN == T::kWarps) return false;  // an item has a row
    if (T::kWarpsM * T::kWarpsN < T::kWarps && first_row() >= T::kRows) return true;
    return first_row() >= current_.item.num_rows;
  }

  // KV tile t by warpgroups, as tile(); is_plain: nothing of it is masked by position.
  // beside_first() runs while its first products do, beside_last() while its last ones do.
  template <class Tiles, class First, class Last>
  __device__ void tile_of_warpgroups(uint32_t smem_q, uint32_t smem_kv, const Tiles& tiles, int t,
                                     bool is_plain, WarpState<S, T>& state,
                                     const First& beside_first, const Last& beside_last) const {
    const MaskKind kind = V::kHasMasks ? mask_kind(tiles.begin(t), tiles.end(t)) : MaskKind::kFull;
    if (kind == MaskKind::kEmpty) {
      beside_first();
      beside_last();
      return;
    }
    constexpr int kCols = kStepCols<S, V, T>, kSteps = T::kKvTile / kCols;
    static_assert(T::kWarpsN == 1 && kSteps * kCols == T::kKvTile);
#pragma unroll 1
    for (int i = 0; i < kSteps; ++i) {
      const int c = i * kCols;
      const uint32_t smem_k = smem_kv + c * ptx::kSwizzledRow;
      const auto first = [&] {
        if (i == 0) beside_first();
      };
      const auto last = [&] {
        if (i == kSteps - 1) beside_last();
      };
      // Looked up where a tile is not plain: few are.
      const auto columns = [&] {
        return Columns{tiles.begin(t) + c, tiles.first(t), tiles.end(t)};
      };
      const bool crosses = !is_plain && crosses_band(columns(), kCols);
      step_of_warpgroup(smem_q, smem_k, smem_k + kPlan.stage_k, columns, crosses, kind, state,
                        first, last);
    }
  }

  // One KV tile: positions from kv_begin on, of those [kv_first, kv_end) at most, in steps of as
  // many columns as fit. Only tiles of boxes begin before kv_first.
  __device__ void tile(uint32_t smem_q, uint32_t smem_kv, int kv_begin, int kv_first, int kv_end,
                       WarpState<S, T>& state) const {
    const MaskKind kind = mask_kind(kv_begin, kv_end);
    if (kind == MaskKind::kEmpty || is_idle()) return;
    const int first = first_col();
    constexpr int kSteps = T::kWarpCols / kStepCols<S, V, T>;
    static_assert(kSteps * kStepCols<S, V, T> == T::kWarpCols);
#pragma unroll 1
    for (int i = 0; i < kSteps; ++i) {
      const int c = first + i * kStepCols<S, V, T>;
      step(smem_q, smem_kv + c * kPlan.pitch_k, smem_kv + kPlan.stage_k + c * kPlan.pitch_v,
           {kv_begin + c, kv_first, kv_end}, kind, state);
    }
  }

 private:
  __device__ void step(uint32_t smem_q, uint32_t smem_k, uint32_t smem_v, Columns columns,
                       MaskKind kind, WarpState<S, T>& state) const {
    Logits s;
    qk_gemm(smem_q, smem_k, s);
#pragma unroll
    for (int b = 0; b < T::kRowBlocks; ++b) {
      const bool crosses = crosses_band(columns, kStepCols<S, V, T>);
      softmax_block([&] { return columns; }, crosses, kind, b, s[b], state);
    }
    pv_gemm(smem_v, s, state);
  }

  // The same by warpgroups: while a block of rows is in its softmax, the next one's logits and the
  // last one's output are on their way.
  template <class ColumnsOf, class First, class Last>
  __device__ void step_of_warpgroup(uint32_t smem_q, uint32_t smem_k, uint32_t smem_v,
                                    const ColumnsOf& columns, bool crosses, MaskKind kind,
                                    WarpState<S, T>& state, const First& beside_first,
                                    const Last& beside_last) const {
    Logits s;
    ptx::begin_products();
#pragma unroll
    for (int b = 0; b < T::kRowBlocks; ++b) start_qk(smem_q, smem_k, b, s[b]);
    beside_first();
#pragma unroll
    for (int b = 0; b < T::kRowBlocks; ++b) {
      ptx::wait_products<T::kRowBlocks - 1>();
      ptx::settle(s[b]);
      // A warp without rows takes part in products, of zeros. Where few tiles have such warps, the
      // test is not worth its compile time.
      if (T::kRowBlocks > 1 || !is_idle()) softmax_block(columns, crosses, kind, b, s[b], state);
      start_pv(smem_v, s[b], state.o[b]);
    }
    beside_last();
    ptx::wait_products<0>();
#pragma unroll
    for (int b = 0; b < T::kRowBlocks; ++b) ptx::settle(state.o[b]);
  }

  template <class ColumnsOf>
  __device__ void softmax_block(const ColumnsOf& columns, bool crosses, MaskKind kind, int b,
                                float (&s)[kColBlocks][4], WarpState<S, T>& state) const {
    if constexpr (Base::kHasFunctions) apply_functions(columns().begin, columns().end, kind, b, s);
    if (crosses) apply_band(columns(), b, s);
    if constexpr (V::kSoftmax) online_softmax(b, s, state);
  }

  __device__ void start_qk(uint32_t smem_q, uint32_t smem_k, int b,
                           float (&s)[kColBlocks][4]) const {
    constexpr uint32_t kPartQ = T::kRows * ptx::kSwizzledRow,
                       kPartK = T::kKvTile * ptx::kSwizzledRow;
    const uint32_t group =
        T::kWarps > 4 ? __shfl_sync(0xffffffff, ptx::thread_index() / 128, 0) : 0;
    const uint32_t rows = smem_q + (group + b) * 64 * ptx::kSwizzledRow;
    const uint64_t q_at = ptx::swizzled_operand(rows, kPartQ);
    const uint64_t k_at = ptx::swizzled_operand(smem_k, kPartK);
    ptx::start_product_of_rows<Element, false>(s, q_at, k_at);
#pragma unroll
    for (int k = 1; k < kStepsQk; ++k) {
      ptx::start_product_of_rows<Element, true>(
          s, ptx::operand_after(q_at, k / 4 * kPartQ + k % 4 * 32),
          ptx::operand_after(k_at, k / 4 * kPartK + k % 4 * 32));
    }
    ptx::commit_products();
  }

  __device__ void start_pv(uint32_t smem_v, const float (&s)[kColBlocks][4],
                           float (&o)[S::kHeadDimVo / 8][4]) const {
    constexpr uint32_t kPart = T::kKvTile * ptx::kSwizzledRow;
    uint32_t a[kColBlocks / 2][4];
#pragma unroll
    for (int k = 0; k < kColBlocks / 2; ++k) {
      a[k][0] = Ops::pack(s[2 * k][0], s[2 * k][1]);
      a[k][1] = Ops::pack(s[2 * k][2], s[2 * k][3]);
      a[k][2] = Ops::pack(s[2 * k + 1][0], s[2 * k + 1][1]);
      a[k][3] = Ops::pack(s[2 * k + 1][2], s[2 * k + 1][3]);
    }
    // 128 columns of the output at a time, and the 64 that may be left.
    constexpr int kWhole = S::kHeadDimVo / 128;
    static_assert(kWhole <= 2 && S::kHeadDimVo % 64 == 0);
    ptx::settle(o);
    ptx::settle(a);
    ptx::begin_products();
    const uint64_t v_at = ptx::swizzled_operand(smem_v, kPart);
#pragma unroll
    for (int k = 0; k < kColBlocks / 2; ++k) {
      const uint64_t rows = ptx::operand_after(v_at, k * 16 * ptx::kSwizzledRow);
      if constexpr (kWhole > 0) ptx::start_product_across_rows<Element, 0, 16>(o, a[k], rows);
      if constexpr (kWhole > 1) {
        ptx::start_product_across_rows<Element, 16, 16>(o, a[k],
                                                        ptx::operand_after(rows, 2 * kPart));
      }
      if constexpr (S::kHeadDimVo % 128 > 0) {
        ptx::start_product_across_rows<Element, kWhole * 16, 8>(
            o, a[k], ptx::operand_after(rows, kWhole * 2 * kPart));
      }
    }
    ptx::commit_products();
  }

  __device__ void qk_gemm(uint32_t smem_q, uint32_t smem_k, Logits& s) const {
#pragma unroll
    for (int b = 0; b < T::kRowBlocks; ++b) {
#pragma unroll
      for (int n = 0; n < kColBlocks; ++n) s[b][n][0] = s[b][n][1] = s[b][n][2] = s[b][n][3] = 0.f;
    }
    const int lane = WarpLoop::lane();
    const uint32_t q_at = smem_q + (first_row() + lane % 16) * kPlan.pitch_q + lane / 16 * 16;
    const uint32_t k_at =
        first_chunk(smem_k + (lane % 8 + lane / 16 * 8) * kPlan.pitch_k, lane / 8 % 2);
    // 32 bytes of every K row at a time: one k16 step, or two of an fp8 cache.
    constexpr int kStepsPerLoad = S::kFp8 ? 2 : 1;
#pragma unroll
    for (int k = 0; k < kStepsQk; k += kStepsPerLoad) {
      uint32_t a[kStepsPerLoad][T::kRowBlocks][4];
#pragma unroll
      for (int step = 0; step < kStepsPerLoad && k + step < kStepsQk; ++step) {
#pragma unroll
        for (int b = 0; b < T::kRowBlocks; ++b) {
          ptx::ldmatrix_x4(a[step][b], q_at + b * 16 * kPlan.pitch_q + (k + step) * 32);
        }
      }
#pragma unroll
      for (int n = 0; n < kColBlocks; n += 2) {
        uint32_t kb[4];
        ptx::ldmatrix_x4(kb, chunk_at(k_at, k / kStepsPerLoad * 2) + n * 8 * kPlan.pitch_k);
        if constexpr (!S::kFp8) {
#pragma unroll
          for (int b = 0; b < T::kRowBlocks; ++b) {
            ptx::mma_m16n16k16<Element>(s[b][n], s[b][n + 1], a[0][b], kb);
          }
        } else {
#pragma unroll
          for (int step = 0; step < kStepsPerLoad && k + step < kStepsQk; ++step) {
            const uint32_t one = kb[step], other = kb[2 + step];
            const uint32_t wide[4] = {
                Ops::template widen_e4m3<0x1404>(one), Ops::template widen_e4m3<0x3424>(one),
                Ops::template widen_e4m3<0x1404>(other), Ops::template widen_e4m3<0x3424>(other)};
#pragma unroll
            for (int b = 0; b < T::kRowBlocks; ++b) {
              ptx::mma_m16n16k16<Element>(s[b][n], s[b][n + 1], a[step][b], wide);
            }
          }
        }
      }
    }
  }

  __device__ void apply_functions(int kv_begin, int kv_end, MaskKind kind, int b,
                                  float (&s)[kColBlocks][4]) const {
    const int lane = WarpLoop::lane(), first = first_row() + b * 16;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const VariantRow& row = rows_[first + half * 8 + lane / 4];
#pragma unroll
      for (int n = 0; n < kColBlocks; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          apply_variant(row, kv_begin + n * 8 + lane % 4 * 2 + c, kv_end, kind, s[n][half * 2 + c]);
        }
      }
    }
  }

  __device__ void apply_band(Columns columns, int b, float (&s)[kColBlocks][4]) const {
    const Band& band = p_.band;
    const int lane = WarpLoop::lane(), first = first_row() + b * 16;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // A row's band in bits, 32 columns a word: an element costs a test of its bit, no branch.
      const int q_pos = rows_[first + half * 8 + lane / 4].q_pos;
      const int column = columns.begin + lane % 4 * 2;
      const int end = min_i32(columns.end, q_pos + reach(band.right) + 1);
      const int begin = q_pos - reach(band.left);
#pragma unroll
      for (int word = 0; word < kColBlocks; word += 4) {
        const int at = column + word * 8;
        const uint32_t in_window = bits_from(begin - at) | ~bits_from(band.sink_prefix - at);
        uint32_t seen = in_window & ~bits_from(end - at);
        if constexpr (kInBoxes<S, T>) seen &= bits_from(columns.first - at);
#pragma unroll
        for (int bit = 0; bit < min_i32(kColBlocks - word, 4) * 8; ++bit) {
          if (bit % 8 > 1) continue;
          float& x = s[word + bit / 8][half * 2 + bit % 8];
          x = seen >> bit & 1 ? x : masked_value();
        }
      }
    }
  }

  // s -> p = 2^(scale * s - max). Where products are the limit the state is rescaled only when a
  // maximum grew by more than kSlack: p then stays below 2^kSlack, which fp32 sums and both 16-bit
  // types hold as exactly as values below 1, and most tiles are spared a pass over o (the idea of
  // FlashAttention-4). Whether one did shows in some lane's own columns: the four lanes of a row
  // agree on its maximum only then.
  __device__ void online_softmax(int b, float (&s)[kColBlocks][4], WarpState<S, T>& state) const {
    const float scale_log2 = Base::scale_log2();
    float top[2];
    bool grows = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Short chains, a result of which comes four cycles later.
      constexpr int kChains = kColBlocks % 4 == 0 ? 4 : 2;
      float most[kChains];
#pragma unroll
      for (int n = 0; n < kColBlocks; ++n) {
        const float pair = fmaxf(s[n][half * 2], s[n][half * 2 + 1]);
        most[n % kChains] = n < kChains ? pair : fmaxf(most[n % kChains], pair);
      }
      top[half] = fmaxf(most[0], most[1]);
      if constexpr (kChains == 4) top[half] = fmaxf(top[half], fmaxf(most[2], most[3]));
      top[half] *= scale_log2;
      grows |= top[half] > state.row_max[b][half] + kSlack;
    }
    if (kAlways || __any_sync(0xffffffff, grows)) {
      top[0] = most_of_row(top[0]);
      top[1] = most_of_row(top[1]);
      rescale(top, b, state);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float base = finite_or_zero(state.row_max[b][half]);
      float sum = state.row_sum[b][half];
#pragma unroll
      for (int n = 0; n < kColBlocks; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = s[n][half * 2 + c];
          x = exp2_approx(fmaf(x, scale_log2, -base));
          sum += x;
        }
      }
      state.row_sum[b][half] = sum;
    }
  }

  // The greatest value of the four lanes of a row.
  __device__ static float most_of_row(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
  }

  __device__ void rescale(const float (&top)[2], int b, WarpState<S, T>& state) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float old_max = state.row_max[b][half];
      // A row's bits do not depend on whether its neighbours grew.
      const bool grows = kAlways || top[half] > old_max + kSlack;
      const float new_max = grows ? fmaxf(old_max, top[half]) : old_max;
      const float shrink = exp2_approx(old_max - finite_or_zero(new_max));
      state.row_max[b][half] = new_max;
      state.row_sum[b][half] *= shrink;
#pragma unroll
      for (int n = 0; n < S::kHeadDimVo / 8; ++n) {
        state.o[b][n][half * 2] *= shrink;
        state.o[b][n][half * 2 + 1] *= shrink;
      }
    }
  }

  __device__ void pv_gemm(uint32_t smem_v, const Logits& s, WarpState<S, T>& state) const {
    constexpr int kChunks = S::kHeadDimVo * S::kKvBytes / 16;  // of a row of V
    const int lane = WarpLoop::lane();
    const uint32_t v_at = first_chunk(smem_v + lane % 16 * kPlan.pitch_v, lane / 16);
#pragma unroll
    for (int k = 0; k < kColBlocks / 2; ++k) {
      uint32_t a[T::kRowBlocks][4];
#pragma unroll
      for (int b = 0; b < T::kRowBlocks; ++b) {
        a[b][0] = Ops::pack(s[b][2 * k][0], s[b][2 * k][1]);
        a[b][1] = Ops::pack(s[b][2 * k][2], s[b][2 * k][3]);
        a[b][2] = Ops::pack(s[b][2 * k + 1][0], s[b][2 * k + 1][1]);
        a[b][3] = Ops::pack(s[b][2 * k + 1][2], s[b][2 * k + 1][3]);
      }
#pragma unroll
      for (int chunk = 0; chunk < kChunks; chunk += 2) {
        uint32_t vb[4];  // tokens 0-7 and 8-15 of this chunk, then of the next
        ptx::ldmatrix_x4_trans(vb, chunk_at(v_at, chunk) + k * 16 * kPlan.pitch_v);
        if constexpr (!S::kFp8) {
          static_assert(kChunks % 2 == 0);
#pragma unroll
          for (int b = 0; b < T::kRowBlocks; ++b) {
            auto& o = state.o[b];
            ptx::mma_m16n16k16<Element>(o[chunk], o[chunk + 1], a[b], vb);
          }
        } else {
#pragma unroll
          for (int next = 0; next < 2 && chunk + next < kChunks; ++next) {
            // Bytes of a register: (token 0, even), (token 0, odd), (token 1, even), (token 1,
            // odd).
            const uint32_t lo = vb[next * 2], hi = vb[next * 2 + 1];
            const uint32_t wide[4] = {
                Ops::template widen_e4m3<0x2404>(lo), Ops::template widen_e4m3<0x2404>(hi),
                Ops::template widen_e4m3<0x3414>(lo), Ops::template widen_e4m3<0x3414>(hi)};
#pragma unroll
            for (int b = 0; b < T::kRowBlocks; ++b) {
              auto& o = state.o[b];
              const int even = (chunk + next) * 2;
              ptx::mma_m16n16k16<Element>(o[even], o[even + 1], a[b], wide);
            }
          }
        }
      }
    }
  }
};

}  // namespace fi::sm80
