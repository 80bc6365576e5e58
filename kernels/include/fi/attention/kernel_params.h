// Arguments of an attention kernel on the GPU, passed as one __grid_constant__. Host code fills it
// too: no device functions here.
#pragma once

#include "fi/attention/kv_cache.h"
#include "fi/attention/page_table.h"
#include "fi/attention/tensor_map.h"
#include "fi/attention/variant_hooks.h"
#include "fi/plan/layout.h"

namespace fi {

// Most parameters of a variant, summed over its functions: they travel with every launch.
constexpr int32_t kMaxVariantParams = 16;

// A scale in memory: null = 1, one value, or one per KV head.
struct DeviceScale {
  const float* data;
  int32_t per_head;
};

struct KernelParams {
  const void* q;  // [num_qo_tokens, num_qo_heads, head_dim_qk], head dimension contiguous
  void* out;      // [num_qo_tokens, num_qo_heads, head_dim_vo]
  float* lse;     // [num_qo_tokens, num_qo_heads] natural log; null: not wanted
  int64_t q_stride_token, q_stride_head, out_stride_token, out_stride_head;  // elements
  KvCacheView kv;
  PageTableView table;
  int32_t page_shift;  // log2(page size); used by kernels for plain pages only
  int32_t num_qo_heads, num_kv_heads;
  Band band;
  float scale;  // logits = scale * q_scale * k_scale * (q . k)
  DeviceScale q_scale, k_scale, v_scale;
  const float* sinks;      // [num_qo_heads] natural logits; null: none
  int32_t out_is_float32;  // else the type of q
  int32_t is_partial;      // write the state before sinks and the output transform
  const void* plan;
  PlanLayout layout;
  float* partial_o;    // [max_partial_rows][head_dim_vo]
  float* partial_lse;  // [max_partial_rows], log2 inside the kernels
  int32_t* arrivals;   // [max_units], zero between launches
  Rotation rotation;
  VariantParam variant_params[kMaxVariantParams];
  TensorMap k_boxes, v_boxes;  // of kernels that copy boxes
};

}  // namespace fi
