// Kernels of cubins through the CUDA driver API, which is opened at run time: importing the core
// needs no GPU and no driver. Every function throws DeviceError with the driver's own words.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

namespace fi::launch {

struct DeviceError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct DeviceInfo {
  std::string name;
  int32_t major, minor;             // compute capability
  int32_t num_sms;                  //
  int32_t max_shared_bytes;         // of one CTA, opt-in
  int32_t max_shared_bytes_per_sm;  //
  bool copies_boxes;                // of tensor maps (tensor_map.h)
};

DeviceInfo device_info(int32_t device);

enum class Overlap {
  kNone,
  // The grid may start when the CTAs of the grid before it have come to ptx::start_next_grid() or
  // ended; it has to call ptx::wait_for_previous_grid() itself. It waits for that grid, not for
  // those before it: they have ended, unless a kernel of others let it start and did not wait.
  // Where device or driver do not know that, as kNone.
  kWithPrevious,
};

// One entry point of a cubin, loaded into a device's primary context (the one torch uses).
// Immutable after construction; launch() may be called from several threads. Its machine code goes
// with it: it outlives its launches and the graphs that captured them.
class Kernel {
 public:
  // `dynamic_shared_bytes` is set as the kernel's limit once, here, so that launches can be
  // captured. Not to be called while a stream is captured.
  Kernel(const void* image, std::size_t image_bytes, const std::string& entry, int32_t device,
         int32_t dynamic_shared_bytes);

  // `params` points at the kernel's only argument. `stream` is a CUstream (0: legacy default).
  void launch(const void* params, int32_t grid_x, int32_t grid_y, int32_t threads,
              std::uintptr_t stream, Overlap overlap = Overlap::kNone) const;

  int32_t ctas_per_sm(int32_t threads) const;  // resident at once, with the dynamic shared memory
  int32_t num_registers() const;               // per thread
  int32_t device() const { return device_; }

 private:
  std::shared_ptr<void> context_;  // released after the module is unloaded
  std::shared_ptr<void> module_;
  void* function_ = nullptr;
  std::string entry_;
  int32_t device_;
  int32_t shared_bytes_;
  bool can_overlap_;
};

}  // namespace fi::launch
