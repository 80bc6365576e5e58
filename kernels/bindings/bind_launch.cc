// Kernels on a GPU: loading, the attention kernel's parameter block, its launch.
#include <pybind11/stl.h>

#include <array>
#include <string_view>
#include <tuple>
#include <vector>

#include "bindings/address.h"
#include "bindings/bind.h"
#include "cpu/attention.h"
#include "fi/attention/kernel_params.h"
#include "launch/kernel.h"

namespace py = pybind11;

namespace fi {
namespace {

using launch::DeviceInfo;
using launch::Kernel;

void translate_device_error(std::exception_ptr thrown) {
  try {
    std::rethrow_exception(thrown);
  } catch (const launch::DeviceError& error) {
    py::set_error(py::module_::import("fi_backend.errors").attr("DeviceError"), error.what());
  }
}

// A scale as the CPU engine's type, so that Python knows one. Reading gives a copy.
void def_scale(py::class_<KernelParams>& cls, const char* name,
               DeviceScale KernelParams::* member) {
  cls.def_property(
      name,
      [member](const KernelParams& self) {
        const DeviceScale& scale = self.*member;
        return cpu::Scale{scale.data, scale.per_head != 0};
      },
      [member](KernelParams& self, const cpu::Scale& scale) {
        self.*member = {scale.data, scale.per_head};
      });
}

using ParamTuple = std::tuple<intptr_t, std::array<int64_t, 3>, double>;

void set_variant_params(KernelParams& self, const std::vector<ParamTuple>& params) {
  if (params.size() > kMaxVariantParams) {
    throw py::value_error("params: expected at most " + std::to_string(kMaxVariantParams) +
                          " parameters of a variant, got " + std::to_string(params.size()) +
                          "; pack scalars into one tensor");
  }
  VariantParam* next = self.variant_params;
  for (const auto& [data, strides, scalar] : params) {
    *next++ = {reinterpret_cast<const void*>(data), {strides[0], strides[1], strides[2]}, scalar};
  }
}

void bind_kernel(py::module_& m) {
  py::class_<DeviceInfo>(m, "DeviceInfo")
      .def_readonly("name", &DeviceInfo::name)
      .def_readonly("major", &DeviceInfo::major)
      .def_readonly("minor", &DeviceInfo::minor)
      .def_readonly("num_sms", &DeviceInfo::num_sms)
      .def_readonly("max_shared_bytes", &DeviceInfo::max_shared_bytes)
      .def_readonly("max_shared_bytes_per_sm", &DeviceInfo::max_shared_bytes_per_sm);
  // Starting the driver and loading code take milliseconds: other threads run meanwhile.
  m.def("device_info", &launch::device_info, py::arg("device"),
        py::call_guard<py::gil_scoped_release>());
  py::class_<Kernel>(m, "Kernel")
      .def(py::init([](const py::bytes& image, const std::string& entry, int32_t device,
                       int32_t dynamic_shared_bytes) {
             const std::string_view bytes = image;
             py::gil_scoped_release release;
             return std::make_unique<Kernel>(bytes.data(), bytes.size(), entry, device,
                                             dynamic_shared_bytes);
           }),
           py::arg("image"), py::arg("entry"), py::arg("device"), py::arg("dynamic_shared_bytes"))
      .def("ctas_per_sm", &Kernel::ctas_per_sm, py::arg("threads"))
      .def_property_readonly("num_registers", &Kernel::num_registers)
      .def_property_readonly("device", &Kernel::device);
}

void bind_kernel_params(py::module_& m) {
  py::class_<KernelParams> params(m, "KernelParams");
  def_pointer(params, "q", &KernelParams::q);
  def_pointer(params, "out", &KernelParams::out);
  def_pointer(params, "lse", &KernelParams::lse);
  def_pointer(params, "sinks", &KernelParams::sinks);
  def_pointer(params, "plan", &KernelParams::plan);
  def_pointer(params, "partial_o", &KernelParams::partial_o);
  def_pointer(params, "partial_lse", &KernelParams::partial_lse);
  def_pointer(params, "arrivals", &KernelParams::arrivals);
  def_scale(params, "q_scale", &KernelParams::q_scale);
  def_scale(params, "k_scale", &KernelParams::k_scale);
  def_scale(params, "v_scale", &KernelParams::v_scale);
  params
      .def(py::init([] {
        KernelParams fresh{};
        fresh.scale = 1.0f;
        fresh.band = {-1, -1, 0};
        fresh.table.entry_stride = fresh.table.slot_divisor = 1;
        return fresh;
      }))
      .def_readwrite("q_stride_token", &KernelParams::q_stride_token)
      .def_readwrite("q_stride_head", &KernelParams::q_stride_head)
      .def_readwrite("out_stride_token", &KernelParams::out_stride_token)
      .def_readwrite("out_stride_head", &KernelParams::out_stride_head)
      .def_readwrite("kv", &KernelParams::kv)
      .def_readwrite("table", &KernelParams::table)
      .def_readwrite("page_shift", &KernelParams::page_shift)
      .def_readwrite("num_qo_heads", &KernelParams::num_qo_heads)
      .def_readwrite("num_kv_heads", &KernelParams::num_kv_heads)
      .def_readwrite("band", &KernelParams::band)
      .def_readwrite("scale", &KernelParams::scale)
      .def_readwrite("out_is_float32", &KernelParams::out_is_float32)
      .def_readwrite("is_partial", &KernelParams::is_partial)
      .def_readwrite("layout", &KernelParams::layout)
      .def("set_variant_params", &set_variant_params, py::arg("params"));
}

void launch_attention(const Kernel& kernel, const KernelParams& params, int32_t grid,
                      int32_t threads, std::uintptr_t stream) {
  kernel.launch(&params, grid, 1, threads, stream);
}

}  // namespace

void bind_launch(py::module_& m) {
  py::register_local_exception_translator(&translate_device_error);
  bind_kernel(m);
  bind_kernel_params(m);
  m.def("launch_attention", &launch_attention, py::arg("kernel"), py::arg("params"),
        py::arg("grid"), py::arg("threads"), py::arg("stream"));
}

}  // namespace fi
