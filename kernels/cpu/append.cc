// append_kv: new K and V rows -> their slots of the cache, K and q rotated on the way.
#include <algorithm>
#include <cstring>

#include "cpu/attention.h"
#include "cpu/job.h"
#include "cpu/thread_pool.h"

namespace fi::cpu {
namespace {

// A thread's memory: a row, and the cosines and sines of a token's position.
struct Buffers {
  float* row;
  float* angles;  // null: nothing turns
};

// Where a row comes from and goes to.
struct Move {
  const char* from;
  char* to;
  DType to_dtype;
  int32_t dim;
  float scale;
  bool rotates;
};

// Converts any number of elements; load_row alone takes multiples of 8.
void load_floats(DType dtype, const char* from, float* to, int32_t count) {
  const auto load = active_kernels().load_row[static_cast<int32_t>(dtype)];
  const int32_t whole = count / kChunk * kChunk;
  load(from, to, whole);
  if (whole == count) return;
  char rest[kChunk * sizeof(float)] = {};
  float floats[kChunk];
  std::memcpy(rest, from + whole * element_size(dtype), (count - whole) * element_size(dtype));
  load(rest, floats, kChunk);
  std::copy_n(floats, count - whole, to + whole);
}

void rotate(const RopeParams& rope, const float* angles, float* row) {
  const int32_t pairs = rope.rotary_dim / 2;
  const int32_t step = rope.is_interleaved ? 2 : 1, partner = rope.is_interleaved ? 1 : pairs;
  for (int32_t i = 0; i < pairs; ++i) {
    float& x = row[i * step];
    float& y = row[i * step + partner];
    const float cos = angles[i], sin = angles[pairs + i];
    const float turned = x * cos - y * sin;
    y = y * cos + x * sin;
    x = turned;
  }
}

void move_row(const AppendParams& p, const Move& move, const Buffers& buffers) {
  if (p.dtype == move.to_dtype && !move.rotates) {
    std::memcpy(move.to, move.from, move.dim * element_size(p.dtype));
    return;
  }
  const IsaKernels& isa = active_kernels();
  isa.load_row[static_cast<int32_t>(p.dtype)](move.from, buffers.row, move.dim);
  if (move.rotates) rotate(p.rope, buffers.angles, buffers.row);
  if (move.to_dtype == DType::kFloat8E4M3) {
    for (int32_t d = 0; d < move.dim; ++d) buffers.row[d] /= move.scale;
  }
  isa.store_row[static_cast<int32_t>(move.to_dtype)](buffers.row, move.to, move.dim);
}

char* row_of(const void* data, DType dtype, const TokenStrides& stride, int64_t token,
             int32_t head) {
  // The caller knows which of its rows may be written.
  char* bytes = const_cast<char*>(static_cast<const char*>(data));
  return bytes + (token * stride.token + head * stride.head) * element_size(dtype);
}

char* cache_row(const KvCacheView& kv, void* data, const KvStrides& stride, int64_t slot,
                int32_t head) {
  const int64_t page = slot / kv.page_size, offset = slot % kv.page_size;
  const int64_t element = page * stride.page + offset * stride.token + head * stride.head;
  return static_cast<char*>(data) + element * element_size(kv.dtype);
}

void append_token(const AppendParams& p, int64_t token, const Buffers& buffers) {
  const bool rotates = buffers.angles != nullptr;
  if (rotates) {
    const int64_t position = p.rope.positions_are_int64
                                 ? static_cast<const int64_t*>(p.rope.positions)[token]
                                 : static_cast<const int32_t*>(p.rope.positions)[token];
    const char* row = static_cast<const char*>(p.rope.cos_sin) +
                      position * p.rope.cos_sin_stride * element_size(p.rope.cos_sin_dtype);
    load_floats(p.rope.cos_sin_dtype, row, buffers.angles, p.rope.rotary_dim);
  }
  for (int32_t head = 0; head < p.num_qo_heads; ++head) {
    const char* from = row_of(p.q, p.dtype, p.q_stride, token, head);
    char* to = row_of(p.q_out, p.dtype, p.q_out_stride, token, head);
    move_row(p, {from, to, p.dtype, p.head_dim_qk, 1.0f, rotates}, buffers);
  }
  const int64_t slot = p.slots[token];
  if (slot < 0) return;
  const Scale k_scale{p.k_scale, p.k_scale_per_head != 0};
  const Scale v_scale{p.v_scale, p.v_scale_per_head != 0};
  for (int32_t head = 0; head < p.num_kv_heads; ++head) {
    const char* k = row_of(p.k, p.dtype, p.k_stride, token, head);
    char* k_to = cache_row(p.kv, p.kv.k, p.kv.k_stride, slot, head);
    move_row(p, {k, k_to, p.kv.dtype, p.head_dim_qk, scale_of(k_scale, head), rotates}, buffers);
    const char* v = row_of(p.v, p.dtype, p.v_stride, token, head);
    char* v_to = cache_row(p.kv, p.kv.v, p.kv.v_stride, slot, head);
    move_row(p, {v, v_to, p.kv.dtype, p.head_dim_vo, scale_of(v_scale, head), false}, buffers);
  }
}

}  // namespace

void append_kv(const AppendParams& p, int num_threads) {
  const int32_t row_floats = std::max(p.head_dim_qk, p.head_dim_vo);
  const size_t scratch_bytes = (row_floats + p.rope.rotary_dim) * sizeof(float);
  const int64_t grain = 16;  // tokens: about 32 KB of 8 heads x 128 in bf16
  parallel_for(num_threads, p.num_tokens, grain, scratch_bytes,
               [&](int64_t begin, int64_t end, char* scratch) {
                 float* row = reinterpret_cast<float*>(scratch);
                 const Buffers buffers{row, p.rope.rotary_dim ? row + row_floats : nullptr};
                 for (int64_t token = begin; token < end; ++token) append_token(p, token, buffers);
               });
}

}  // namespace fi::cpu
