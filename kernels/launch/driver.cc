#include "launch/driver.h"

#include <dlfcn.h>

#include "launch/kernel.h"

namespace fi::launch {
namespace {

constexpr const char* kLibrary = "libcuda.so.1";

template <class Function>
void find(void* library, const char* library_name, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  if (function) return;
  throw DeviceError("driver: expected " + std::string(name) + " in " + library_name +
                    ", got no such function; install a newer NVIDIA driver");
}

Driver start_driver() {
  const Driver driver = open_driver(kLibrary);
  if (const Result error = driver.init(0)) {
    // A forked child inherits the library but not its state.
    fail(driver, error, "driver", "an NVIDIA driver that starts in this process",
         "run fi-backend doctor; start worker processes by spawn, not fork");
  }
  return driver;
}

}  // namespace

const Driver& driver() {
  // Trivially destructible: launches and unloads at interpreter exit still find the functions.
  static const Driver started = start_driver();
  return started;
}

Driver open_driver(const char* library_name) {
  void* library = dlopen(library_name, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char* reason = dlerror();
    throw DeviceError("driver: expected " + std::string(library_name) + ", got " +
                      (reason ? reason : "no reason") +
                      "; install the NVIDIA driver, or use CPU tensors");
  }
  const auto find_in = [=](const char* name, auto*& function) {
    find(library, library_name, name, function);
  };
  Driver d;
  find_in("cuInit", d.init);
  find_in("cuGetErrorName", d.get_error_name);
  find_in("cuGetErrorString", d.get_error_string);
  find_in("cuDriverGetVersion", d.driver_get_version);
  find_in("cuDeviceGet", d.device_get);
  find_in("cuDeviceGetName", d.device_get_name);
  find_in("cuDeviceGetAttribute", d.device_get_attribute);
  find_in("cuDevicePrimaryCtxRetain", d.primary_context_retain);
  find_in("cuDevicePrimaryCtxRelease_v2", d.primary_context_release);
  find_in("cuCtxGetCurrent", d.context_get_current);
  find_in("cuCtxPushCurrent_v2", d.context_push_current);
  find_in("cuCtxPopCurrent_v2", d.context_pop_current);
  find_in("cuModuleLoadData", d.module_load_data);
  find_in("cuModuleUnload", d.module_unload);
  find_in("cuModuleGetFunction", d.module_get_function);
  find_in("cuFuncGetAttribute", d.function_get_attribute);
  find_in("cuFuncSetAttribute", d.function_set_attribute);
  find_in("cuOccupancyMaxActiveBlocksPerMultiprocessor", d.occupancy);
  find_in("cuLaunchKernel", d.launch_kernel);
  find_in("cuLaunchKernelEx", d.launch_kernel_ex);
  d.tensor_map_encode =
      reinterpret_cast<decltype(d.tensor_map_encode)>(dlsym(library, "cuTensorMapEncodeTiled"));
  return d;
}

void fail(const Driver& driver, Result error, const std::string& what, const std::string& rule,
          const std::string& hint) {
  const char* name = nullptr;
  const char* text = nullptr;
  driver.get_error_name(error, &name);
  driver.get_error_string(error, &text);
  // An error that is newer than the driver's own table has neither.
  const std::string got = name ? name : "CUDA error " + std::to_string(error);
  throw DeviceError(what + ": expected " + rule + ", got " + got + (text ? ": " : "") +
                    (text ? text : "") + "; " + hint);
}

}  // namespace fi::launch
