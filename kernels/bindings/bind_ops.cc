// append_kv on both engines, whose arguments are one struct, and merge_states on the GPU. Whoever
// passes addresses keeps the tensors alive.
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "bindings/bind.h"
#include "cpu/attention.h"
#include "fi/common/append_params.h"
#include "fi/common/merge_params.h"
#include "launch/kernel.h"

namespace py = pybind11;

namespace fi {
namespace {

using launch::Kernel;

// Grids up to this size are one wave of the large GPUs (132 to 148 SMs, 8 CTAs each): every row
// gets threads of its own, which is fastest. Beyond, a thread moves several rows with all its loads
// in flight.
constexpr int32_t kAppendWaveCtas = 1024;

DType dtype_of(int32_t code) {
  if (code >= 0 && code <= static_cast<int32_t>(DType::kFloat8E4M3)) return DType{code};
  throw py::value_error("dtype: expected a dtype code in 0..3, got " + std::to_string(code) +
                        "; use formats.DTYPE_CODES");
}

void bind_append_params(py::module_& m) {
  py::class_<TokenStrides>(m, "TokenStrides")
      .def(py::init<int64_t, int64_t>(), py::arg("token"), py::arg("head"));
  py::class_<RopeParams>(m, "RopeParams")
      .def(py::init([](int32_t rotary_dim, bool is_interleaved, int32_t cos_sin_dtype,
                       int64_t cos_sin_stride, int64_t num_positions, bool positions_are_int64) {
             return RopeParams{nullptr,       cos_sin_stride,          nullptr,
                               num_positions, dtype_of(cos_sin_dtype), positions_are_int64,
                               rotary_dim,    is_interleaved};
           }),
           py::arg("rotary_dim"), py::arg("is_interleaved"), py::arg("cos_sin_dtype"),
           py::arg("cos_sin_stride"), py::arg("num_positions"), py::arg("positions_are_int64"));
  py::class_<AppendParams>(m, "AppendParams")
      .def(py::init([](int32_t dtype) {
             AppendParams params{};
             params.dtype = dtype_of(dtype);
             return params;
           }),
           py::arg("dtype"))
      .def_readwrite("k_stride", &AppendParams::k_stride)
      .def_readwrite("v_stride", &AppendParams::v_stride)
      .def_readwrite("q_stride", &AppendParams::q_stride)
      .def_readwrite("q_out_stride", &AppendParams::q_out_stride)
      .def_readwrite("num_tokens", &AppendParams::num_tokens)
      .def_readwrite("num_kv_heads", &AppendParams::num_kv_heads)
      .def_readwrite("num_qo_heads", &AppendParams::num_qo_heads)
      .def_readwrite("head_dim_qk", &AppendParams::head_dim_qk)
      .def_readwrite("head_dim_vo", &AppendParams::head_dim_vo)
      .def_readwrite("kv", &AppendParams::kv)
      .def_readwrite("k_scale_per_head", &AppendParams::k_scale_per_head)
      .def_readwrite("v_scale_per_head", &AppendParams::v_scale_per_head)
      .def_readwrite("rope", &AppendParams::rope);
}

// k, v, cache_k, cache_v, slots, k_scale, v_scale, q, q_out, positions, cos_sin; 0: none.
using AppendAddresses = std::array<intptr_t, 11>;

// The addresses of one call go into a copy: several threads may use one AppendParams.
AppendParams with_addresses(AppendParams params, const AppendAddresses& addresses) {
  const auto at = [&addresses](int i) { return reinterpret_cast<void*>(addresses[i]); };
  params.k = at(0);
  params.v = at(1);
  params.kv.k = at(2);
  params.kv.v = at(3);
  params.slots = static_cast<const int64_t*>(at(4));
  params.k_scale = static_cast<const float*>(at(5));
  params.v_scale = static_cast<const float*>(at(6));
  params.q = at(7);
  params.q_out = at(8);
  params.rope.positions = at(9);
  params.rope.cos_sin = at(10);
  return params;
}

// The sizes that the arithmetic relies on; everything else is checked where tensors are known.
void require_sizes(const AppendParams& params) {
  for (int32_t dim : {params.head_dim_qk, params.head_dim_vo}) {
    if (dim >= kChunk && dim % kChunk == 0) continue;
    throw py::value_error(
        "params: expected head dimensions that are positive multiples of 8, got " +
        std::to_string(dim) + "; pad the head dimension");
  }
  if (params.num_kv_heads < 1 || params.kv.page_size < 1) {
    throw py::value_error("params: expected heads and a page size, got " +
                          std::to_string(params.num_kv_heads) + " and " +
                          std::to_string(params.kv.page_size) + "; set AppendParams");
  }
}

void append_kv(const AppendParams& params, const AppendAddresses& addresses, int num_threads) {
  require_sizes(params);
  if (num_threads < 1) {
    throw py::value_error("num_threads: expected at least 1, got " + std::to_string(num_threads) +
                          "; pass torch.get_num_threads()");
  }
  const AppendParams call = with_addresses(params, addresses);
  py::gil_scoped_release release;
  cpu::append_kv(call, num_threads);
}

// Cuts the rows into CTAs and returns their number.
int32_t set_grid(AppendParams& p) {
  const int32_t rotary_dim = p.rope.rotary_dim;
  const int32_t qk_rows =
      rows_per_pass(units_of_row(p.head_dim_qk, rotary_dim, p.rope.is_interleaved));
  const int32_t v_rows = rows_per_pass(units_of_row(p.head_dim_vo, 0, false));
  const auto count = [&](int32_t passes) {
    p.passes = passes;
    p.k_ctas = ceil_div(p.num_tokens * p.num_kv_heads, passes * qk_rows);
    p.v_ctas = ceil_div(p.num_tokens * p.num_kv_heads, passes * v_rows);
    return p.k_ctas + p.v_ctas + ceil_div(p.num_tokens * p.num_qo_heads, passes * qk_rows);
  };
  p.kv_heads = make_divisor(p.num_kv_heads);
  p.qo_heads = make_divisor(max_i32(p.num_qo_heads, 1));
  p.page_size = make_divisor(p.kv.page_size);
  p.num_slots = static_cast<int32_t>(p.kv.num_pages * p.kv.page_size);
  const int32_t ctas = count(1);
  return ctas <= kAppendWaveCtas ? ctas : count(kMaxPasses);
}

void launch_append(const Kernel& kernel, const AppendParams& params,
                   const AppendAddresses& addresses, std::uintptr_t stream) {
  require_sizes(params);
  AppendParams call = with_addresses(params, addresses);
  const int32_t grid = set_grid(call);
  const auto overlap = launch::Overlap::kWithPrevious;
  if (grid > 0) kernel.launch(&call, grid, 1, kAppendThreads, stream, overlap);
}

// o, lse, out_o, out_lse.
using MergeAddresses = std::array<intptr_t, 4>;

void launch_merge(const Kernel& kernel, const MergeAddresses& addresses, int32_t num_states,
                  int64_t rows, int32_t dim, bool aligned, std::uintptr_t stream) {
  const auto at = [&addresses](int i) { return reinterpret_cast<float*>(addresses[i]); };
  const MergeKernelParams params{at(0), at(1), at(2), at(3), rows, num_states};
  const int64_t threads = rows * merge_lanes(dim, aligned);
  const int64_t grid = (threads + kMergeThreads - 1) / kMergeThreads;
  if (grid > 0) kernel.launch(&params, static_cast<int32_t>(grid), 1, kMergeThreads, stream);
}

}  // namespace

void bind_ops(py::module_& m) {
  bind_append_params(m);
  m.def("append_kv", &append_kv, py::arg("params"), py::arg("addresses"), py::arg("num_threads"));
  m.def("launch_append", &launch_append, py::arg("kernel"), py::arg("params"), py::arg("addresses"),
        py::arg("stream"));
  m.def("launch_merge", &launch_merge, py::arg("kernel"), py::arg("addresses"),
        py::arg("num_states"), py::arg("rows"), py::arg("dim"), py::arg("aligned"),
        py::arg("stream"));
}

}  // namespace fi
