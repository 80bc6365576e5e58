// Which instruction set runs: the best that the machine has, or the one a test asked for.
#include "cpu/isa.h"

#include <atomic>
#include <cstring>

#include "cpu/attention.h"

namespace fi::cpu {
namespace {

const IsaKernels* best_kernels() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return &kIsaV4;
  if (__builtin_cpu_supports("x86-64-v3")) return &kIsaV3;
  return &kIsaV2;
}

std::atomic<const IsaKernels*> active{nullptr};

}  // namespace

const IsaKernels& active_kernels() {
  const IsaKernels* kernels = active.load(std::memory_order_relaxed);
  if (!kernels) {
    kernels = best_kernels();
    active.store(kernels, std::memory_order_relaxed);
  }
  return *kernels;
}

const char* active_isa() { return active_kernels().name; }

bool force_isa(const char* isa) {
  const IsaKernels* best = best_kernels();
  if (std::strcmp(isa, "auto") == 0) {
    active.store(best, std::memory_order_relaxed);
    return true;
  }
  for (const IsaKernels* kernels : {&kIsaV2, &kIsaV3, &kIsaV4}) {
    if (std::strcmp(isa, kernels->name) == 0) {
      active.store(kernels, std::memory_order_relaxed);
      return true;
    }
    if (kernels == best) return false;  // ascending: the machine lacks what follows
  }
  return false;
}

}  // namespace fi::cpu
