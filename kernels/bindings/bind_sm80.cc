// The sm80-class kernel's tile table and shared memory: what the JIT and the planner ask for.
#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "bindings/bind.h"
#include "fi/sm80/config.h"
#include "host/cost_model.h"

namespace py = pybind11;

namespace fi {

void bind_sm80(py::module_& m) {
  py::class_<host::KernelTiles>(m, "KernelTiles")
      .def_readonly("classes", &host::KernelTiles::classes)
      .def_readonly("stages", &host::KernelTiles::stages)
      .def_readonly("warps", &host::KernelTiles::warps)
      .def_readonly("ctas_per_sm", &host::KernelTiles::ctas_per_sm);
  m.def(
      "sm80_tiles",
      [](int32_t head_dim_qk, int32_t head_dim_vo, int32_t kv_bytes, int32_t group_size,
         int32_t max_q_len, int32_t max_requests, int32_t max_shared_bytes_per_sm, bool boxes) {
        return host::sm80_tiles({head_dim_qk, head_dim_vo, kv_bytes, group_size, max_q_len,
                                 max_requests, max_shared_bytes_per_sm, boxes});
      },
      py::arg("head_dim_qk"), py::arg("head_dim_vo"), py::arg("kv_bytes"), py::arg("group_size"),
      py::arg("max_q_len"), py::arg("max_requests"), py::arg("max_shared_bytes_per_sm") = 233472,
      py::arg("boxes") = false);
  m.def(
      "sm80_shared_bytes",
      [](int32_t head_dim_qk, int32_t head_dim_vo, int32_t kv_bytes,
         const std::vector<std::array<int32_t, 3>>& tiles, int32_t warps, bool boxes) {
        int32_t bytes = 0;
        for (const auto& [rows, kv_tile, stages] : tiles) {
          const auto plan =
              sm80::plan_shared(head_dim_qk, head_dim_vo, kv_bytes, rows, kv_tile, stages, warps,
                                boxes && sm80::takes_boxes(rows, kv_tile));
          bytes = std::max(bytes, plan.bytes);
        }
        return bytes;
      },
      py::arg("head_dim_qk"), py::arg("head_dim_vo"), py::arg("kv_bytes"), py::arg("tiles"),
      py::arg("warps"), py::arg("boxes") = false);
  m.def(
      "fits_boxes",
      [](int32_t head_dim_qk, int32_t head_dim_vo, int32_t kv_bytes, int32_t page_size) {
        return head_dim_qk * kv_bytes % sm80::kBoxBytes == 0 &&
               head_dim_vo * kv_bytes % sm80::kBoxBytes == 0 && page_size >= sm80::kLeastBoxTokens;
      },
      py::arg("head_dim_qk"), py::arg("head_dim_vo"), py::arg("kv_bytes"), py::arg("page_size"));
}

}  // namespace fi
