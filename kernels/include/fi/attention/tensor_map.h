// A tensor as the tensor memory accelerator sees it. The driver fills it (launch/tensor_map.h).
#pragma once

#include "fi/core/types.h"

namespace fi {

// CUtensorMap: opaque. CUDA 13 aligns it to 128 bytes, what reads it asks for 64.
struct alignas(128) TensorMap {
  uint64_t words[16];
};

}  // namespace fi
