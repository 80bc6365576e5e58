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

// Where there is anything to share. Classes with a window or chunks read all KV by themselves.
bool has_nodes(const PlanKernelParams& p) { return p.max_nodes > 0 && sees_from_start(p); }

// Row tiles of one KV head.
int64_t max_request_tiles(const PlanKernelParams& p) {
  return p.layout.max_units / p.num_kv_heads.value;
}
int64_t max_node_tiles(const PlanKernelParams& p) {
  return has_nodes(p) ? p.layout.max_node_tiles / p.num_kv_heads.value : 0;
}

// True if a KV head's row tiles cost less than 2^31 together in any step within capacity. Quotients
// that count tiles of a node stay below 2^16 then.
bool is_narrow(const PlanKernelParams& p) {
  if (p.tiling.chunk.value > 0 || max_node_tiles(p) >= 1 << 16) return false;
  int64_t most = 0;
  for (int32_t c = 0; c < p.tiling.num_classes; ++c) {
    const TileClass& tc = p.tiling.classes[c];
    const int64_t tiles = (int64_t{p.max_kv_len} + tc.kv_tile - 1) / tc.kv_tile;
    most = std::max(most, tc.c_fixed + node_fixed(tc.rows) + tc.c_tile * tiles);
  }
  return most * (max_request_tiles(p) + max_node_tiles(p)) < int64_t{1} << 31;
}

// Here, once: in the kernel these additions would delay its first load.
void place_scratch(PlanKernelParams* params) {
  const PlanKernelParams& p = *params;
  int64_t at = 0;
  const auto place = [&at](int64_t count, int64_t size) {
    const int64_t offset = at;
    at += (count * size + 15) / 16 * 16;
    return offset;
  };
  const int64_t num_cuts = p.num_ctas.value + 1, num_costs = max_request_tiles(p) + 1;
  const int64_t cost_bytes = is_narrow(p) ? sizeof(uint32_t) : sizeof(int64_t);
  planner::ScratchLayout& layout = params->scratch_layout;
  layout.cuts = place(num_cuts, sizeof(planner::Cut));
  layout.cost = place(num_costs, cost_bytes);
  layout.pieces = place(p.tiling.chunk.value > 0 ? num_costs : 0, sizeof(int64_t));
  layout.tile_request = place(max_request_tiles(p), sizeof(int32_t));
  layout.tile_begin = place(p.max_requests + 1, sizeof(int32_t));
  layout.qo_begin = place(p.max_requests, sizeof(int32_t));
  layout.q_len = place(p.max_requests, sizeof(int32_t));
  layout.kv_len = place(p.max_requests, sizeof(int32_t));
  layout.cut_tile_rows = place(num_cuts, sizeof(int32_t));
  if (has_nodes(p)) {
    planner::NodeScratchLayout& nodes = params->node_layout;
    nodes.nodes = place(p.max_nodes + 1, is_narrow(p) ? sizeof(planner::NodePlace<uint32_t>)
                                                      : sizeof(planner::NodePlace<int64_t>));
    nodes.node_cost = place(p.max_nodes + 1, cost_bytes);
    nodes.node_cuts = place((p.layout.max_node_tiles + 1) / 2, sizeof(int32_t));
    nodes.first_links = place((p.max_requests + 3) / 4 * 4, sizeof(ForestLink));
    nodes.shared_tokens = place(p.max_requests, sizeof(int32_t));
  }
  layout.total_bytes = at;
}

PlanKernelParams make_params(const host::PlanConfig& config, const PlanLayout& layout) {
  // Exclusive: a remainder times a CTA fits, and the cuts of a tile into 16 bits.
  constexpr int32_t kMaxCtas = 1 << 15;
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
  params.max_nodes = config.capacity.max_nodes;
  place_scratch(&params);
  return params;
}

void launch_plan(const launch::Kernel& kernel, const PlanKernelParams& params, int32_t grid,
                 int32_t threads, std::uintptr_t stream, bool overlaps) {
  using launch::Overlap;
  const Overlap overlap = overlaps ? Overlap::kWithPrevious : Overlap::kNone;
  kernel.launch(&params, grid, 1, threads, stream, overlap);
}

}  // namespace

void bind_plan_kernel(py::module_& m) {
  py::class_<PlanKernelParams> params(m, "PlanKernelParams");
  def_pointer(params, "qo_indptr", &PlanKernelParams::qo_indptr);
  def_pointer(params, "kv_len", &PlanKernelParams::kv_len);
  def_pointer(params, "forest", &PlanKernelParams::forest);
  def_pointer(params, "plan", &PlanKernelParams::plan);
  def_pointer(params, "status", &PlanKernelParams::status);
  def_pointer(params, "scratch", &PlanKernelParams::scratch);
  params.def(py::init(&make_params), py::arg("config"), py::arg("layout"))
      .def_readwrite("num_requests", &PlanKernelParams::num_requests)
      .def_readwrite("kv_len_is_int64", &PlanKernelParams::kv_len_is_int64)
      .def_readonly("max_requests", &PlanKernelParams::max_requests)
      .def_property_readonly(
          "is_invariant", [](const PlanKernelParams& self) { return self.tiling.chunk.value > 0; })
      .def_property_readonly("num_classes",
                             [](const PlanKernelParams& self) { return self.tiling.num_classes; })
      .def_property_readonly("from_start", &sees_from_start)
      .def_property_readonly("is_narrow", &is_narrow)
      .def_property_readonly("has_nodes", &has_nodes)
      .def_property_readonly(
          "scratch_bytes",
          [](const PlanKernelParams& self) { return self.scratch_layout.total_bytes; })
      .def("__bytes__", [](const PlanKernelParams& self) {
        return py::bytes(reinterpret_cast<const char*>(&self), sizeof(self));
      });
  m.def("launch_plan", &launch_plan, py::arg("kernel"), py::arg("params"), py::arg("grid"),
        py::arg("threads"), py::arg("stream"), py::arg("overlaps"));
}

}  // namespace fi
