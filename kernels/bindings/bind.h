// One function per binding file.
#pragma once

#include <pybind11/pybind11.h>

namespace fi {

void bind_plan(pybind11::module_& m);
void bind_cpu(pybind11::module_& m);
void bind_variants(pybind11::module_& m);
void bind_launch(pybind11::module_& m);
void bind_plan_kernel(pybind11::module_& m);
void bind_forest(pybind11::module_& m);
void bind_ops(pybind11::module_& m);
void bind_sm80(pybind11::module_& m);

}  // namespace fi
