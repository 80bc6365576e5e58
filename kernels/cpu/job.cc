#include "cpu/job.h"

#include <algorithm>
#include <cstring>

namespace fi::cpu {
namespace {

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Hands out 64-byte aligned pieces of a block; without a block it only counts.
class Carver {
 public:
  explicit Carver(char* base) : base_(base) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace

Job::Job(const AttentionParams& p)
    : params(p),
      plan(view_plan(p.plan, p.layout)),
      isa(active_kernels()),
      group(p.heads.num_qo_heads / p.heads.num_kv_heads),
      max_rows(1),
      q_stride(round_up(p.heads.head_dim_qk, kDimPad)),
      o_stride(round_up(p.heads.head_dim_vo, kDimPad)) {
  for (const TileClass& c : p.classes) max_rows = std::max(max_rows, c.rows);
}

size_t carve_scratch(const Job& job, char* memory, Scratch* s) {
  const int64_t rows = round_up(job.max_rows, kRowPad);
  const int64_t row_bytes = std::max(job.q_stride, job.o_stride) * sizeof(float);
  Carver carver(memory);
  s->rows = carver.take<VariantRow>(rows);
  s->q = carver.take<float>(rows * job.q_stride);
  const bool turns = job.params.rotation.cos_sin != nullptr;
  s->q_for_sinks = carver.take<float>(turns ? rows * job.q_stride : 0);
  s->k_turned = carver.take<float>(turns ? kMaxTileCols * job.q_stride : 0);
  s->k_turned_rows = carver.take<const void*>(turns ? kMaxTileCols : 0);
  s->logits = carver.take<float>(rows * kMaxTileCols);
  s->o = carver.take<float>(rows * job.o_stride);
  s->row_max = carver.take<float>(rows);
  s->row_sum = carver.take<float>(rows);
  s->rescale = carver.take<float>(rows);
  s->lse = carver.take<float>(rows);
  s->k_transposed = carver.take<float>(job.q_stride * kMaxTileCols);
  s->v_floats = carver.take<float>(job.o_stride * kMaxTileCols);
  s->zeros = carver.take<char>(row_bytes);
  for (int i = 0; i < 2; ++i) {
    s->k_rows[i] = carver.take<const void*>(kMaxTileCols);
    s->v_rows[i] = carver.take<const void*>(kMaxTileCols);
  }
  if (memory) {  // may hold another call's layout
    std::memset(s->zeros, 0, row_bytes);
    for (int i = 0; i < 2; ++i) std::memset(s->k_rows[i], 0, kMaxTileCols * sizeof(void*));
  }
  return carver.used();
}

}  // namespace fi::cpu
