// What every step of one run_attention() call needs, and the scratch memory of one thread.
#pragma once

#include <cstddef>

#include "cpu/attention.h"
#include "cpu/isa.h"

namespace fi::cpu {

struct Job {
  const AttentionParams& params;
  PlanView plan;
  const IsaKernels& isa;
  int32_t group;     // query heads per KV head
  int32_t max_rows;  // of any tile class
  int64_t q_stride;  // scratch strides, floats
  int64_t o_stride;

  explicit Job(const AttentionParams& params);

  float masked_value() const { return params.variant.softmax ? -__builtin_inff() : 0.0f; }
  const TileClass& tile_class(int32_t index) const { return params.classes[index]; }
};

// One thread's scratch, carved from one block. R = max_rows rounded up to kRowPad.
struct Scratch {
  VariantRow* rows;        // [R]
  float* q;                // [R][q_stride] fp32, scale folded in
  float* q_for_sinks;      // the same for leading tokens, where slots roll (cpu/rotation.h)
  float* k_turned;         // [kMaxTileCols][q_stride] fp32, where K turns
  float* logits;           // [R][kMaxTileCols]
  float* o;                // [R][o_stride]
  float* row_max;          // [R]
  float* row_sum;          // [R]
  float* rescale;          // [R]
  float* lse;              // [R]
  float* k_transposed;     // [q_stride][kMaxTileCols]
  float* v_floats;         // [kMaxTileCols][o_stride]
  char* zeros;             // one KV row of any dtype
  const void** k_rows[2];  // [kMaxTileCols] each: this tile's and the next one's
  const void** v_rows[2];  //
  const void** k_turned_rows;
};

// Lays scratch out in `memory` and returns the bytes it takes; memory null: only counts.
size_t carve_scratch(const Job& job, char* memory, Scratch* scratch);

inline float scale_of(const Scale& scale, int32_t kv_head) {
  if (!scale.data) return 1.0f;
  return scale.data[scale.per_head ? kv_head : 0];
}

}  // namespace fi::cpu
