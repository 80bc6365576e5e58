// The extension module fi_backend._core. Tensors cross as addresses and strides: the core links
// neither torch nor CUDA.
#include "bindings/bind.h"

PYBIND11_MODULE(_core, m) {
  m.doc() = "Native core of fi_backend: planner, CPU engine and kernel launches.";
  fi::bind_plan(m);
  fi::bind_cpu(m);
  fi::bind_variants(m);
  fi::bind_launch(m);  // first of the device files: the others launch the Kernel it registers
  fi::bind_plan_kernel(m);
  fi::bind_forest(m);
  fi::bind_ops(m);
  fi::bind_sm80(m);
}
