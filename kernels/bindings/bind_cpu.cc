// CPU engine bindings: typed parameter objects whose pointers are integer addresses. Who fills them
// (fi_backend/attention.py, ops.py) keeps the tensors alive.
#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/address.h"
#include "bindings/bind.h"
#include "cpu/attention.h"

namespace py = pybind11;

namespace fi {
namespace {

using cpu::AttentionParams;
using cpu::MergeParams;

// A DType member as its code (fi_backend/formats.py, DTYPE_CODES).
template <class Class, class Owner>
void def_dtype(Class& cls, const char* name, DType Owner::* member) {
  using Self = typename Class::type;
  cls.def_property(
      name, [member](const Self& self) { return static_cast<int32_t>(self.*member); },
      [name = std::string(name), member](Self& self, int32_t code) {
        if (code < 0 || code > static_cast<int32_t>(DType::kFloat8E4M3)) {
          throw py::value_error(name + ": expected a dtype code in 0..3, got " +
                                std::to_string(code) + "; use formats.DTYPE_CODES");
        }
        self.*member = static_cast<DType>(code);
      });
}

// logits, mask, mask_kind and output as function addresses (0: none); params as (data, strides,
// scalar).
using ParamTuple = std::tuple<intptr_t, std::array<int64_t, 3>, double>;
using StageTuple = std::tuple<intptr_t, intptr_t, intptr_t, intptr_t, std::vector<ParamTuple>>;

// AttentionParams and what its variant points at.
struct OwnedAttentionParams : AttentionParams {
  OwnedAttentionParams() : AttentionParams{} {
    scale = 1.0f;
    band = {-1, -1, 0};
    table.entry_stride = table.slot_divisor = 1;
    variant.softmax = true;
  }
  OwnedAttentionParams(const OwnedAttentionParams&) = delete;

  void set_variant(const std::vector<StageTuple>& new_stages, bool softmax, intptr_t sinks) {
    stages_.clear();
    params_.clear();
    for (const auto& [logits, mask, mask_kind, output, params] : new_stages) {
      params_.emplace_back();
      for (const auto& [data, strides, scalar] : params) {
        params_.back().push_back(
            {reinterpret_cast<const void*>(data), {strides[0], strides[1], strides[2]}, scalar});
      }
      stages_.push_back({reinterpret_cast<LogitsFn>(logits), reinterpret_cast<MaskFn>(mask),
                         reinterpret_cast<MaskKindFn>(mask_kind),
                         reinterpret_cast<OutputFn>(output), params_.back().data()});
    }
    variant = {stages_.data(), static_cast<int32_t>(stages_.size()), softmax,
               reinterpret_cast<const float*>(sinks)};
  }

  void set_classes(const std::vector<TileClass>& new_classes) {
    if (new_classes.empty() || new_classes.size() > kMaxTileClasses) {
      throw py::value_error("classes: expected 1 to " + std::to_string(kMaxTileClasses) +
                            " tile classes, got " + std::to_string(new_classes.size()) +
                            "; pass the classes that the plan was made with");
    }
    for (int32_t i = 0; i < kMaxTileClasses; ++i) {
      classes[i] = i < static_cast<int32_t>(new_classes.size()) ? new_classes[i] : TileClass{};
    }
  }

 private:
  std::vector<VariantStage> stages_;
  std::vector<std::vector<VariantParam>> params_;  // a stage's own vector never moves its data
};

void bind_views(py::module_& m) {
  py::class_<KvStrides>(m, "KvStrides")
      .def(py::init<int64_t, int64_t, int64_t>(), py::arg("page"), py::arg("token"),
           py::arg("head"))
      .def_readwrite("page", &KvStrides::page)
      .def_readwrite("token", &KvStrides::token)
      .def_readwrite("head", &KvStrides::head);
  py::class_<KvCacheView> kv(m, "KvCacheView");
  def_pointer(kv, "k", &KvCacheView::k);
  def_pointer(kv, "v", &KvCacheView::v);
  def_dtype(kv, "dtype", &KvCacheView::dtype);
  kv.def(py::init([] { return KvCacheView{}; }))
      .def_readwrite("k_stride", &KvCacheView::k_stride)
      .def_readwrite("v_stride", &KvCacheView::v_stride)
      .def_readwrite("num_pages", &KvCacheView::num_pages)
      .def_readwrite("page_size", &KvCacheView::page_size);
  py::class_<PageTableView> table(m, "PageTableView");
  def_pointer(table, "entries", &PageTableView::entries);
  def_pointer(table, "indptr", &PageTableView::indptr);
  def_pointer(table, "row_index", &PageTableView::row_index);
  def_pointer(table, "page_map", &PageTableView::page_map);
  table
      .def(py::init([] {
        PageTableView view{};
        view.entry_stride = view.slot_divisor = 1;
        return view;
      }))
      .def_readwrite("row_stride", &PageTableView::row_stride)
      .def_readwrite("entry_stride", &PageTableView::entry_stride)
      .def_readwrite("page_size", &PageTableView::page_size)
      .def_readwrite("slot_divisor", &PageTableView::slot_divisor)
      .def_readwrite("row_index_is_int64", &PageTableView::row_index_is_int64)
      .def_readwrite("num_rows", &PageTableView::num_rows);
  py::class_<cpu::HeadShape>(m, "HeadShape")
      .def(py::init<int32_t, int32_t, int32_t, int32_t>(), py::arg("num_qo_heads"),
           py::arg("num_kv_heads"), py::arg("head_dim_qk"), py::arg("head_dim_vo"))
      .def_readonly("num_qo_heads", &cpu::HeadShape::num_qo_heads)
      .def_readonly("num_kv_heads", &cpu::HeadShape::num_kv_heads)
      .def_readonly("head_dim_qk", &cpu::HeadShape::head_dim_qk)
      .def_readonly("head_dim_vo", &cpu::HeadShape::head_dim_vo);
  py::class_<cpu::Scale> scale(m, "Scale");
  scale
      .def(py::init([](intptr_t data, bool per_head) {
             return cpu::Scale{reinterpret_cast<const float*>(data), per_head};
           }),
           py::arg("data") = 0, py::arg("per_head") = false)
      .def_readwrite("per_head", &cpu::Scale::per_head);
  def_pointer(scale, "data", &cpu::Scale::data);
}

void bind_rotation(py::module_& m) {
  py::class_<Rotation> rotation(m, "Rotation");
  def_pointer(rotation, "cos_sin", &Rotation::cos_sin);
  rotation.def_readwrite("stride", &Rotation::stride)
      .def_readwrite("rotary_dim", &Rotation::rotary_dim)
      .def_readwrite("interleaved", &Rotation::interleaved)
      .def_readwrite("window", &Rotation::window)
      .def_readwrite("sink_prefix", &Rotation::sink_prefix)
      .def(py::init([](intptr_t cos_sin, int64_t stride, int32_t rotary_dim, int32_t interleaved,
                       int32_t window, int32_t sink_prefix) {
             return Rotation{reinterpret_cast<const float*>(cos_sin),
                             stride,
                             rotary_dim,
                             interleaved,
                             window,
                             sink_prefix};
           }),
           py::arg("cos_sin"), py::arg("stride"), py::arg("rotary_dim"), py::arg("interleaved"),
           py::arg("window"), py::arg("sink_prefix"));
}

void bind_attention_params(py::module_& m) {
  py::class_<OwnedAttentionParams> params(m, "AttentionParams");
  def_pointer(params, "q", &AttentionParams::q);
  def_pointer(params, "out", &AttentionParams::out);
  def_pointer(params, "lse", &AttentionParams::lse);
  def_pointer(params, "plan", &AttentionParams::plan);
  def_pointer(params, "partial_o", &AttentionParams::partial_o);
  def_pointer(params, "partial_lse", &AttentionParams::partial_lse);
  def_pointer(params, "arrivals", &AttentionParams::arrivals);
  def_dtype(params, "q_dtype", &AttentionParams::q_dtype);
  def_dtype(params, "out_dtype", &AttentionParams::out_dtype);
  params.def(py::init<>())
      .def_readwrite("q_stride_token", &AttentionParams::q_stride_token)
      .def_readwrite("q_stride_head", &AttentionParams::q_stride_head)
      .def_readwrite("out_stride_token", &AttentionParams::out_stride_token)
      .def_readwrite("out_stride_head", &AttentionParams::out_stride_head)
      .def_readwrite("kv", &AttentionParams::kv)
      .def_readwrite("table", &AttentionParams::table)
      .def_readwrite("heads", &AttentionParams::heads)
      .def_readwrite("band", &AttentionParams::band)
      .def_readwrite("scale", &AttentionParams::scale)
      .def_readwrite("q_scale", &AttentionParams::q_scale)
      .def_readwrite("k_scale", &AttentionParams::k_scale)
      .def_readwrite("v_scale", &AttentionParams::v_scale)
      .def_readwrite("partial", &AttentionParams::partial)
      .def_readwrite("rotation", &AttentionParams::rotation)
      .def_readwrite("layout", &AttentionParams::layout)
      .def("set_classes", &OwnedAttentionParams::set_classes, py::arg("classes"))
      .def("set_variant", &OwnedAttentionParams::set_variant, py::arg("stages"), py::arg("softmax"),
           py::arg("sinks"));
}

void bind_merge_params(py::module_& m) {
  py::class_<MergeParams> merge(m, "MergeParams");
  def_pointer(merge, "o", &MergeParams::o);
  def_pointer(merge, "lse", &MergeParams::lse);
  def_pointer(merge, "out_o", &MergeParams::out_o);
  def_pointer(merge, "out_lse", &MergeParams::out_lse);
  merge.def(py::init([] { return MergeParams{}; }))
      .def_readwrite("num_states", &MergeParams::num_states)
      .def_readwrite("rows", &MergeParams::rows)
      .def_readwrite("dim", &MergeParams::dim)
      .def_readwrite("softmax", &MergeParams::softmax);
}

void require_threads(int num_threads) {
  if (num_threads >= 1) return;
  throw py::value_error("num_threads: expected at least 1, got " + std::to_string(num_threads) +
                        "; pass torch.get_num_threads()");
}

// The sizes that the arithmetic relies on; everything else is checked where tensors are known.
void require_heads(const cpu::HeadShape& heads) {
  if (heads.num_kv_heads < 1 || heads.num_qo_heads < 1 ||
      heads.num_qo_heads % heads.num_kv_heads != 0) {
    throw py::value_error("heads: expected num_kv_heads to divide num_qo_heads, got " +
                          std::to_string(heads.num_kv_heads) + " and " +
                          std::to_string(heads.num_qo_heads) + "; set AttentionParams.heads");
  }
  for (int32_t dim : {heads.head_dim_qk, heads.head_dim_vo}) {
    if (dim >= 8 && dim % 8 == 0) continue;
    throw py::value_error("heads: expected head dimensions that are positive multiples of 8, got " +
                          std::to_string(dim) + "; pad the head dimension");
  }
}

void run_attention(const OwnedAttentionParams& params, int num_threads) {
  require_threads(num_threads);
  require_heads(params.heads);
  if (!params.plan || params.classes[0].rows < 1) {
    throw py::value_error(
        "params: expected a plan and its tile classes, got none; "
        "set plan and call set_classes");
  }
  py::gil_scoped_release release;
  cpu::run_attention(params, num_threads);
}

void merge_states(const MergeParams& params, int num_threads) {
  require_threads(num_threads);
  py::gil_scoped_release release;
  cpu::merge_states(params, num_threads);
}

}  // namespace

void bind_cpu(py::module_& m) {
  bind_views(m);
  bind_rotation(m);
  bind_attention_params(m);
  bind_merge_params(m);
  m.def("run_attention", &run_attention, py::arg("params"), py::arg("num_threads"));
  m.def("merge_states", &merge_states, py::arg("params"), py::arg("num_threads"));
  m.def("active_isa", &cpu::active_isa);
  m.def(
      "force_isa", [](const std::string& isa) { return cpu::force_isa(isa.c_str()); },
      py::arg("isa"));
}

}  // namespace fi
