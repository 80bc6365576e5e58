// Planner bindings: configuration and layout as typed objects, arrays as addresses.
#include <pybind11/stl.h>

#include "bindings/bind.h"
#include "host/cost_model.h"
#include "host/planner.h"

namespace py = pybind11;

namespace fi {
namespace {

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<intptr_t>(address));
}

void bind_records(py::module_& m) {
  py::class_<Band>(m, "Band")
      .def(py::init<int32_t, int32_t, int32_t>(), py::arg("left"), py::arg("right"),
           py::arg("sink_prefix"))
      .def_readwrite("left", &Band::left)
      .def_readwrite("right", &Band::right)
      .def_readwrite("sink_prefix", &Band::sink_prefix);
  py::class_<TileClass>(m, "TileClass")
      .def(py::init<int32_t, int32_t, int32_t, int32_t>(), py::arg("rows"), py::arg("kv_tile"),
           py::arg("c_fixed"), py::arg("c_tile"))
      .def_readonly("rows", &TileClass::rows)
      .def_readonly("kv_tile", &TileClass::kv_tile)
      .def_readonly("c_fixed", &TileClass::c_fixed)
      .def_readonly("c_tile", &TileClass::c_tile);
  py::class_<PlanCapacity>(m, "PlanCapacity")
      .def(py::init<int32_t, int32_t, int32_t, int32_t, int32_t, int32_t>(),
           py::arg("max_requests"), py::arg("max_tokens"), py::arg("max_kv_len"),
           py::arg("max_nodes"), py::arg("max_links"), py::arg("max_shared_tokens"));
  py::class_<PlanLayout>(m, "PlanLayout")
      .def_readonly("cta_ptr", &PlanLayout::cta_ptr)
      .def_readonly("first_items", &PlanLayout::first_items)
      .def_readonly("items", &PlanLayout::items)
      .def_readonly("units", &PlanLayout::units)
      .def_readonly("requests", &PlanLayout::requests)
      .def_readonly("nodes", &PlanLayout::nodes)
      .def_readonly("node_tiles", &PlanLayout::node_tiles)
      .def_readonly("links", &PlanLayout::links)
      .def_readonly("gathered", &PlanLayout::gathered)
      .def_readonly("total_bytes", &PlanLayout::total_bytes)
      .def_readonly("max_items", &PlanLayout::max_items)
      .def_readonly("max_units", &PlanLayout::max_units)
      .def_readonly("max_node_tiles", &PlanLayout::max_node_tiles)
      .def_readonly("num_ctas", &PlanLayout::num_ctas)
      .def_readonly("max_partial_rows", &PlanLayout::max_partial_rows);
}

// Rows strictly ascend; nothing is free, or a cut could not be found by its cost.
void require_classes(const std::vector<TileClass>& classes) {
  bool is_legal = !classes.empty() && classes.size() <= kMaxTileClasses;
  int32_t rows = 0;
  std::string got;
  for (const TileClass& c : classes) {
    is_legal = is_legal && c.rows > rows && c.kv_tile > 0 && c.c_fixed > 0 && c.c_tile > 0;
    rows = c.rows;
    got += "(" + std::to_string(c.rows) + ", " + std::to_string(c.kv_tile) + ", " +
           std::to_string(c.c_fixed) + ", " + std::to_string(c.c_tile) + ")";
  }
  if (is_legal) return;
  throw py::value_error("classes: expected 1 to " + std::to_string(kMaxTileClasses) +
                        " tile classes of positive (rows, kv_tile, c_fixed, c_tile), ascending by "
                        "rows, got [" +
                        got + "]; take them from the engine's table");
}

void bind_config(py::module_& m) {
  py::class_<host::PlanConfig>(m, "PlanConfig")
      .def(py::init([](int32_t num_qo_heads, int32_t num_kv_heads, int32_t num_ctas, Band band,
                       int32_t invariant_chunk, std::vector<TileClass> classes,
                       PlanCapacity capacity) {
             require_classes(classes);
             return host::PlanConfig{num_qo_heads,    num_kv_heads,       num_ctas, band,
                                     invariant_chunk, std::move(classes), capacity};
           }),
           py::arg("num_qo_heads"), py::arg("num_kv_heads"), py::arg("num_ctas"), py::arg("band"),
           py::arg("invariant_chunk"), py::arg("classes"), py::arg("capacity"))
      .def_readonly("classes", &host::PlanConfig::classes)
      .def_property_readonly("forest_bytes",
                             [](const host::PlanConfig& config) {
                               return make_forest_layout(config.capacity).total_bytes;
                             })
      .def("layout", [](const host::PlanConfig& config) { return host::make_layout(config); });
}

// kv_len_bytes: 4 or 8. nodes: (table_row, kv_begin, kv_end, member_ptr, members, own_begin)
// addresses, own_begin 0 = prefix forest.
int32_t make_plan(const host::PlanConfig& config, const PlanLayout& layout, int32_t num_requests,
                  int64_t qo_indptr, int64_t kv_len, int32_t kv_len_bytes, int32_t num_nodes,
                  const std::array<int64_t, 6>& nodes, int64_t plan) {
  const host::StepLengths lengths{num_requests, pointer<const int32_t>(qo_indptr),
                                  pointer<const void>(kv_len), kv_len_bytes == 8};
  const host::Nodes node_view{num_nodes,
                              pointer<const int32_t>(nodes[0]),
                              pointer<const int32_t>(nodes[1]),
                              pointer<const int32_t>(nodes[2]),
                              pointer<const int32_t>(nodes[3]),
                              pointer<const int32_t>(nodes[4]),
                              pointer<const int32_t>(nodes[5])};
  py::gil_scoped_release release;
  return host::make_plan(config, layout, lengths, node_view, pointer<void>(plan));
}

// forest: its address, 0 = none.
int32_t make_plan_of_forest(const host::PlanConfig& config, const PlanLayout& layout,
                            int32_t num_requests, int64_t qo_indptr, int64_t kv_len,
                            int32_t kv_len_bytes, int64_t forest, int64_t plan) {
  const host::StepLengths lengths{num_requests, pointer<const int32_t>(qo_indptr),
                                  pointer<const void>(kv_len), kv_len_bytes == 8};
  py::gil_scoped_release release;
  return host::make_plan(config, layout, lengths, pointer<const void>(forest), pointer<void>(plan));
}

}  // namespace

void bind_plan(py::module_& m) {
  bind_records(m);
  bind_config(m);
  m.def("cpu_tile_classes", &host::cpu_tile_classes);
  m.def("node_fixed", &node_fixed, py::arg("rows"));
  m.def("make_plan", &make_plan, py::arg("config"), py::arg("layout"), py::arg("num_requests"),
        py::arg("qo_indptr"), py::arg("kv_len"), py::arg("kv_len_bytes"), py::arg("num_nodes"),
        py::arg("nodes"), py::arg("plan"));
  m.def("make_plan_of_forest", &make_plan_of_forest, py::arg("config"), py::arg("layout"),
        py::arg("num_requests"), py::arg("qo_indptr"), py::arg("kv_len"), py::arg("kv_len_bytes"),
        py::arg("forest"), py::arg("plan"));
}

}  // namespace fi
