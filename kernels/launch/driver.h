// The part of the CUDA driver API that launches need, found at run time. Types are spelled out here
// so that building needs no CUDA headers. Source of names and values: cuda.h of CUDA 13.0.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace fi::launch {

using Result = int;    // CUresult; 0: success
using Device = int;    // CUdevice
using Handle = void*;  // CUcontext, CUmodule, CUfunction or CUstream

enum class DeviceAttribute : int {  // CUdevice_attribute
  kMultiprocessorCount = 16,
  kComputeCapabilityMajor = 75,
  kComputeCapabilityMinor = 76,
  kMaxSharedMemoryPerMultiprocessor = 81,
  kMaxSharedMemoryPerBlockOptin = 97,
};

enum class FunctionAttribute : int {  // CUfunction_attribute
  kNumRegs = 4,
  kMaxDynamicSharedSizeBytes = 8,
  kPreferredSharedMemoryCarveout = 9,  // percent of what L1 and shared memory have together
};

// A launch's attribute (CUlaunchAttribute) and its setting.
struct LaunchAttribute {
  static constexpr int kProgrammaticStreamSerialization = 6;

  int id;
  char pad[4];
  union {
    char bytes[64];
    int allowed;
  };
};

struct LaunchConfig {  // CUlaunchConfig
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z;
  unsigned dynamic_shared_bytes;
  Handle stream;
  LaunchAttribute* attributes;
  unsigned num_attributes;
};

// Every function is valid once open_driver() returned, but for tensor_map_encode.
struct Driver {
  Result (*init)(unsigned flags);
  Result (*get_error_name)(Result error, const char** name);
  Result (*get_error_string)(Result error, const char** text);
  Result (*driver_get_version)(int* version);  // 1000 major + 10 minor
  Result (*device_get)(Device* device, int ordinal);
  Result (*device_get_name)(char* name, int length, Device device);
  Result (*device_get_attribute)(int* value, DeviceAttribute attribute, Device device);
  Result (*primary_context_retain)(Handle* context, Device device);
  Result (*primary_context_release)(Device device);
  Result (*context_get_current)(Handle* context);
  Result (*context_push_current)(Handle context);
  Result (*context_pop_current)(Handle* context);
  Result (*module_load_data)(Handle* module, const void* image);
  Result (*module_unload)(Handle module);
  Result (*module_get_function)(Handle* function, Handle module, const char* name);
  Result (*function_get_attribute)(int* value, FunctionAttribute attribute, Handle function);
  Result (*function_set_attribute)(Handle function, FunctionAttribute attribute, int value);
  Result (*occupancy)(int* ctas, Handle function, int threads, std::size_t dynamic_shared_bytes);
  Result (*launch_kernel)(Handle function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                          unsigned block_x, unsigned block_y, unsigned block_z,
                          unsigned dynamic_shared_bytes, Handle stream, void** params,
                          void** extra);
  Result (*launch_kernel_ex)(const LaunchConfig* config, Handle function, void** params,
                             void** extra);
  // Null before CUDA 12. All choices are enumerations of cuda.h.
  Result (*tensor_map_encode)(void* map, int type, unsigned rank, void* data,
                              const std::uint64_t* sizes, const std::uint64_t* strides,
                              const std::uint32_t* box, const std::uint32_t* steps, int interleave,
                              int swizzle, int promotion, int outside);
};

// The driver of this machine, opened and initialised by the first call that succeeds. Any thread.
const Driver& driver();

// Opens a driver library for good and finds every function in it; initialises nothing.
Driver open_driver(const char* library);

// Throws DeviceError: `<what>: expected <rule>, got <the driver's name and words>; <hint>`.
[[noreturn]] void fail(const Driver& driver, Result error, const std::string& what,
                       const std::string& rule, const std::string& hint);

}  // namespace fi::launch
