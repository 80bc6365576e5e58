// A tensor as the tensor memory accelerator sees it. The driver fills it (launch/tensor_map.h).
#pragma once

#include "fi/core/types.h"

namespace fi {

// CUtensorMap: opaque.
struct alignas(64) TensorMap {
  uint64_t words[16];
};

}  // namespace fi
