#include "bindings/tensors.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace fi {

TensorReader::TensorReader() {
  const py::object tensor = py::module_::import("torch").attr("Tensor");
  const py::object table = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
  api_ = nullptr;
  if (!table.is_none()) {
    const void* found = PyCapsule_GetPointer(table.ptr(), "dlpack_exchange_api");
    if (!found) throw py::error_already_set();
    api_ = static_cast<const dlpack::ExchangeApi*>(found);
    while (api_ && api_->major > dlpack::kMajor) api_ = api_->previous;
  }
  if (api_ && api_->borrow_from_object) return;
  const std::string version = py::str(py::module_::import("torch").attr("__version__"));
  throw std::runtime_error("torch: expected 2.11 or newer, whose tensors C++ can read, got " +
                           version + "; pip install 'torch>=2.11'");
}

bool TensorReader::read(py::handle tensor, TensorShape& shape, void*& address) const {
  shape = {};
  address = nullptr;
  if (tensor.is_none()) return true;
  dlpack::Tensor view;
  if (api_->borrow_from_object(tensor.ptr(), &view) != 0) return false;
  shape.device = view.device;
  shape.ndim = view.ndim;
  shape.dtype = view.dtype;
  const int32_t dims = std::min(view.ndim, TensorShape::kMaxDims);
  std::copy_n(view.shape, dims, shape.shape);
  std::copy_n(view.strides, dims, shape.strides);
  address = static_cast<char*>(view.data) + view.byte_offset;
  return true;
}

}  // namespace fi
