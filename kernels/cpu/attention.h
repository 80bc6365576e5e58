// Attention, append and merge on the CPU: the same work items as the GPU kernels, run by a pool of
// threads. This header is the whole interface of kernels/cpu.
#pragma once

#include "fi/attention/kv_cache.h"
#include "fi/attention/page_table.h"
#include "fi/attention/variant_hooks.h"
#include "fi/common/append_params.h"
#include "fi/plan/layout.h"

namespace fi::cpu {

struct HeadShape {
  int32_t num_qo_heads;
  int32_t num_kv_heads;  // divides num_qo_heads
  int32_t head_dim_qk;
  int32_t head_dim_vo;
};

// A scale in memory: null = 1, one value, or one per KV head.
struct Scale {
  const float* data;
  bool per_head;
};

struct AttentionParams {
  const void* q;  // [num_qo_tokens, num_qo_heads, head_dim_qk] q_dtype, head dimension contiguous
  int64_t q_stride_token, q_stride_head;  // elements
  DType q_dtype;
  void* out;  // [num_qo_tokens, num_qo_heads, head_dim_vo] out_dtype, head dimension contiguous
  int64_t out_stride_token, out_stride_head;
  DType out_dtype;  // q_dtype, or fp32
  float* lse;       // [num_qo_tokens, num_qo_heads] contiguous, natural log; null: not wanted
  KvCacheView kv;
  PageTableView table;
  HeadShape heads;
  Band band;    // applied to every row exactly, by the row's own position
  float scale;  // natural-unit logits = scale * q_scale * k_scale * (q . k)
  Scale q_scale, k_scale, v_scale;
  VariantChain variant;
  Rotation rotation;
  bool partial;  // true: out and lse are the state before sinks and output transform
  const void* plan;
  PlanLayout layout;
  TileClass classes[kMaxTileClasses];
  // Workspace. partial_o: float[max_partial_rows][head_dim_vo], partial_lse:
  // float[max_partial_rows], arrivals: int32[max_units], zero on entry and zero again on return.
  float* partial_o;
  float* partial_lse;
  int32_t* arrivals;
};

// Runs all items of the plan; returns when the output is complete.
void run_attention(const AttentionParams& params, int num_threads);

// Slots are in the cache or negative, positions in cos_sin.
void append_kv(const AppendParams& params, int num_threads);

// Merges num_states partial states per row: o [num_states][rows][dim] fp32 and natural lse
// [num_states][rows] -> o [rows][dim], lse [rows]. softmax false: o adds up, lse is not read.
struct MergeParams {
  const float* o;
  const float* lse;
  float* out_o;
  float* out_lse;
  int64_t num_states, rows, dim;
  bool softmax;
};
void merge_states(const MergeParams& params, int num_threads);

// Instruction sets that this binary carries and this machine can run, best first.
const char* active_isa();
// For tests: force "v2", "v3", "v4" or "auto"; returns false when the machine lacks it.
bool force_isa(const char* isa);

}  // namespace fi::cpu
