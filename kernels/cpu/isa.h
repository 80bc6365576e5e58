// The arithmetic of the engine as a table of functions, one table per instruction set. What a tile
// means (rows, pages, masks, splits) is decided outside; these only see pointers and counts.
#pragma once

#include "fi/core/types.h"

namespace fi::cpu {

constexpr int32_t kMaxTileCols = 64;  // logits of 64 rows x 64 columns stay in L1 beside a K tile
constexpr int32_t kColPad = 16;       // kernels round columns up to this
constexpr int32_t kRowPad = 6;        // and rows of large tiles up to this
constexpr int32_t kMatmulRows = 17;   // from here on packing K and V costs less than converting
                                      // them once per 4 rows
constexpr int32_t kDimPad = 16;       // and strides of fp32 scratch up to this

// One KV tile against the rows of one item. Scratch is fp32.
struct TileOperands {
  int32_t rows;
  int32_t cols;
  int32_t head_dim_qk;
  int32_t head_dim_vo;
  const void* const* k;       // [cols rounded up to kColPad] rows of K; zeros past cols
  const void* const* v;       // [cols] rows of V; a row of zeros where no query row sees it
  const void* const* k_next;  // [kMaxTileCols] rows of K to prefetch; any address will do
  float* q;                   // [rows rounded up to kRowPad][q_stride], zeros past the data
  float* logits;              // [rows rounded up to kRowPad][logits_stride]
  float* o;                   // [rows rounded up to kRowPad][o_stride], running weighted sum of V
  float* row_max;             // [rows] running maximum of the logits
  float* row_sum;             // [rows] running sum of the weights
  float* rescale;             // [rows rounded up to kRowPad] what o is multiplied by in this tile
  float* k_transposed;        // [head_dim_qk][logits_stride]
  float* v_floats;            // [kMaxTileCols][o_stride]
  int64_t q_stride;           // multiples of kDimPad
  int64_t logits_stride;      //
  int64_t o_stride;           //
};

using LoadRowFn = void (*)(const void* src, float* dst, int64_t n);   // n: a multiple of 8
using StoreRowFn = void (*)(const float* src, void* dst, int64_t n);  // fp8 saturates to +-448
using TileFn = void (*)(const TileOperands&);

// Arrays are indexed by DType.
struct IsaKernels {
  const char* name;
  LoadRowFn load_row[4];
  StoreRowFn store_row[4];
  TileFn qk[4];       // logits = q . k
  TileFn softmax;     // logits -> weights exp(logit - row_max), with row_max, row_sum, rescale
  TileFn weigh_v[4];  // o = o * rescale + weights . v
};

extern const IsaKernels kIsaV2, kIsaV3, kIsaV4;

const IsaKernels& active_kernels();

constexpr int64_t element_size(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kFloat8E4M3 ? 1 : 2;
}

}  // namespace fi::cpu
