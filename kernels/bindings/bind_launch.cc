// Kernels on a GPU: loading, the attention kernel's parameter block, its launch.
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "bindings/address.h"
#include "bindings/bind.h"
#include "bindings/tensors.h"
#include "cpu/attention.h"
#include "fi/attention/kernel_params.h"
#include "launch/kernel.h"
#include "launch/tensor_map.h"

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
      .def_readonly("max_shared_bytes_per_sm", &DeviceInfo::max_shared_bytes_per_sm)
      .def_readonly("copies_boxes", &DeviceInfo::copies_boxes);
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
      .def_readwrite("rotation", &KernelParams::rotation)
      .def("set_variant_params", &set_variant_params, py::arg("params"));
}

// The tensor maps of caches that differ in addresses alone: those of the layers of a class.
class CacheMaps {
 public:
  // The map of a cache that was read from a tensor of four dimensions. One without pages has none.
  TensorMap of(const void* data, const TensorShape& tensor) {
    if (std::memcmp(&tensor, &shape_, sizeof tensor) != 0 || maps_.size() == kMost) maps_.clear();
    shape_ = tensor;
    if (tensor.shape[0] == 0) return {};
    const auto found = maps_.find(data);
    if (found != maps_.end()) return found->second;
    launch::CacheTensor cache{data, {}, {}, tensor.dtype.bits / 8};
    std::copy_n(tensor.shape, 4, cache.shape);
    std::copy_n(tensor.strides, 4, cache.strides);
    return maps_[data] = launch::map_of_cache(cache);
  }

 private:
  static constexpr std::size_t kMost = 4096;  // layers; more are temporary tensors

  TensorShape shape_{};
  std::unordered_map<const void*, TensorMap> maps_;
};

// The tensors of a slot's last checked call. Layers and steps differ in addresses, seldom in more.
class CallTensors {
 public:
  // Writes a call into `params` if its tensors differ from those of the last remember() in
  // addresses alone. Returns the bits below 16 that are set in an address of q, k, v or out; -1:
  // they differ.
  int32_t take(KernelParams& params, py::handle q, py::handle k, py::handle v, py::handle out,
               py::handle lse, float scale, bool is_partial) {
    TensorShapes shapes;
    Addresses to;
    if (!read({q, k, v, out, lse}, shapes, to)) {
      PyErr_Clear();  // the checks that follow have a better sentence
      return -1;
    }
    if (std::memcmp(&shapes, &seen_, sizeof shapes) != 0) return -1;
    return write(params, to, scale, is_partial);
  }

  // Likewise for tensors that were checked, and whose strides `params` has.
  int32_t remember(KernelParams& params, py::handle q, py::handle k, py::handle v, py::handle out,
                   py::handle lse, float scale, bool is_partial) {
    Addresses to;
    if (!read({q, k, v, out, lse}, seen_, to)) throw py::error_already_set();
    return write(params, to, scale, is_partial);
  }

  void forget() { seen_ = {}; }

  bool boxes = false;  // the kernel copies boxes where addresses are aligned: maps are written too

 private:
  static constexpr int32_t kCount = 5;
  static constexpr uintptr_t kAlignment = 16;
  using TensorShapes = std::array<TensorShape, kCount>;
  using Addresses = std::array<void*, kCount>;

  bool read(const std::array<py::handle, kCount>& tensors, TensorShapes& shapes,
            Addresses& to) const {
    for (int32_t i = 0; i < kCount; ++i) {
      if (!reader_.read(tensors[i], shapes[i], to[i])) return false;
    }
    return true;
  }

  int32_t write(KernelParams& params, const Addresses& to, float scale, bool is_partial) {
    const auto [q, k, v, out, lse] = to;
    params.q = q;
    params.kv.k = k;
    params.kv.v = v;
    params.out = out;
    params.lse = static_cast<float*>(lse);
    params.scale = scale;
    params.is_partial = is_partial;
    uintptr_t bits = 0;
    for (const void* address : {q, k, v, out}) bits |= reinterpret_cast<uintptr_t>(address);
    if (boxes && bits % kAlignment == 0) {
      params.k_boxes = k_maps_.of(k, seen_[1]);
      params.v_boxes = v_maps_.of(v, seen_[2]);
    }
    return static_cast<int32_t>(bits % kAlignment);
  }

  TensorReader reader_;
  TensorShapes seen_{};
  CacheMaps k_maps_, v_maps_;
};

void bind_call_tensors(py::module_& m) {
  py::class_<CallTensors>(m, "CallTensors")
      .def(py::init<>())
      .def("take", &CallTensors::take, py::arg("params"), py::arg("q"), py::arg("k"), py::arg("v"),
           py::arg("out"), py::arg("lse"), py::arg("scale"), py::arg("is_partial"))
      .def("remember", &CallTensors::remember, py::arg("params"), py::arg("q"), py::arg("k"),
           py::arg("v"), py::arg("out"), py::arg("lse"), py::arg("scale"), py::arg("is_partial"))
      .def("forget", &CallTensors::forget)
      .def_readwrite("boxes", &CallTensors::boxes);
}

void launch_attention(const Kernel& kernel, const KernelParams& params, int32_t grid,
                      int32_t threads, std::uintptr_t stream) {
  kernel.launch(&params, grid, 1, threads, stream, launch::Overlap::kWithPrevious);
}

}  // namespace

void bind_launch(py::module_& m) {
  py::register_local_exception_translator(&translate_device_error);
  bind_kernel(m);
  bind_kernel_params(m);
  bind_call_tensors(m);
  m.def("launch_attention", &launch_attention, py::arg("kernel"), py::arg("params"),
        py::arg("grid"), py::arg("threads"), py::arg("stream"));
}

}  // namespace fi
