#include "cpu/rows.h"

#include <algorithm>

namespace fi::cpu {
namespace {

void fill_node_rows(const Job& job, const WorkItem& item, VariantRow* rows) {
  for (int32_t r = 0; r < item.num_rows; ++r) {
    const int32_t x = item.row_begin + r;
    const GatheredToken& token = job.plan.gathered[item.qo_begin + x / job.group];
    const PlannedRequest& request = job.plan.requests[token.request];
    rows[r] = {token.q_pos,   token.token,   item.kv_head * job.group + x % job.group,
               token.request, request.q_len, request.kv_len};
  }
}

}  // namespace

void fill_rows(const Job& job, const RequestRows& run, VariantRow* rows) {
  for (int32_t r = 0; r < run.num_rows; ++r) {
    const int32_t x = run.row_begin + r;
    const int32_t token = x / job.group;
    rows[r] = {run.q_pos_begin + token,
               run.qo_begin + token,
               run.kv_head * job.group + x % job.group,
               run.request,
               run.q_len,
               run.kv_len};
  }
}

void fill_rows(const Job& job, const WorkItem& item, VariantRow* rows) {
  if (item.request < 0) return fill_node_rows(job, item, rows);
  fill_rows(job,
            RequestRows{item.request, item.qo_begin, item.q_pos_begin, item.q_len, item.kv_len,
                        item.kv_head, item.row_begin, item.num_rows},
            rows);
}

void load_q(const Job& job, const WorkItem& item, Scratch* scratch) {
  const AttentionParams& p = job.params;
  const int32_t dtype = static_cast<int32_t>(p.q_dtype);
  const float scale =
      p.scale * scale_of(p.q_scale, item.kv_head) * scale_of(p.k_scale, item.kv_head);
  const int64_t padded_rows = ceil_div(item.num_rows, kRowPad) * kRowPad;
  std::fill_n(scratch->q, padded_rows * job.q_stride, 0.0f);
  for (int32_t r = 0; r < item.num_rows; ++r) {
    const VariantRow& row = scratch->rows[r];
    const int64_t offset = row.token * p.q_stride_token + row.q_head * p.q_stride_head;
    const char* src = static_cast<const char*>(p.q) + offset * element_size(p.q_dtype);
    float* q = scratch->q + r * job.q_stride;
    job.isa.load_row[dtype](src, q, p.heads.head_dim_qk);
    for (int32_t d = 0; d < p.heads.head_dim_qk; ++d) q[d] *= scale;
  }
}

VariantBox bound_rows(const VariantRow* rows, int32_t num_rows) {
  const VariantRow& first = rows[0];
  VariantBox box{first.q_pos,  first.q_pos,  0,           0, first.q_len, first.q_len, first.kv_len,
                 first.kv_len, first.q_head, first.q_head};
  for (int32_t r = 1; r < num_rows; ++r) {
    const VariantRow& row = rows[r];
    box.q_pos_min = std::min(box.q_pos_min, row.q_pos);
    box.q_pos_max = std::max(box.q_pos_max, row.q_pos);
    box.q_len_min = std::min(box.q_len_min, row.q_len);
    box.q_len_max = std::max(box.q_len_max, row.q_len);
    box.kv_len_min = std::min(box.kv_len_min, row.kv_len);
    box.kv_len_max = std::max(box.kv_len_max, row.kv_len);
    box.q_head_min = std::min(box.q_head_min, row.q_head);
    box.q_head_max = std::max(box.q_head_max, row.q_head);
  }
  return box;
}

}  // namespace fi::cpu
