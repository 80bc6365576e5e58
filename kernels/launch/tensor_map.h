// Tensor maps of KV caches, for kernels that copy boxes of them.
#pragma once

#include <cstdint>

#include "fi/attention/tensor_map.h"

namespace fi::launch {

// K or V of a layer: [pages, page_size, heads, dim], the last dimension contiguous.
struct CacheTensor {
  const void* data;  // a multiple of 16 bytes
  int64_t shape[4];
  int64_t strides[4];  // elements; multiples of 16 bytes where there is more than one
  int32_t element_bytes;
};

// A map whose boxes are 128 bytes of each token of a page, or of 64 tokens of a longer one,
// swizzled (fi/sm80/config.h). Its coordinates are (element, head, token, page). Throws DeviceError
// where the driver refuses.
TensorMap map_of_cache(const CacheTensor& cache);

}  // namespace fi::launch
