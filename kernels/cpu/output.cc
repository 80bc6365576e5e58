#include "cpu/output.h"

#include <algorithm>
#include <cstring>

#include "cpu/merge.h"

namespace fi::cpu {
namespace {

// A merge unit by what it belongs to.
struct UnitId {
  int32_t request;
  int32_t kv_head;
  int32_t tile;
  bool operator==(const UnitId&) const = default;
};

// Calls use(o, lse) for all partial states of a request's packed row, in the one fixed order: nodes
// as linked (ascending level and KV start), their splits, then the request's own splits.
template <class Use>
void visit_partials(const Job& job, const UnitId& id, const MergeUnit& unit, int32_t row,
                    const Use& use) {
  const PlanView& plan = job.plan;
  const int64_t dim = job.params.heads.head_dim_vo;
  const auto visit_splits = [&](int64_t partial_row, int32_t num_splits, int32_t num_rows) {
    for (int32_t s = 0; s < num_splits; ++s) {
      const int64_t at = partial_row + static_cast<int64_t>(s) * num_rows;
      use(job.params.partial_o + at * dim, job.params.partial_lse[at]);
    }
  };
  const PlannedRequest& request = plan.requests[id.request];
  const int32_t packed_row = id.tile * job.tile_class(request.tile_class).rows + row;
  for (int32_t l = request.link_begin; l < request.link_end; ++l) {
    const NodeLink& link = plan.links[l];
    const int32_t node_rows = job.tile_class(link.tile_class).rows;
    const int32_t node_row = link.row_offset + packed_row;
    const int32_t in_node = node_row / node_rows * job.params.heads.num_kv_heads + id.kv_head;
    const NodeTile& tile = plan.node_tiles[link.tile_base + in_node];
    visit_splits(tile.partial_row + node_row % node_rows, tile.num_splits, tile.num_rows);
  }
  visit_splits(unit.partial_row + row, unit.num_splits, unit.num_rows);
}

void merge_unit(const Job& job, const UnitId& id, const MergeUnit& unit, Scratch* scratch) {
  const PlannedRequest& request = job.plan.requests[id.request];
  const RequestRows run{id.request,
                        request.qo_begin,
                        request.kv_len - request.q_len,
                        request.q_len,
                        request.kv_len,
                        id.kv_head,
                        id.tile * job.tile_class(request.tile_class).rows,
                        unit.num_rows};
  fill_rows(job, run, scratch->rows);
  for (int32_t row = 0; row < unit.num_rows; ++row) {
    const auto visit = [&](const auto& use) { visit_partials(job, id, unit, row, use); };
    scratch->lse[row] = merge_row(visit, job.params.variant.softmax, job.params.heads.head_dim_vo,
                                  scratch->o + row * job.o_stride);
  }
  write_output(job, unit.num_rows, id.kv_head, scratch);
}

// Acquire and release: the partial states written before any arrival are seen by the last arriver,
// which also leaves the counter at zero for the next run.
void arrive(const Job& job, const UnitId& id, Scratch* scratch) {
  const PlannedRequest& request = job.plan.requests[id.request];
  const int32_t index = request.unit_base + id.kv_head * request.num_tiles + id.tile;
  const MergeUnit& unit = job.plan.units[index];
  int32_t* arrivals = job.params.arrivals + index;
  if (__atomic_add_fetch(arrivals, 1, __ATOMIC_ACQ_REL) != unit.expected) return;
  __atomic_store_n(arrivals, 0, __ATOMIC_RELAXED);
  merge_unit(job, id, unit, scratch);
}

// Once per unit that the node tile's rows overlap. Rows of one unit are neighbours: tokens are
// gathered request by request.
void arrive_for_node(const Job& job, const WorkItem& item, Scratch* scratch) {
  UnitId last{-1, -1, -1};
  for (int32_t r = 0; r < item.num_rows; ++r) {
    const int32_t x = item.row_begin + r;
    const GatheredToken& token = job.plan.gathered[item.qo_begin + x / job.group];
    const int32_t tile_class = job.plan.requests[token.request].tile_class;
    const int32_t packed_row = token.local * job.group + x % job.group;
    const UnitId id{token.request, item.kv_head, packed_row / job.tile_class(tile_class).rows};
    if (id == last) continue;
    last = id;
    arrive(job, id, scratch);
  }
}

// The sink is one more logit without a value: it takes weight from o and enters lse.
void apply_sinks(const Job& job, int32_t num_rows, Scratch* scratch) {
  for (int32_t r = 0; r < num_rows; ++r) {
    const float sink = job.params.variant.sinks[scratch->rows[r].q_head];
    const float lse = scratch->lse[r];
    const float high = std::max(lse, sink), low = std::min(lse, sink);
    if (high == -INFINITY) continue;  // nothing seen and no sink
    const float with_sink = high + std::log1p(std::exp(low - high));
    const float keep = std::exp(lse - with_sink);
    float* o = scratch->o + r * job.o_stride;
    for (int32_t d = 0; d < job.params.heads.head_dim_vo; ++d) o[d] *= keep;
    scratch->lse[r] = with_sink;
  }
}

void apply_output_stages(const Job& job, int32_t num_rows, int32_t kv_head, Scratch* scratch) {
  const VariantChain& chain = job.params.variant;
  for (int32_t i = 0; i < chain.num_stages; ++i) {
    if (!chain.stages[i].output) continue;
    const VariantTile view{scratch->rows,
                           chain.stages[i].params,
                           job.o_stride,
                           num_rows,
                           job.params.heads.head_dim_vo,
                           0,
                           kv_head,
                           job.masked_value()};
    chain.stages[i].output(view, scratch->o);
  }
}

}  // namespace

void normalise_rows(const Job& job, int32_t num_rows, Scratch* scratch) {
  if (!job.params.variant.softmax) return;
  for (int32_t r = 0; r < num_rows; ++r) {
    const float sum = scratch->row_sum[r];
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    float* o = scratch->o + r * job.o_stride;
    for (int32_t d = 0; d < job.params.heads.head_dim_vo; ++d) o[d] *= inverse;
    scratch->lse[r] = sum == 0.0f ? -INFINITY : scratch->row_max[r] + std::log(sum);
  }
}

void write_output(const Job& job, int32_t num_rows, int32_t kv_head, Scratch* scratch) {
  const AttentionParams& p = job.params;
  const int32_t dim = p.heads.head_dim_vo;
  const float v_scale = scale_of(p.v_scale, kv_head);
  if (v_scale != 1.0f) {
    for (int64_t i = 0; i < num_rows * job.o_stride; ++i) scratch->o[i] *= v_scale;
  }
  if (!p.partial) {
    if (p.variant.sinks && p.variant.softmax) apply_sinks(job, num_rows, scratch);
    apply_output_stages(job, num_rows, kv_head, scratch);
  }
  for (int32_t r = 0; r < num_rows; ++r) {
    const VariantRow& row = scratch->rows[r];
    const int64_t offset = row.token * p.out_stride_token + row.q_head * p.out_stride_head;
    char* out = static_cast<char*>(p.out) + offset * element_size(p.out_dtype);
    job.isa.store_row[static_cast<int32_t>(p.out_dtype)](scratch->o + r * job.o_stride, out, dim);
    if (p.lse && p.variant.softmax) {
      p.lse[static_cast<int64_t>(row.token) * p.heads.num_qo_heads + row.q_head] = scratch->lse[r];
    }
  }
}

void write_partial(const Job& job, const WorkItem& item, Scratch* scratch) {
  const AttentionParams& p = job.params;
  const int64_t dim = p.heads.head_dim_vo;
  for (int32_t r = 0; r < item.num_rows; ++r) {
    const int64_t at = static_cast<int64_t>(item.partial_row) + r;
    std::memcpy(p.partial_o + at * dim, scratch->o + r * job.o_stride, dim * sizeof(float));
    p.partial_lse[at] = p.variant.softmax ? scratch->lse[r] : 0.0f;
  }
  if (item.request < 0) return arrive_for_node(job, item, scratch);
  const int32_t rows = job.tile_class(item.tile_class).rows;
  arrive(job, {item.request, item.kv_head, item.row_begin / rows}, scratch);
}

}  // namespace fi::cpu
