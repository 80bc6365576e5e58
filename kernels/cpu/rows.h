// The query rows of a tile: who they are, and their q as scaled fp32.
#pragma once

#include "cpu/job.h"

namespace fi::cpu {

// A run of packed rows of one request.
struct RequestRows {
  int32_t request;
  int32_t qo_begin;     // first query token of the request
  int32_t q_pos_begin;  // its position
  int32_t q_len;
  int32_t kv_len;
  int32_t kv_head;
  int32_t row_begin;  // packed row, counted within the request
  int32_t num_rows;
};

void fill_rows(const Job& job, const RequestRows& run, VariantRow* rows);
void fill_rows(const Job& job, const WorkItem& item, VariantRow* rows);

// q rows -> scratch.q, zero-padded to the stride and to kRowPad rows.
void load_q(const Job& job, const WorkItem& item, Scratch* scratch);

// Bounds of the rows' positions and lengths; the KV positions are left to the tile.
VariantBox bound_rows(const VariantRow* rows, int32_t num_rows);

}  // namespace fi::cpu
