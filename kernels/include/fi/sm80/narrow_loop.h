// One KV tile of one warp for at most 8 query rows, such as a decoded token of a group of up to 8
// heads. Products have KV tokens, then components of V, where main_loop.h has query rows: 16 of
// those would be half empty. S^T = K Q^T and O^T = V^T P^T take half of its instructions, and of
// its registers; between them P^T changes from how one product leaves it to how the other takes it.
#pragma once

#include "fi/sm80/main_loop.h"

namespace fi::sm80 {

// What a warp knows of its rows. Lane l holds rows r = 2 * (l % 4) and r + 1; of each 16 components
// of o those at l / 4 and l / 4 + 8.
template <class S, class T>
struct WarpState<S, T, true> {
  float o[S::kHeadDimVo / 16][4];  // d of r and r + 1, d + 8 of both
  float row_max[2];                // of scaled logits, base 2
  float row_sum[2];                // this lane's tokens only, until the end

  __device__ void clear() {
#pragma unroll
    for (int m = 0; m < S::kHeadDimVo / 16; ++m) {
      o[m][0] = o[m][1] = o[m][2] = o[m][3] = 0.0f;
    }
    row_max[0] = row_max[1] = neg_infinity();
    row_sum[0] = row_sum[1] = 0.0f;
  }
};

// Over the eight lanes that hold the same rows.
template <class Join>
__device__ inline float join_lanes(float x, Join join) {
#pragma unroll
  for (int distance = 4; distance < 32; distance *= 2) {
    x = join(x, __shfl_xor_sync(0xffffffff, x, distance));
  }
  return x;
}

template <class S, class V, class T>
class WarpLoop<S, V, T, true> : public TileLoop<S, V, T> {
  using Base = TileLoop<S, V, T>;
  using Base::chunk_at;
  using Base::current_;
  using Base::first_chunk;
  using Base::masked_value;
  using Base::p_;
  using Base::rows_;
  using Element = typename S::Element;
  using Ops = ElementOps<Element>;
  static constexpr SharedPlan kPlan = kShared<S, T>;
  static constexpr int kBlocks = T::kWarpCols / 16;  // m16 blocks of tokens
  static constexpr int kStepsQk = S::kHeadDimQk / 16;
  using Logits = float[kBlocks][4];  // token l / 4 of rows r and r + 1, token l / 4 + 8 of both
  static_assert(!S::kFp8 && T::kWarpsM == 1);

 public:
  using Base::Base;
  using Base::first_col;
  using Base::lane;

  __device__ static int first_row() { return 0; }
  // No tokens for this warp.
  __device__ bool is_idle() const {
    if constexpr (T::kWarpsN == T::kWarps) return false;
    return ptx::thread_index() / 32 >= T::kWarpsN;
  }

  // As that of main_loop.h.
  __device__ void tile(uint32_t smem_q, uint32_t smem_kv, int kv_begin, int kv_first, int kv_end,
                       WarpState<S, T>& state) const {
    const MaskKind kind = Base::mask_kind(kv_begin, kv_end);
    if (kind == MaskKind::kEmpty || is_idle()) return;
    const int first = first_col();
    const Columns columns = {kv_begin + first, kv_first, kv_end};
    Logits s;
    qk_gemm(smem_q, smem_kv + first * kPlan.pitch_k, s);
    if constexpr (Base::kHasFunctions) {
      for_each_logit(columns, s, [&](int c, int column, float& x) {
        Base::apply_variant(rows_[row(c)], column, kv_end, kind, x);
      });
    }
    if (Base::crosses_band(columns, T::kWarpCols)) apply_band(columns, s);
    if constexpr (V::kSoftmax) online_softmax(s, state);
    pv_gemm(smem_kv + kPlan.stage_k + first * kPlan.pitch_v, s, state);
  }

 private:
  __device__ static int row(int c) { return lane() % 4 * 2 + c; }

  // Calls visit(c, column, logit) for the lane's logits, of row(c).
  template <class Visit>
  __device__ static void for_each_logit(Columns columns, Logits& s, Visit visit) {
    const int first = columns.begin + lane() / 4;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < 4; ++i) visit(i % 2, first + b * 16 + i / 2 * 8, s[b][i]);
    }
  }

  // Even and odd steps have sums of their own: half as many products wait for one another.
  __device__ void qk_gemm(uint32_t smem_q, uint32_t smem_k, Logits& s) const {
    float sums[2][kBlocks][4] = {};
    const int lane = WarpLoop::lane();
    const uint32_t q_at = smem_q + lane % 8 * kPlan.pitch_q + lane / 8 * 16;
    const uint32_t k_at = first_chunk(smem_k + lane % 16 * kPlan.pitch_k, lane / 16);
#pragma unroll
    for (int k = 0; k < kStepsQk; k += 2) {
      uint32_t q[4];  // of two steps
      ptx::ldmatrix_x4(q, q_at + k * 32);
#pragma unroll
      for (int step = 0; step < 2 && k + step < kStepsQk; ++step) {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          uint32_t a[4];
          ptx::ldmatrix_x4(a, chunk_at(k_at, (k + step) * 2) + b * 16 * kPlan.pitch_k);
          ptx::mma_m16n8k16<Element>(sums[step][b], a, q[step * 2], q[step * 2 + 1]);
        }
      }
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[b][i] = sums[0][b][i] + sums[1][b][i];
    }
  }

  __device__ void apply_band(Columns columns, Logits& s) const {
    const Band& band = p_.band;
    int begin[2], end[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int q_pos = rows_[row(c)].q_pos;
      begin[c] = q_pos - Base::reach(band.left);
      end[c] = min_i32(columns.end, q_pos + Base::reach(band.right) + 1);
    }
    for_each_logit(columns, s, [&](int c, int column, float& x) {
      bool seen = column < end[c] && (column >= begin[c] || column < band.sink_prefix);
      if constexpr (kInBoxes<S, T>) seen &= column >= columns.first;
      x = seen ? x : masked_value();
    });
  }

  // s -> p = 2^(scale * s - max).
  __device__ void online_softmax(Logits& s, WarpState<S, T>& state) const {
    const float scale_log2 = Base::scale_log2();
    float base[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float top = neg_infinity();
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) top = fmaxf(top, fmaxf(s[b][c], s[b][2 + c]));
      top = join_lanes(top, [](float x, float y) { return fmaxf(x, y); }) * scale_log2;
      const float new_max = fmaxf(state.row_max[c], top);
      base[c] = Base::finite_or_zero(new_max);
      const float shrink = exp2_approx(state.row_max[c] - base[c]);
      state.row_max[c] = new_max;
      state.row_sum[c] *= shrink;
#pragma unroll
      for (int m = 0; m < S::kHeadDimVo / 16; ++m) {
        state.o[m][c] *= shrink;
        state.o[m][2 + c] *= shrink;
      }
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[b][i] = exp2_approx(fmaf(s[b][i], scale_log2, -base[i % 2]));
        state.row_sum[i % 2] += s[b][i];
      }
    }
  }

  __device__ void pv_gemm(uint32_t smem_v, const Logits& s, WarpState<S, T>& state) const {
    const int lane = WarpLoop::lane();
    const int token = lane % 8 + lane / 16 * 8;
    const uint32_t v_at = first_chunk(smem_v + token * kPlan.pitch_v, lane / 8 % 2);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const uint32_t p0 = ptx::transpose(Ops::pack(s[b][0], s[b][1]));
      const uint32_t p1 = ptx::transpose(Ops::pack(s[b][2], s[b][3]));
#pragma unroll
      for (int m = 0; m < S::kHeadDimVo / 16; ++m) {
        uint32_t a[4];
        ptx::ldmatrix_x4_trans(a, chunk_at(v_at, m * 2) + b * 16 * kPlan.pitch_v);
        ptx::mma_m16n8k16<Element>(state.o[m], a, p0, p1);
      }
    }
  }
};

}  // namespace fi::sm80
