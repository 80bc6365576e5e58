// run_attention: threads take spans of work items, each item is one pass over its KV range.
#include "cpu/attention.h"

#include <algorithm>
#include <atomic>

#include "cpu/kv_tiles.h"
#include "cpu/output.h"
#include "cpu/rotation.h"
#include "cpu/thread_pool.h"

namespace fi::cpu {
namespace {

// Planned cost (10 ns) that is worth one more thread: 20 us, about twice what waking one takes.
constexpr int64_t kCostPerThread = 2000;

TileOperands item_operands(const Job& job, const WorkItem& item, const Scratch& s) {
  TileOperands t{};
  t.rows = item.num_rows;
  t.head_dim_qk = job.params.heads.head_dim_qk;
  t.head_dim_vo = job.params.heads.head_dim_vo;
  t.q = s.q;
  t.logits = s.logits;
  t.o = s.o;
  t.row_max = s.row_max;
  t.row_sum = s.row_sum;
  t.rescale = s.rescale;
  t.k_transposed = s.k_transposed;
  t.v_floats = s.v_floats;
  t.q_stride = job.q_stride;
  t.logits_stride = kMaxTileCols;
  t.o_stride = job.o_stride;
  return t;
}

void reset_state(const Job& job, const WorkItem& item, Scratch* s) {
  const int64_t padded_rows = ceil_div(item.num_rows, kRowPad) * kRowPad;
  std::fill_n(s->o, padded_rows * job.o_stride, 0.0f);
  std::fill_n(s->rescale, padded_rows, 1.0f);
  std::fill_n(s->row_max, item.num_rows, -__builtin_inff());
  std::fill_n(s->row_sum, item.num_rows, 0.0f);
}

// The item's rows against its KV range: scratch.o, row_max and row_sum hold the state.
void attend(const Job& job, const WorkItem& item, Scratch* s) {
  const int32_t dtype = static_cast<int32_t>(job.params.kv.dtype);
  fill_rows(job, item, s->rows);
  load_q(job, item, s);
  reset_state(job, item, s);
  TileOperands t = item_operands(job, item, *s);
  const VariantBox rows = bound_rows(s->rows, item.num_rows);
  const bool turns = job.params.rotation.cos_sin != nullptr;
  const Rotator rotator(job, rows);
  if (turns) rotator.turn_q(item.num_rows, s);
  KvTiles tiles(job, item, rows, s);
  KvTile next = tiles.next();
  while (next.size() > 0) {
    const KvTile tile = next;
    next = tiles.next();
    t.cols = tile.size();
    t.k = tile.k;
    t.v = tile.v;
    t.k_next = next.k;
    if (turns) {
      rotator.turn_k(tile, s);
      t.q = rotator.q_of(tile, *s);
      t.k = s->k_turned_rows;
    }
    job.isa.qk[turns ? static_cast<int32_t>(DType::kFloat32) : dtype](t);
    apply_variant(job, item, tile, tiles.box(tile), s);
    if (job.params.variant.softmax) job.isa.softmax(t);
    job.isa.weigh_v[dtype](t);
  }
}

void run_item(const Job& job, const WorkItem& item, Scratch* scratch) {
  attend(job, item, scratch);
  normalise_rows(job, item.num_rows, scratch);
  if (item.partial_row < 0) {
    write_output(job, item.num_rows, item.kv_head, scratch);
  } else {
    write_partial(job, item, scratch);
  }
}

}  // namespace

void run_attention(const AttentionParams& params, int num_threads) {
  const Job job(params);
  if (job.plan.header->num_items == 0) return;
  Scratch unused;
  const size_t scratch_bytes = carve_scratch(job, nullptr, &unused);
  const int64_t useful = 1 + job.plan.header->total_cost / kCostPerThread;
  const int threads =
      static_cast<int>(std::min<int64_t>({num_threads, params.layout.num_ctas, useful}));
  std::atomic<int32_t> ticket{0};
  ThreadPool::instance().run(threads, scratch_bytes, [&](char* memory) {
    Scratch scratch;
    carve_scratch(job, memory, &scratch);
    for (int32_t cta = ticket++; cta < params.layout.num_ctas; cta = ticket++) {
      for (int32_t i = job.plan.cta_ptr[cta]; i < job.plan.cta_ptr[cta + 1]; ++i) {
        run_item(job, job.plan.items[i], &scratch);
      }
    }
  });
}

}  // namespace fi::cpu
