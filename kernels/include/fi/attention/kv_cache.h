// The KV cache of one layer, read in place through strides (elements). The head dimension is
// contiguous; everything else may lie anywhere, K and V apart or interleaved.
#pragma once

#include "fi/core/types.h"

namespace fi {

struct KvStrides {
  int64_t page;
  int64_t token;
  int64_t head;
};

struct KvCacheView {
  void* k;
  void* v;
  KvStrides k_stride;
  KvStrides v_stride;
  int64_t num_pages;
  int32_t page_size;
  DType dtype;
};

}  // namespace fi
