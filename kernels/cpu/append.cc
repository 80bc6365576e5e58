// append_kv: new K and V rows -> their slots of the cache.
#include <cstring>

#include "cpu/attention.h"
#include "cpu/job.h"
#include "cpu/thread_pool.h"

namespace fi::cpu {
namespace {

// One side of the append: K or V.
struct Side {
  const char* src;
  int64_t src_stride_token, src_stride_head;  // elements
  char* dst;
  KvStrides dst_stride;
  int32_t dim;
  Scale scale;
};

void append_row(const AppendParams& p, const Side& side, int64_t token, int64_t slot, int32_t head,
                float* row) {
  const int64_t page = slot / p.kv.page_size, offset = slot % p.kv.page_size;
  const char* src = side.src + (token * side.src_stride_token + head * side.src_stride_head) *
                                   element_size(p.dtype);
  char* dst = side.dst + (page * side.dst_stride.page + offset * side.dst_stride.token +
                          head * side.dst_stride.head) *
                             element_size(p.kv.dtype);
  if (p.dtype == p.kv.dtype) {
    std::memcpy(dst, src, side.dim * element_size(p.dtype));
    return;
  }
  const IsaKernels& isa = active_kernels();
  isa.load_row[static_cast<int32_t>(p.dtype)](src, row, side.dim);
  if (p.kv.dtype == DType::kFloat8E4M3) {
    const float scale = scale_of(side.scale, head);
    for (int32_t d = 0; d < side.dim; ++d) row[d] /= scale;
  }
  isa.store_row[static_cast<int32_t>(p.kv.dtype)](row, dst, side.dim);
}

}  // namespace

void append_kv(const AppendParams& p, int num_threads) {
  const Side k{static_cast<const char*>(p.k),
               p.k_stride_token,
               p.k_stride_head,
               static_cast<char*>(p.kv.k),
               p.kv.k_stride,
               p.heads.head_dim_qk,
               p.k_scale};
  const Side v{static_cast<const char*>(p.v),
               p.v_stride_token,
               p.v_stride_head,
               static_cast<char*>(p.kv.v),
               p.kv.v_stride,
               p.heads.head_dim_vo,
               p.v_scale};
  const size_t scratch_bytes = std::max(k.dim, v.dim) * sizeof(float);
  const int64_t grain = 16;  // tokens: about 32 KB of 8 heads x 128 in bf16
  parallel_for(num_threads, p.num_tokens, grain, scratch_bytes,
               [&](int64_t begin, int64_t end, char* scratch) {
                 float* row = reinterpret_cast<float*>(scratch);
                 for (int64_t token = begin; token < end; ++token) {
                   if (p.slots[token] < 0) continue;
                   for (int32_t head = 0; head < p.heads.num_kv_heads; ++head) {
                     append_row(p, k, token, p.slots[token], head, row);
                     append_row(p, v, token, p.slots[token], head, row);
                   }
                 }
               });
}

}  // namespace fi::cpu
