// Torch's tensors read in C++ without linking to torch: what one costs in Python, five cost here.
//
// Source: DLPack's exchange API (dlpack.h 1.3), a table of functions that torch >= 2.11 offers as
// torch.Tensor.__dlpack_c_exchange_api__. Declared here is the part that is called.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace fi {

namespace dlpack {

struct Device {
  int32_t type;
  int32_t index;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;
  void* allocate;
  void* owned_from_object;
  void* owned_to_object;
  int (*borrow_from_object)(void* object, Tensor* out);  // -1: a Python error is set
  void* current_stream;
};

inline constexpr uint32_t kMajor = 1;

}  // namespace dlpack

// All of a tensor but its address, sizes up to the fourth dimension; bytes are compared.
struct TensorShape {
  static constexpr int32_t kMaxDims = 4;

  dlpack::Device device;
  int32_t ndim;
  dlpack::DataType dtype;
  int64_t shape[kMaxDims];
  int64_t strides[kMaxDims];
};

class TensorReader {
 public:
  // Throws RuntimeError where torch has no table of this version.
  TensorReader();

  // None reads as nullptr and zeros. False for tensors without memory that C++ can address, such as
  // those on meta: torch's Python error is set.
  bool read(pybind11::handle tensor, TensorShape& shape, void*& address) const;

 private:
  const dlpack::ExchangeApi* api_;
};

}  // namespace fi
