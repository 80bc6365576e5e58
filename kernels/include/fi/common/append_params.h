// Arguments of append_kv, taken by the CPU engine and passed to the kernel as one
// __grid_constant__. Host code fills them: no device functions here but the division.
#pragma once

#include "fi/attention/kv_cache.h"

namespace fi {

// Elements that a thread moves at a time: 16 bytes of a 16-bit type, one vector access.
constexpr int32_t kChunk = 8;
constexpr int32_t kAppendThreads = 256;
// Division of 0 <= x < 2^31 by one multiplication (Granlund and Montgomery, 1994): for
// 2^(s-1) < d <= 2^s and m = ceil(2^(31+s) / d), which is below 2^32, x / d = (x * m) >> (31 + s).
// d = 12: s = 4, m = ceil(2^35 / 12) = 2863311531, 25 * m >> 35 = 2.
struct Divisor {
  uint32_t magic;
  int32_t shift;
  int32_t value;
};

FI_HOST_DEVICE constexpr Divisor make_divisor(int32_t value) {
  int32_t log2 = 0;
  while ((int64_t{1} << log2) < value) ++log2;
  const uint64_t power = uint64_t{1} << (31 + log2);
  return {static_cast<uint32_t>((power + value - 1) / value), 31 + log2, value};
}

FI_HOST_DEVICE constexpr int32_t divide(int32_t x, const Divisor& divisor) {
  return static_cast<int32_t>((static_cast<uint64_t>(static_cast<uint32_t>(x)) * divisor.magic) >>
                              divisor.shift);
}

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

// A thread's share of a row: one chunk, or a chunk and the one that it is rotated with.
FI_HOST_DEVICE constexpr int32_t units_of_row(int32_t dim, int32_t rotary_dim, bool interleaved) {
  if (rotary_dim == 0 || interleaved) return dim / kChunk;
  return ceil_div(rotary_dim / 2, kChunk) + ceil_div(dim - rotary_dim, kChunk);
}

FI_HOST_DEVICE constexpr int32_t rows_per_pass(int32_t units) { return kAppendThreads / units; }

// Rows in flight per thread: more would cost registers that hide no more latency.
FI_HOST_DEVICE constexpr int32_t max_passes(bool rotates) { return rotates ? 2 : 4; }

}  // namespace fi
