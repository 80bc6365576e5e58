#include "launch/kernel.h"

#include "launch/driver.h"

namespace fi::launch {
namespace {

// Shared memory that any kernel may use is 48 KB; more has to be asked for. What a kernel declares
// statically counts too: 16 KB are left for it. Source: CUDA C++ Programming Guide, compute
// capabilities 7.x and later.
constexpr int32_t kSharedBytesWithoutOptIn = 32 << 10;
// Grids overlap from sm_90 on. Older drivers refuse to capture such launches in a graph.
constexpr int32_t kOverlapMajor = 9, kOverlapDriver = 12030;
// Kernels for sm_120 that copy boxes need a stack.
constexpr int32_t kFirstBoxesMajor = 9, kLastBoxesMajor = 10;
constexpr int32_t kAllOfSharedMemory = 100;  // CU_SHAREDMEM_CARVEOUT_MAX_SHARED

// Makes a context current for a scope. Torch's threads have it current already: then this is one
// call of the driver, which reads a thread-local.
class ContextScope {
 public:
  ContextScope(const Driver& driver, Handle context) : driver_(driver) {
    Handle current = nullptr;
    check(driver.context_get_current(&current));
    if (current == context) return;
    check(driver.context_push_current(context));
    is_pushed_ = true;
  }
  ~ContextScope() {
    Handle popped = nullptr;
    if (is_pushed_) driver_.context_pop_current(&popped);
  }
  ContextScope(const ContextScope&) = delete;
  ContextScope& operator=(const ContextScope&) = delete;

 private:
  void check(Result error) const {
    if (!error) return;
    fail(driver_, error, "context", "the device's primary context to become current",
         "do not reset the device while kernels are in use");
  }

  const Driver& driver_;
  bool is_pushed_ = false;
};

Device find_device(const Driver& driver, int32_t index) {
  Device device = 0;
  if (const Result error = driver.device_get(&device, index)) {
    fail(driver, error, "device", "device " + std::to_string(index) + " to exist",
         "choose one that CUDA_VISIBLE_DEVICES leaves visible");
  }
  return device;
}

std::shared_ptr<void> retain_primary_context(const Driver& driver, int32_t index) {
  const Device device = find_device(driver, index);
  Handle context = nullptr;
  if (const Result error = driver.primary_context_retain(&context, device)) {
    fail(driver, error, "device", "room for a context on device " + std::to_string(index),
         "free memory on the device, or choose another one");
  }
  return {context, [&driver, device](void*) { driver.primary_context_release(device); }};
}

// To be called with the context current.
std::shared_ptr<void> load_module(const Driver& driver, const std::shared_ptr<void>& context,
                                  const void* image, const std::string& entry) {
  Handle module = nullptr;
  if (const Result error = driver.module_load_data(&module, image)) {
    fail(driver, error, entry, "a cubin that this device loads",
         "compile it for the device's own architecture");
  }
  return {module, [&driver, context = context.get()](void* module) {
            // At interpreter exit the driver may have ended already, and every module with it.
            try {
              const ContextScope scope(driver, context);
              driver.module_unload(module);
            } catch (const DeviceError&) {
            }
          }};
}

void set_attribute(const Driver& driver, Handle function, FunctionAttribute attribute,
                   int32_t value, const std::string& entry, const std::string& rule) {
  const Result error = driver.function_set_attribute(function, attribute, value);
  if (error) fail(driver, error, entry, rule, "use smaller tiles or fewer stages");
}

bool can_overlap(const Driver& driver, int32_t index) {
  int major = 0, version = 0;
  const Device device = find_device(driver, index);
  const bool is_known =
      !driver.driver_get_version(&version) &&
      !driver.device_get_attribute(&major, DeviceAttribute::kComputeCapabilityMajor, device);
  return is_known && major >= kOverlapMajor && version >= kOverlapDriver;
}

}  // namespace

DeviceInfo device_info(int32_t index) {
  const Driver& d = driver();
  const Device device = find_device(d, index);
  const auto check = [&](Result error) {
    if (error) {
      fail(d, error, "device", "a description of device " + std::to_string(index),
           "run fi-backend doctor");
    }
  };
  const auto attribute = [&](DeviceAttribute which) {
    int value = 0;
    check(d.device_get_attribute(&value, which, device));
    return value;
  };
  char name[256] = {};
  check(d.device_get_name(name, sizeof(name), device));
  const int32_t major = attribute(DeviceAttribute::kComputeCapabilityMajor);
  return {name,
          major,
          attribute(DeviceAttribute::kComputeCapabilityMinor),
          attribute(DeviceAttribute::kMultiprocessorCount),
          attribute(DeviceAttribute::kMaxSharedMemoryPerBlockOptin),
          attribute(DeviceAttribute::kMaxSharedMemoryPerMultiprocessor),
          major >= kFirstBoxesMajor && major <= kLastBoxesMajor && d.tensor_map_encode != nullptr};
}

Kernel::Kernel(const void* image, std::size_t image_bytes, const std::string& entry, int32_t device,
               int32_t dynamic_shared_bytes)
    : entry_(entry), device_(device), shared_bytes_(dynamic_shared_bytes) {
  // The driver reads as far as the image's own headers say; the ELF header is the least of them.
  constexpr std::size_t kElfHeaderBytes = 64;
  if (image_bytes < kElfHeaderBytes) {
    throw DeviceError(entry + ": expected a cubin, got " + std::to_string(image_bytes) +
                      " bytes; clear the kernel cache and compile again");
  }
  const Driver& d = driver();
  can_overlap_ = can_overlap(d, device);
  context_ = retain_primary_context(d, device);
  const ContextScope scope(d, context_.get());
  module_ = load_module(d, context_, image, entry);
  if (const Result error = d.module_get_function(&function_, module_.get(), entry.c_str())) {
    fail(d, error, entry, "an entry point of that name in the cubin",
         "declare the kernel extern \"C\"");
  }
  const std::string rule =
      std::to_string(dynamic_shared_bytes) + " bytes of shared memory for a CTA";
  if (dynamic_shared_bytes > kSharedBytesWithoutOptIn) {
    set_attribute(d, function_, FunctionAttribute::kMaxDynamicSharedSizeBytes, dynamic_shared_bytes,
                  entry, rule);
  }
  // Else the driver may size it for one CTA where several would fit. Kernels without shared memory
  // keep the split they find, which costs no reconfiguration.
  if (dynamic_shared_bytes > 0) {
    set_attribute(d, function_, FunctionAttribute::kPreferredSharedMemoryCarveout,
                  kAllOfSharedMemory, entry, rule);
  }
}

void Kernel::launch(const void* params, int32_t grid_x, int32_t grid_y, int32_t threads,
                    std::uintptr_t stream, Overlap overlap) const {
  const Driver& d = driver();
  const ContextScope scope(d, context_.get());
  void* arguments[] = {const_cast<void*>(params)};
  Result error = 0;
  if (overlap == Overlap::kWithPrevious && can_overlap_) {
    LaunchAttribute serialization{};
    serialization.id = LaunchAttribute::kProgrammaticStreamSerialization;
    serialization.allowed = 1;
    const LaunchConfig config{static_cast<unsigned>(grid_x),
                              static_cast<unsigned>(grid_y),
                              1,
                              static_cast<unsigned>(threads),
                              1,
                              1,
                              static_cast<unsigned>(shared_bytes_),
                              reinterpret_cast<Handle>(stream),
                              &serialization,
                              1};
    error = d.launch_kernel_ex(&config, function_, arguments, nullptr);
  } else {
    error = d.launch_kernel(function_, grid_x, grid_y, 1, threads, 1, 1, shared_bytes_,
                            reinterpret_cast<Handle>(stream), arguments, nullptr);
  }
  if (!error) return;
  fail(d, error, entry_,
       "a launch of " + std::to_string(grid_x) + " x " + std::to_string(grid_y) + " CTAs of " +
           std::to_string(threads) + " threads",
       "an error of an earlier kernel shows here too: CUDA_LAUNCH_BLOCKING=1 names the culprit");
}

int32_t Kernel::ctas_per_sm(int32_t threads) const {
  const Driver& d = driver();
  const ContextScope scope(d, context_.get());
  int ctas = 0;
  if (const Result error = d.occupancy(&ctas, function_, threads, shared_bytes_)) {
    fail(d, error, entry_,
         "an SM to be asked about CTAs of " + std::to_string(threads) + " threads",
         "pass the threads that the kernel was compiled for");
  }
  return ctas;
}

int32_t Kernel::num_registers() const {
  const Driver& d = driver();
  const ContextScope scope(d, context_.get());
  int registers = 0;
  const Result error = d.function_get_attribute(&registers, FunctionAttribute::kNumRegs, function_);
  if (error) fail(d, error, entry_, "a number of registers", "run fi-backend doctor");
  return registers;
}

}  // namespace fi::launch
