// The extension module fi_backend._core. Tensors cross as addresses and strides: the core links
// neither torch nor CUDA.
#include "bindings/bind.h"

PYBIND11_MODULE(_core, m) {
  m.doc() = "Native core of fi_backend: planner and CPU engine.";
  fi::bind_plan(m);
  fi::bind_cpu(m);
  fi::bind_variants(m);
}
