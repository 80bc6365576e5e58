// Stands for libcuda.so.1 in tests: two devices, calls written down, errors on demand. Like the
// driver it refuses work whose context is not current.
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

#include "fi/attention/kernel_params.h"
#include "launch/driver.h"

namespace {

constexpr int kInvalidValue = 1, kInvalidDevice = 101, kInvalidContext = 201;
constexpr int kNoBinary = 209, kInvalidHandle = 400, kNotFound = 500;
constexpr int kMaxSharedBytes = 232448;

std::mutex lock;
std::string calls;
std::map<std::string, int> errors;
fi::KernelParams launched;
int driver_version = 13000;
thread_local std::vector<void*> contexts;

// Handles say what they are: 0x10000 + device is a context; a module and its function follow.
void* handle(long value) { return reinterpret_cast<void*>(value); }
long value(const void* handle) { return reinterpret_cast<long>(handle); }
void* current() { return contexts.empty() ? nullptr : contexts.back(); }

template <class... Arguments>
int call(const char* name, Arguments... arguments) {
  std::lock_guard<std::mutex> guard(lock);
  std::ostringstream line;
  line << std::hex << name;
  ((line << ' ' << arguments), ...);
  calls += line.str() + '\n';
  return errors[name];
}

int in_context(void* expected, int error) { return current() == expected ? error : kInvalidHandle; }

}  // namespace

extern "C" {

const char* fake_calls() { return calls.c_str(); }
void fake_forget() { calls.clear(); }
void fake_version(int version) { driver_version = version; }
void fake_fail(const char* function, int error) { errors[function] = error; }
void fake_enter(long context) { contexts.push_back(handle(context)); }
long fake_current() { return value(current()); }
const void* fake_params() { return &launched; }

int cuInit(unsigned) { return call("cuInit"); }
int cuGetErrorName(int error, const char** name) {
  if (error == 999999) return kInvalidValue;
  *name = error == kInvalidDevice ? "CUDA_ERROR_INVALID_DEVICE" : "CUDA_ERROR_OF_TEST";
  return 0;
}
int cuGetErrorString(int error, const char** text) {
  if (error == 999999) return kInvalidValue;
  *text = error == kInvalidDevice ? "invalid device ordinal" : "as the test asked";
  return 0;
}
int cuDriverGetVersion(int* version) {
  *version = driver_version;
  return errors["cuDriverGetVersion"];
}
int cuDeviceGet(int* device, int ordinal) {
  if (ordinal < 0 || ordinal > 1) return kInvalidDevice;
  *device = ordinal;
  return 0;
}
int cuDeviceGetName(char* name, int length, int) {
  std::strncpy(name, "Some GPU", length);
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
  const std::map<int, int> values{{16, 132}, {75, 9}, {76, 0}, {81, 233472}, {97, kMaxSharedBytes}};
  *value = values.at(attribute);
  return call("cuDeviceGetAttribute", attribute);
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = handle(0x10000 + device);
  return call("cuDevicePrimaryCtxRetain", device);
}
int cuDevicePrimaryCtxRelease_v2(int device) { return call("cuDevicePrimaryCtxRelease", device); }
int cuCtxGetCurrent(void** context) {
  *context = current();
  return errors["cuCtxGetCurrent"];
}
int cuCtxPushCurrent_v2(void* context) {
  contexts.push_back(context);
  return call("cuCtxPushCurrent", context);
}
int cuCtxPopCurrent_v2(void** context) {
  *context = current();
  contexts.pop_back();
  return call("cuCtxPopCurrent", *context);
}
int cuModuleLoadData(void** module, const void* image) {
  if (!current()) return kInvalidContext;
  if (std::memcmp(image,
                  "\x7f"
                  "ELF",
                  4) != 0)
    return kNoBinary;
  *module = handle(value(current()) + 0x10000);
  return call("cuModuleLoadData");
}
int cuModuleUnload(void* module) {
  return in_context(handle(value(module) - 0x10000), call("cuModuleUnload", module));
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  if (std::string(name) != "fi_attention") return kNotFound;
  *function = handle(value(module) + 0x10000);
  return call("cuModuleGetFunction", name);
}
int cuFuncGetAttribute(int* value, int attribute, void*) {
  *value = attribute == 4 ? 168 : -1;
  return call("cuFuncGetAttribute", attribute);
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  if (value > kMaxSharedBytes) return kInvalidValue;
  return in_context(handle(::value(function) - 0x20000),
                    call("cuFuncSetAttribute", attribute, value));
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* ctas, void*, int threads, size_t shared) {
  *ctas = 233472 / static_cast<int>(shared + 1024);
  return call("cuOccupancy", threads, shared);
}
int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                   void* stream, void** params, void** extra) {
  if (extra) return kInvalidValue;
  launched = *static_cast<const fi::KernelParams*>(params[0]);
  const int error = call("cuLaunchKernel", function, grid_x, grid_y, grid_z, block_x, block_y,
                         block_z, shared, stream);
  return in_context(handle(value(function) - 0x20000), error);
}
int cuLaunchKernelEx(const fi::launch::LaunchConfig* config, void* function, void** params,
                     void** extra) {
  if (extra || !params[0] || config->num_attributes != 1) return kInvalidValue;
  const auto [grid_x, grid_y, grid_z, block_x, block_y, block_z, shared, stream, attributes, _] =
      *config;
  launched = *static_cast<const fi::KernelParams*>(params[0]);
  const int error = call("cuLaunchKernelEx", function, grid_x, grid_y, grid_z, block_x, block_y,
                         block_z, shared, stream, attributes[0].id, attributes[0].allowed);
  return in_context(handle(value(function) - 0x20000), error);
}

int cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* data, const uint64_t* sizes,
                           const uint64_t* strides, const uint32_t* box, const uint32_t* steps,
                           int interleave, int swizzle, int promotion, int outside) {
  if (rank != 4 || steps[0] + steps[1] + steps[2] + steps[3] != 4) return kInvalidValue;
  *static_cast<fi::TensorMap*>(map) = {{reinterpret_cast<uint64_t>(data), sizes[0]}};
  return call("cuTensorMapEncodeTiled", type, sizes[0], sizes[1], sizes[2], sizes[3], strides[0],
              strides[1], strides[2], box[0], box[1], box[2], box[3], interleave, swizzle,
              promotion, outside);
}

}  // extern "C"
