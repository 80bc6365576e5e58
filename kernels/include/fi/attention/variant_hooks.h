// The interface between an attention kernel and a variant's compiled functions.
//
// On the CPU a variant is a chain of functions over tiles of logits: each gets the rows of the tile
// (who asks) and a run of consecutive KV positions (who is asked), and edits the fp32 logits in
// place. The functions are printed from Python (fi_backend/variants); the shipped ones are built
// into the core, a user's own come from a shared library.
#pragma once

#include "fi/core/types.h"

namespace fi {

// Who a packed row is. kv_len and q_len are those of the row's request.
struct VariantRow {
  int32_t q_pos;    // position of the query token in its request
  int32_t token;    // row of q, counted over the batch
  int32_t q_head;   //
  int32_t request;  //
  int32_t q_len;    //
  int32_t kv_len;   //
};

// A declared parameter: a scalar or a strided tensor in the memory of the kernel's device.
struct VariantParam {
  const void* data;    // tensor base; null for scalars
  int64_t strides[3];  // elements
  double scalar;       //
};

struct VariantTile {
  const VariantRow* rows;
  const VariantParam* params;
  int64_t row_stride;  // floats between consecutive rows of the edited matrix
  int32_t num_rows;    //
  int32_t num_cols;    // logits: KV positions; output: components of the head dimension
  int32_t kv_begin;    // logits: KV position of column 0
  int32_t kv_head;     //
  float masked_value;  // -inf with softmax, 0 without
};

// Positions of a whole tile, inclusive bounds, for skipping it.
struct VariantBox {
  int32_t q_pos_min, q_pos_max;
  int32_t kv_pos_min, kv_pos_max;
  int32_t q_len_min, q_len_max;
  int32_t kv_len_min, kv_len_max;
  int32_t q_head_min, q_head_max;
};

enum class MaskKind : int32_t { kEmpty = 0, kFull = 1, kMixed = 2 };

using LogitsFn = void (*)(const VariantTile&, float* logits);  // logit -> logit
using MaskFn = void (*)(const VariantTile&, float* logits);    // false -> masked_value
using MaskKindFn = MaskKind (*)(const VariantBox&, const VariantParam*);
using OutputFn = void (*)(const VariantTile&, float* output);  // output -> output

// One link of the chain; null functions are identities. `mask_kind` may be null (always mixed).
struct VariantStage {
  LogitsFn logits;
  MaskFn mask;
  MaskKindFn mask_kind;
  OutputFn output;
  const VariantParam* params;
};

struct VariantChain {
  const VariantStage* stages;
  int32_t num_stages;
  bool softmax;        // false: logits are weights, partial states merge by addition
  const float* sinks;  // [num_qo_heads] natural logits of the sinks; null: none
};

// RoPE inside attention (fi_backend/variants/rotation.py): angles of slots, q and K turned by them.
// A slot is a position, or with a window (> 0) a place among sink_prefix leading tokens and those
// of the window.
struct Rotation {
  const float* cos_sin;  // [slots][rotary_dim], cosines then sines; null: q and K as they are
  int64_t stride;        // of a slot, elements
  int32_t rotary_dim;
  int32_t interleaved;  // pairs (2i, 2i + 1), else (i, i + rotary_dim / 2)
  int32_t window, sink_prefix;
};

}  // namespace fi
