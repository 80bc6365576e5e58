// Arguments of append_kv, taken by the CPU engine and passed to the kernel as one
// __grid_constant__. Host code fills them: no device functions here.
#pragma once

#include "fi/attention/kv_cache.h"
#include "fi/plan/divide.h"

namespace fi {

// Elements that a thread moves at a time: 16 bytes of a 16-bit type, one vector access.
constexpr int32_t kChunk = 8;
constexpr int32_t kAppendThreads = 256;

// Elements between the tokens and between the heads of [tokens, heads, head_dim].
struct TokenStrides {
  int64_t token;
  int64_t head;
};

// Rotary embedding: the first rotary_dim elements of a row turn pairwise, pair i by the angle
// whose cosine and sine are in the row of the token's position. Pairs are (i, i + rotary_dim / 2),
// or neighbours (2i, 2i + 1) when interleaved.
struct RopeParams {
  const void* cos_sin;          // [num_positions, rotary_dim]: cosines of all pairs, then sines
  int64_t cos_sin_stride;       // elements between positions
  const void* positions;        // [num_tokens]
  int64_t num_positions;        // K and q of tokens elsewhere are not written
  DType cos_sin_dtype;          // fp32, or the type of k
  int32_t positions_are_int64;  // else int32
  int32_t rotary_dim;           // even, at most head_dim_qk; 0: no rotation
  int32_t is_interleaved;
};

struct AppendParams {
  const void* k;  // [num_tokens, num_kv_heads, head_dim_qk] dtype, head dimension contiguous
  const void* v;  // [num_tokens, num_kv_heads, head_dim_vo]
  const void* q;  // [num_tokens, num_qo_heads, head_dim_qk], rotated into q_out; may be q_out
  void* q_out;
  const int64_t* slots;  // [num_tokens]: page * page_size + offset; others: the token is skipped
  TokenStrides k_stride, v_stride, q_stride, q_out_stride;
  int32_t num_tokens, num_kv_heads, num_qo_heads;  // num_qo_heads 0: no q
  int32_t head_dim_qk, head_dim_vo;                // multiples of kChunk
  DType dtype;
  KvCacheView kv;        // of dtype; or fp8: value / scale, saturated to +-448, nearest even
  const float* k_scale;  // null: 1
  const float* v_scale;
  int32_t k_scale_per_head, v_scale_per_head;
  RopeParams rope;
  // The grid, filled at each launch: `k_ctas` CTAs move K, `v_ctas` V, the others q.
  Divisor kv_heads, qo_heads, page_size;
  int32_t num_slots;
  int32_t passes;  // groups of rows that a CTA moves
  int32_t k_ctas, v_ctas;
};

// Rows whose halves are whole chunks: a thread moves a chunk of each half.
FI_HOST_DEVICE constexpr bool has_halves(int32_t dim) { return dim % (2 * kChunk) == 0; }

// A thread's share of a row: one chunk, or two, such as those that rotation pairs.
FI_HOST_DEVICE constexpr int32_t units_of_row(int32_t dim, int32_t rotary_dim, bool interleaved) {
  if (rotary_dim == 0 && has_halves(dim)) return dim / (2 * kChunk);
  if (rotary_dim == 0 || interleaved) return dim / kChunk;
  return ceil_div(rotary_dim / 2, kChunk) + ceil_div(dim - rotary_dim, kChunk);
}

FI_HOST_DEVICE constexpr int32_t rows_per_pass(int32_t units) { return kAppendThreads / units; }

// Rows in flight per thread.
constexpr int32_t kMaxPasses = 2;

}  // namespace fi
