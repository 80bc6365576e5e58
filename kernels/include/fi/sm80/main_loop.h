// The KV loop of one warp: logits, mask, online softmax, output, in registers.
// Source of the algorithm: FlashAttention-2 (Dao, 2023), online softmax (Milakov & Gimelshein,
// 2018).
#pragma once

#include "fi/core/elements.h"
#include "fi/core/math.h"
#include "fi/ptx/mma.h"
#include "fi/sm80/load.h"

namespace fi::sm80 {

// What a warp knows of its rows. Lane l holds rows r = l / 4 and r + 8 of each 16-row block.
template <class S, class T>
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

template <class S, class T>
class WarpLoop {
  using Element = typename S::Element;
  static constexpr int kColBlocks = T::kWarpCols / 8;  // n8 blocks of logits
  using Logits = float[T::kRowBlocks][kColBlocks][4];

 public:
  __device__ WarpLoop(const KernelParams& p, const WorkItem& item, const RowInfo* rows)
      : band_(p.band), rows_(rows) {
    const int warp = threadIdx.x / 32;
    lane_ = threadIdx.x % 32;
    first_row_ = warp / T::kWarpsN * T::kRowBlocks * 16;
    first_col_ = warp % T::kWarpsN * T::kWarpCols;
    scale_log2_ =
        p.scale * scale_of(p.q_scale, item.kv_head) * scale_of(p.k_scale, item.kv_head) * kLog2E;
  }

  __device__ int first_row() const { return first_row_; }

  // The rows' least and greatest position decide which KV tiles need masking per element. Rows of a
  // request ascend; gathered rows are in any order.
  __device__ void find_row_bounds(const WorkItem& item) {
    q_pos_min_ = rows_[0].q_pos;
    q_pos_max_ = rows_[item.num_rows - 1].q_pos;
    for (int x = 0; item.request < 0 && x < item.num_rows; ++x) {
      q_pos_min_ = min_i32(q_pos_min_, rows_[x].q_pos);
      q_pos_max_ = max_i32(q_pos_max_, rows_[x].q_pos);
    }
  }

  __device__ void step(uint32_t smem_q, uint32_t smem_k, uint32_t smem_v, int kv_begin, int kv_end,
                       WarpState<S, T>& state) {
    Logits s;
    qk_gemm(smem_q, smem_k, s);
    if (needs_mask(kv_begin, kv_end)) apply_mask(kv_begin + first_col_, kv_end, s);
    online_softmax(s, state);
    pv_gemm(smem_v, s, state);
  }

 private:
  __device__ void qk_gemm(uint32_t smem_q, uint32_t smem_k, Logits& s) const {
#pragma unroll
    for (int b = 0; b < T::kRowBlocks; ++b) {
#pragma unroll
      for (int n = 0; n < kColBlocks; ++n) s[b][n][0] = s[b][n][1] = s[b][n][2] = s[b][n][3] = 0.f;
    }
    const uint32_t q_at = smem_q + ((first_row_ + lane_ % 16) * S::kPitchQk + lane_ / 16 * 8) * 2;
    const uint32_t k_at =
        smem_k + ((first_col_ + lane_ % 8 + lane_ / 16 * 8) * S::kPitchQk + lane_ / 8 % 2 * 8) * 2;
#pragma unroll
    for (int k = 0; k < S::kHeadDimQk / 16; ++k) {
      uint32_t a[T::kRowBlocks][4];
#pragma unroll
      for (int b = 0; b < T::kRowBlocks; ++b) {
        ptx::ldmatrix_x4(a[b], q_at + (b * 16 * S::kPitchQk + k * 16) * 2);
      }
#pragma unroll
      for (int n = 0; n < kColBlocks; n += 2) {
        uint32_t kb[4];
        ptx::ldmatrix_x4(kb, k_at + (n * 8 * S::kPitchQk + k * 16) * 2);
#pragma unroll
        for (int b = 0; b < T::kRowBlocks; ++b) {
          ptx::mma_m16n8k16<Element>(s[b][n], a[b], kb[0], kb[1]);
          ptx::mma_m16n8k16<Element>(s[b][n + 1], a[b], kb[2], kb[3]);
        }
      }
    }
  }

  __device__ bool needs_mask(int kv_begin, int kv_end) const {
    if (kv_begin + T::kKvTile > kv_end) return true;
    if (band_.right >= 0 && kv_begin + T::kKvTile - 1 > q_pos_min_ + band_.right) return true;
    return band_.left >= 0 && kv_begin < q_pos_max_ - band_.left;
  }

  __device__ void apply_mask(int kv_begin, int kv_end, Logits& s) const {
#pragma unroll
    for (int b = 0; b < T::kRowBlocks; ++b) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Two bounds per row decide an element: comparisons only, no branch.
        const int q_pos = rows_[first_row_ + b * 16 + half * 8 + lane_ / 4].q_pos;
        const int column = kv_begin + lane_ % 4 * 2;
        const int end = band_.right >= 0 ? min_i32(kv_end, q_pos + band_.right + 1) : kv_end;
        const int high = end - column;
        const int low = band_.left >= 0 ? q_pos - band_.left - column : -(1 << 30);
        const int sink = band_.sink_prefix - column;
#pragma unroll
        for (int n = 0; n < kColBlocks; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int at = n * 8 + c;
            const bool seen = (at < high) & ((at >= low) | (at < sink));
            s[b][n][half * 2 + c] = seen ? s[b][n][half * 2 + c] : neg_infinity();
          }
        }
      }
    }
  }

  // s -> p = 2^(scale * s - max); rescales the state where the maximum grew.
  __device__ void online_softmax(Logits& s, WarpState<S, T>& state) const {
#pragma unroll
    for (int b = 0; b < T::kRowBlocks; ++b) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = neg_infinity();
#pragma unroll
        for (int n = 0; n < kColBlocks; ++n) {
          top = fmaxf(top, fmaxf(s[b][n][half * 2], s[b][n][half * 2 + 1]));
        }
        top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 2));
        const float old_max = state.row_max[b][half];
        const float new_max = fmaxf(old_max, top * scale_log2_);
        // A row that has seen nothing keeps max -inf; subtract 0 then, so that 2^-inf is 0, not
        // NaN.
        const float base = new_max == neg_infinity() ? 0.0f : new_max;
        const float shrink = exp2_approx(old_max - base);
        float sum = state.row_sum[b][half] * shrink;
#pragma unroll
        for (int n = 0; n < kColBlocks; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& x = s[b][n][half * 2 + c];
            x = exp2_approx(fmaf(x, scale_log2_, -base));
            sum += x;
          }
        }
        state.row_max[b][half] = new_max;
        state.row_sum[b][half] = sum;
#pragma unroll
        for (int n = 0; n < S::kHeadDimVo / 8; ++n) {
          state.o[b][n][half * 2] *= shrink;
          state.o[b][n][half * 2 + 1] *= shrink;
        }
      }
    }
  }

  __device__ void pv_gemm(uint32_t smem_v, const Logits& s, WarpState<S, T>& state) const {
    const uint32_t v_at = smem_v + ((first_col_ + lane_ % 16) * S::kPitchVo + lane_ / 16 * 8) * 2;
#pragma unroll
    for (int k = 0; k < T::kWarpCols / 16; ++k) {
      uint32_t a[T::kRowBlocks][4];
#pragma unroll
      for (int b = 0; b < T::kRowBlocks; ++b) {
        a[b][0] = ElementOps<Element>::pack(s[b][2 * k][0], s[b][2 * k][1]);
        a[b][1] = ElementOps<Element>::pack(s[b][2 * k][2], s[b][2 * k][3]);
        a[b][2] = ElementOps<Element>::pack(s[b][2 * k + 1][0], s[b][2 * k + 1][1]);
        a[b][3] = ElementOps<Element>::pack(s[b][2 * k + 1][2], s[b][2 * k + 1][3]);
      }
#pragma unroll
      for (int n = 0; n < S::kHeadDimVo / 8; n += 2) {
        uint32_t vb[4];
        ptx::ldmatrix_x4_trans(vb, v_at + (k * 16 * S::kPitchVo + n * 8) * 2);
#pragma unroll
        for (int b = 0; b < T::kRowBlocks; ++b) {
          ptx::mma_m16n8k16<Element>(state.o[b][n], a[b], vb[0], vb[1]);
          ptx::mma_m16n8k16<Element>(state.o[b][n + 1], a[b], vb[2], vb[3]);
        }
      }
    }
  }

  Band band_;
  const RowInfo* rows_;
  int lane_, first_row_, first_col_;
  int q_pos_min_, q_pos_max_;
  float scale_log2_;
};

}  // namespace fi::sm80
