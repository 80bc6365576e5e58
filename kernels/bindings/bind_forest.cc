// The prefix forest: on the host, and the parameter block and launch of its kernel.
#include <pybind11/stl.h>

#include "bindings/address.h"
#include "bindings/bind.h"
#include "fi/common/forest_params.h"
#include "host/prefix_forest.h"
#include "launch/kernel.h"

namespace py = pybind11;

namespace fi {
namespace {

ForestKernelParams make_params(const PlanCapacity& capacity) {
  ForestKernelParams params{};
  params.capacity = capacity;
  params.num_names = 2;
  while (params.num_names < 2 * capacity.max_requests) params.num_names *= 2;
  params.layout = make_forest_layout(capacity);
  params.scratch_layout = forest::make_scratch_layout(capacity.max_requests, params.num_names);
  return params;
}

void set_table(ForestKernelParams& params, const PageTableView& table) {
  params.table = table;
  params.step_pages = pages_per_step(table.page_size);
  params.step_tokens = make_divisor(params.step_pages * table.page_size);
}

void launch_forest(const launch::Kernel& kernel, const ForestKernelParams& params, int32_t grid,
                   int32_t threads, std::uintptr_t stream) {
  kernel.launch(&params, grid, 1, threads, stream);
}

// kv_len_bytes: 4 or 8.
void find_forest(const PlanCapacity& capacity, int32_t num_requests, std::intptr_t qo_indptr,
                 std::intptr_t kv_len, int32_t kv_len_bytes, const PageTableView& table,
                 std::intptr_t forest) {
  const host::StepLengths lengths{num_requests, reinterpret_cast<const int32_t*>(qo_indptr),
                                  reinterpret_cast<const void*>(kv_len), kv_len_bytes == 8};
  py::gil_scoped_release release;
  host::find_forest(capacity, lengths, table, reinterpret_cast<void*>(forest));
}

}  // namespace

void bind_forest(py::module_& m) {
  py::class_<ForestLayout>(m, "ForestLayout")
      .def_readonly("nodes", &ForestLayout::nodes)
      .def_readonly("requests", &ForestLayout::requests)
      .def_readonly("links", &ForestLayout::links)
      .def_readonly("total_bytes", &ForestLayout::total_bytes);
  m.def("forest_layout", &make_forest_layout, py::arg("capacity"));
  m.def("find_forest", &find_forest, py::arg("capacity"), py::arg("num_requests"),
        py::arg("qo_indptr"), py::arg("kv_len"), py::arg("kv_len_bytes"), py::arg("table"),
        py::arg("forest"));

  py::class_<ForestKernelParams> params(m, "ForestKernelParams");
  def_pointer(params, "qo_indptr", &ForestKernelParams::qo_indptr);
  def_pointer(params, "kv_len", &ForestKernelParams::kv_len);
  def_pointer(params, "scratch", &ForestKernelParams::scratch);
  def_pointer(params, "branches", &ForestKernelParams::branches);
  def_pointer(params, "forest", &ForestKernelParams::forest);
  def_pointer(params, "totals", &ForestKernelParams::totals);
  params.def(py::init(&make_params), py::arg("capacity"))
      .def_readwrite("num_requests", &ForestKernelParams::num_requests)
      .def_readwrite("kv_len_is_int64", &ForestKernelParams::kv_len_is_int64)
      .def("set_table", &set_table, py::arg("table"))
      .def_property_readonly(
          "scratch_bytes",
          [](const ForestKernelParams& self) { return self.scratch_layout.total_bytes; })
      .def("__bytes__", [](const ForestKernelParams& self) {
        return py::bytes(reinterpret_cast<const char*>(&self), sizeof(self));
      });
  m.def("launch_forest", &launch_forest, py::arg("kernel"), py::arg("params"), py::arg("grid"),
        py::arg("threads"), py::arg("stream"));
}

}  // namespace fi
