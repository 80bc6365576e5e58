// The tile arithmetic: q . k, online softmax, weights . v, for one register width.
//
// Two ways through a tile. Few rows (decode): K and V are converted in registers as they arrive
// from memory and used for up to 4 rows at once; bound by memory. Many rows (prefill): K
// (transposed) and V become fp32 scratch once per tile, then both products are the same
// register-blocked matrix product; bound by multiply-adds. Unnamed namespace: see simd.h.
#pragma once

#include "cpu/convert.h"
#include "cpu/isa.h"

namespace fi::cpu {
namespace {

// Inner blocks are [[gnu::flatten]]: one call left in them sends every accumulator to memory.

template <class T>
[[gnu::always_inline]] inline void prefetch_row(const void* row, int32_t n) {
  const char* p = static_cast<const char*>(row);
  for (int64_t i = 0; i < n * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(p + i);
}

// ---- few rows: q . k ----------------------------------------------------------------------------

// Columns per block of R rows. R * C accumulators: 16 of 32 registers with AVX-512, 8 of 16 else.
template <int R>
constexpr int kDotCols = R == 1 ? 8 : (kWidth == 16 ? 16 : 8) / (R == 2 ? 2 : 4);

// logits[row, row + R)[col, col + C) by dot products along the head dimension; the lanes of all
// accumulators are summed together at the end.
template <class T, int R, int C>
[[gnu::flatten]] void dot_block(const TileOperands& t, int32_t row, int32_t col) {
  constexpr int kVecs = (R * C + kWidth - 1) / kWidth;  // of sums
  Vec acc[kVecs * kWidth] = {};
  const void* const* k = t.k + col;
  const float* q = t.q + row * t.q_stride;
  int32_t d = 0;
  for (; d + kWidth <= t.head_dim_qk; d += kWidth) {
    Vec q_part[R];
    unroll<R>([&](int r) { q_part[r] = load(q + r * t.q_stride + d); });
    unroll<C>([&](int c) {
      const Vec k_part = load(static_cast<const T*>(k[c]) + d);
      unroll<R>([&](int r) { acc[r * C + c] += q_part[r] * k_part; });
    });
  }
  if (kHasHalfVec && d < t.head_dim_qk) {
    unroll<C>([&](int c) {
      const Vec k_part = load_half(static_cast<const T*>(k[c]) + d);
      unroll<R>([&](int r) { acc[r * C + c] += load(q + r * t.q_stride + d) * k_part; });
    });
  }
  float sums[kVecs * kWidth];
  unroll<kVecs>([&](int i) { store(sums + i * kWidth, sum_lanes(acc + i * kWidth)); });
  float* logits = t.logits + row * t.logits_stride + col;
  unroll<R>([&](int r) {
    __builtin_memcpy(logits + r * t.logits_stride, sums + r * C, C * sizeof(float));
  });
}

template <class T, int R>
void dot_rows(const TileOperands& t, int32_t row, int32_t col) {
  constexpr int C = kDotCols<R>;
  for (int32_t c = 0; c < kColPad; c += C) {
    // The V rows of these columns are wanted next: ask for them while K is being used.
    if (row == 0) {
      for (int32_t i = col + c; i < col + c + C && i < t.cols; ++i) {
        prefetch_row<T>(t.v[i], t.head_dim_vo);
      }
    }
    dot_block<T, R, C>(t, row, col + c);
  }
}

template <class T>
void dot_tile(const TileOperands& t) {
  for (int32_t col = 0; col < t.cols; col += kColPad) {
    int32_t row = 0;
    for (; row + 4 <= t.rows; row += 4) dot_rows<T, 4>(t, row, col);
    if (t.rows - row == 3) dot_rows<T, 3>(t, row, col);
    if (t.rows - row == 2) dot_rows<T, 2>(t, row, col);
    if (t.rows - row == 1) dot_rows<T, 1>(t, row, col);
  }
}

// ---- few rows: weights . v ----------------------------------------------------------------------

// o[row, row + R)[d, d + D vectors): one pass over the tile's V rows. kHalf: D = 1 and only 8
// elements of the vector exist.
template <class T, int R, int D, bool kHalf>
[[gnu::flatten]] void weigh_block(const TileOperands& t, int32_t row, int32_t d) {
  Vec acc[R][D];
  float* o = t.o + row * t.o_stride + d;
  const float* weights = t.logits + row * t.logits_stride;
  unroll<R>([&](int r) {
    unroll<D>(
        [&](int j) { acc[r][j] = load(o + r * t.o_stride + j * kWidth) * t.rescale[row + r]; });
  });
  const bool first_pass = row == 0 && d == 0;
  for (int32_t col = 0; col < t.cols; ++col) {
    const T* v = static_cast<const T*>(t.v[col]) + d;
    if (first_pass) prefetch_row<T>(t.k_next[col], t.head_dim_qk);
    Vec v_part[D];
    unroll<D>([&](int j) { v_part[j] = kHalf ? load_half(v) : load(v + j * kWidth); });
    unroll<R>([&](int r) {
      const Vec weight = broadcast(weights[r * t.logits_stride + col]);
      unroll<D>([&](int j) { acc[r][j] += weight * v_part[j]; });
    });
  }
  unroll<R>(
      [&](int r) { unroll<D>([&](int j) { store(o + r * t.o_stride + j * kWidth, acc[r][j]); }); });
}

template <class T, int R>
void weigh_rows(const TileOperands& t, int32_t row) {
  constexpr int D = kWidth == 16 ? 4 : 2;
  int32_t d = 0;
  for (; d + D * kWidth <= t.head_dim_vo; d += D * kWidth) weigh_block<T, R, D, false>(t, row, d);
  for (; d + kWidth <= t.head_dim_vo; d += kWidth) weigh_block<T, R, 1, false>(t, row, d);
  if constexpr (kHasHalfVec) {
    if (d < t.head_dim_vo) weigh_block<T, R, 1, true>(t, row, d);
  }
}

template <class T>
void weigh_tile(const TileOperands& t) {
  int32_t row = 0;
  for (; row + 4 <= t.rows; row += 4) weigh_rows<T, 4>(t, row);
  if (t.rows - row == 3) weigh_rows<T, 3>(t, row);
  if (t.rows - row == 2) weigh_rows<T, 2>(t, row);
  if (t.rows - row == 1) weigh_rows<T, 1>(t, row);
}

// ---- many rows ----------------------------------------------------------------------------------

struct Matrix {
  float* data;
  int64_t stride;
};

// c[6][N vectors] = c * scale + a[6][depth] . b[depth][N vectors]; scale null: c = a . b.
// 6 x 4 vectors of 16 (6 x 2 of 8 or 4) leave registers for one row of b and one broadcast of a.
template <int N>
[[gnu::flatten]] void matmul_block(Matrix a, Matrix b, Matrix c, const float* scale,
                                   int32_t depth) {
  Vec acc[kRowPad][N] = {};
  if (scale) {
    unroll<kRowPad>([&](int r) {
      unroll<N>([&](int j) { acc[r][j] = load(c.data + r * c.stride + j * kWidth) * scale[r]; });
    });
  }
  for (int32_t i = 0; i < depth; ++i) {
    Vec b_part[N];
    unroll<N>([&](int j) { b_part[j] = load(b.data + i * b.stride + j * kWidth); });
    unroll<kRowPad>([&](int r) {
      const Vec a_part = broadcast(a.data[r * a.stride + i]);
      unroll<N>([&](int j) { acc[r][j] += a_part * b_part[j]; });
    });
  }
  unroll<kRowPad>([&](int r) {
    unroll<N>([&](int j) { store(c.data + r * c.stride + j * kWidth, acc[r][j]); });
  });
}

// Column blocks outermost: depth x 4 vectors of b (32 KB at depth 128) stay in L1 for all rows.
void matmul(Matrix a, Matrix b, Matrix c, const float* scale, int32_t rows, int32_t cols,
            int32_t depth) {
  constexpr int N = kWidth == 16 ? 4 : 2;
  for (int32_t col = 0; col < cols;) {
    const bool whole = col + N * kWidth <= cols;
    for (int32_t row = 0; row < rows; row += kRowPad) {
      const Matrix a_block{a.data + row * a.stride, a.stride};
      const Matrix b_block{b.data + col, b.stride};
      const Matrix c_block{c.data + row * c.stride + col, c.stride};
      const float* block_scale = scale ? scale + row : nullptr;
      if (whole) {
        matmul_block<N>(a_block, b_block, c_block, block_scale, depth);
      } else {
        matmul_block<1>(a_block, b_block, c_block, block_scale, depth);
      }
    }
    col += whole ? N * kWidth : kWidth;
  }
}

// k_transposed[d][col] = k[col][d]
template <class T>
[[gnu::flatten]] void transpose_keys(const TileOperands& t) {
  for (int32_t col = 0; col < t.cols; col += kWidth) {
    for (int32_t i = col; i < col + kWidth && i < t.cols; ++i) {
      prefetch_row<T>(t.v[i], t.head_dim_vo);
    }
    for (int32_t d = 0; d < t.head_dim_qk; d += kWidth) {
      const bool whole = !kHasHalfVec || d + kWidth <= t.head_dim_qk;
      Vec block[kWidth];
      unroll<kWidth>([&](int i) {
        const T* k = static_cast<const T*>(t.k[col + i]) + d;
        block[i] = whole ? load(k) : load_half(k);
      });
      transpose(block);
      float* to = t.k_transposed + d * t.logits_stride + col;
      unroll<kWidth>([&](int i) {
        if (whole || i < kWidth / 2) store(to + i * t.logits_stride, block[i]);
      });
    }
  }
}

template <class T>
void qk_tile(const TileOperands& t) {
  if (t.rows < kMatmulRows) return dot_tile<T>(t);
  transpose_keys<T>(t);
  matmul({t.q, t.q_stride}, {t.k_transposed, t.logits_stride}, {t.logits, t.logits_stride}, nullptr,
         t.rows, t.cols, t.head_dim_qk);
}

template <class T>
void weigh_v_tile(const TileOperands& t) {
  if (t.rows < kMatmulRows) return weigh_tile<T>(t);
  for (int32_t col = 0; col < t.cols; ++col) {
    prefetch_row<T>(t.k_next[col], t.head_dim_qk);
    load_row<T>(t.v[col], t.v_floats + col * t.o_stride, t.head_dim_vo);
  }
  matmul({t.logits, t.logits_stride}, {t.v_floats, t.o_stride}, {t.o, t.o_stride}, t.rescale,
         t.rows, t.head_dim_vo, t.cols);
}

// ---- softmax ------------------------------------------------------------------------------------

// m' = max(m, logits); weights = e^(logit - m'); l' = l e^(m - m') + sum of weights;
// rescale = e^(m - m'). A row that has seen nothing (m' = -inf) keeps l = 0 and gets weights 0.
void softmax_tile(const TileOperands& t) {
  const float infinity = __builtin_inff();
  for (int32_t row = 0; row < t.rows; ++row) {
    float* logits = t.logits + row * t.logits_stride;
    for (int32_t col = t.cols; col % kWidth != 0; ++col) logits[col] = -infinity;
    Vec tile_max = broadcast(t.row_max[row]);
    for (int32_t col = 0; col < t.cols; col += kWidth) tile_max = max(tile_max, load(logits + col));
    const float new_max = max_lane(tile_max);
    // Any finite number does for a row without logits: e^(-inf - 0) = 0.
    const float base = new_max == -infinity ? 0.0f : new_max;
    Vec sum = {};
    for (int32_t col = 0; col < t.cols; col += kWidth) {
      const Vec weight = exp_nonpositive(load(logits + col) - base);
      store(logits + col, weight);
      sum += weight;
    }
    const float rescale = exp_nonpositive(broadcast(t.row_max[row] - base))[0];
    t.row_sum[row] = t.row_sum[row] * rescale + sum_lane(sum);
    t.row_max[row] = new_max;
    t.rescale[row] = rescale;
  }
}

constexpr IsaKernels make_kernels(const char* name) {
  return {
      name,
      {load_row<Float32>, load_row<Float16>, load_row<BFloat16>, load_row<Float8>},
      {store_row<Float32>, store_row<Float16>, store_row<BFloat16>, store_row<Float8>},
      {qk_tile<Float32>, qk_tile<Float16>, qk_tile<BFloat16>, qk_tile<Float8>},
      softmax_tile,
      {weigh_v_tile<Float32>, weigh_v_tile<Float16>, weigh_v_tile<BFloat16>, weigh_v_tile<Float8>}};
}

}  // namespace
}  // namespace fi::cpu
