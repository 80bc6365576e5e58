// The planner kernel: its parameter block and its launch.
#include <algorithm>

#include "bindings/address.h"
#include "bindings/bind.h"
#include "fi/common/planner_params.h"
#include "host/planner.h"
#include "launch/kernel.h"

namespace py = pybind11;

namespace fi {
namespace {

// Row tiles see KV from position 0 and are cut anywhere.
bool sees_from_start(const PlanKernelParams& p) {
  return p.tiling.chunk.value == 0 && p.tiling.band.left < 0;
}

// True if a KV head's row tiles cost less than 2^31 together in any step within capacity.
bool is_narrow(const PlanKernelParams& p) {
  if (p.tiling.chunk.value > 0) return false;
  int64_t most = 0;
  for (int32_t c = 0; c < p.tiling.num_classes; ++c) {
    const TileClass& tc = p.tiling.classes[c];
    const int64_t tiles = (int64_t{p.max_kv_len} + tc.kv_tile - 1) / tc.kv_tile;
    most = std::max(most, tc.c_fixed + tc.c_tile * tiles);
  }
  return most * p.max_row_tiles < int64_t{1} << 31;
}

// Here, once: in the kernel these additions would delay its first load.
planner::ScratchLayout make_scratch_layout(const PlanKernelParams& p) {
  planner::ScratchLayout layout{};
  int64_t at = 0;
  const auto place = [&at](int64_t count, int64_t size) {
    const int64_t offset = at;
    at += (count * size + 15) / 16 * 16;
    return offset;
  };
  const int64_t num_cuts = p.num_ctas.value + 1, num_costs = p.max_row_tiles + 1;
  layout.cuts = place(num_cuts, sizeof(planner::Cut));
  layout.cost = place(num_costs, is_narrow(p) ? sizeof(uint32_t) : sizeof(int64_t));
  layout.pieces = place(p.tiling.chunk.value > 0 ? num_costs : 0, sizeof(int64_t));
  layout.tile_request = place(p.max_row_tiles, sizeof(int32_t));
  layout.tile_begin = place(p.max_requests + 1, sizeof(int32_t));
  layout.qo_begin = place(p.max_requests, sizeof(int32_t));
  layout.q_len = place(p.max_requests, sizeof(int32_t));
  layout.kv_len = place(p.max_requests, sizeof(int32_t));
  layout.cut_tile_rows = place(num_cuts, sizeof(int32_t));
  layout.total_bytes = at;
  return layout;
}

PlanKernelParams make_params(const host::PlanConfig& config, const PlanLayout& layout) {
  constexpr int32_t kMaxCtas = 1 << 15;  // exclusive: a remainder times a CTA fits
  if (config.num_ctas >= kMaxCtas) {
    throw py::value_error("num_ctas: expected fewer than " + std::to_string(kMaxCtas) + ", got " +
                          std::to_string(config.num_ctas) +
                          "; a few per multiprocessor are enough");
  }
  PlanKernelParams params{};
  params.tiling = host::make_tiling(config);
  params.layout = layout;
  params.num_kv_heads = make_divisor(config.num_kv_heads);
  params.num_ctas = make_divisor(config.num_ctas);
  params.wide.num_ctas = make_long_divisor(config.num_ctas);
  for (int32_t c = 0; c < params.tiling.num_classes; ++c) {
    const int32_t c_tile = max_i32(1, params.tiling.classes[c].c_tile);
    params.c_tile[c] = make_divisor(c_tile);
    params.wide.c_tile[c] = make_long_divisor(c_tile);
  }
  params.max_requests = config.capacity.max_requests;
  params.max_tokens = config.capacity.max_tokens;
  params.max_kv_len = config.capacity.max_kv_len;
  params.max_row_tiles = layout.max_units / config.num_kv_heads;
  params.scratch_layout = make_scratch_layout(params);
  return params;
}

void launch_plan(const launch::Kernel& kernel, const PlanKernelParams& params, int32_t grid,
                 int32_t threads, std::uintptr_t stream) {
  kernel.launch(&params, grid, 1, threads, stream);
}

}  // namespace

void bind_plan_kernel(py::module_& m) {
  py::class_<PlanKernelParams> params(m, "PlanKernelParams");
  def_pointer(params, "qo_indptr", &PlanKernelParams::qo_indptr);
  def_pointer(params, "kv_len", &PlanKernelParams::kv_len);
  def_pointer(params, "plan", &PlanKernelParams::plan);
  def_pointer(params, "status", &PlanKernelParams::status);
  def_pointer(params, "scratch", &PlanKernelParams::scratch);
  params.def(py::init(&make_params), py::arg("config"), py::arg("layout"))
      .def_readwrite("num_requests", &PlanKernelParams::num_requests)
      .def_readwrite("kv_len_is_int64", &PlanKernelParams::kv_len_is_int64)
      .def_readonly("max_requests", &PlanKernelParams::max_requests)
      .def_readonly("max_row_tiles", &PlanKernelParams::max_row_tiles)
      .def_property_readonly(
          "is_invariant", [](const PlanKernelParams& self) { return self.tiling.chunk.value > 0; })
      .def_property_readonly("num_classes",
                             [](const PlanKernelParams& self) { return self.tiling.num_classes; })
      .def_property_readonly("from_start", &sees_from_start)
      .def_property_readonly("is_narrow", &is_narrow)
      .def_property_readonly(
          "scratch_bytes",
          [](const PlanKernelParams& self) { return self.scratch_layout.total_bytes; })
      .def("__bytes__", [](const PlanKernelParams& self) {
        return py::bytes(reinterpret_cast<const char*>(&self), sizeof(self));
      });
  m.def("launch_plan", &launch_plan, py::arg("kernel"), py::arg("params"), py::arg("grid"),
        py::arg("threads"), py::arg("stream"));
}

}  // namespace fi
