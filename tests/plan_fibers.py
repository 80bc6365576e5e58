"""The planner kernel's body on the CPU: its threads are fibers, its barriers switch between them.

Fibers run one after another from barrier to barrier, in ascending or descending order of thread: a
missing barrier shows as a wrong plan in one of the two. A barrier that only some threads reach is
an error.
"""

from __future__ import annotations

import ctypes
import shlex
import subprocess
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from plan_batches import PlanCase

from fi_backend import _core
from fi_backend.jit.headers import INCLUDE_ROOT
from fi_backend.jit.host_compiler import find_compiler

FILL = 0xAB

SOURCE = r"""
#include <ucontext.h>

#include <functional>
#include <vector>

#include "fi/common/planner.h"

namespace {

constexpr std::size_t kStackBytes = 64 << 10;

struct Fibers {
  int count, current = 0;
  bool is_descending, has_failed = false;
  std::function<void(int)> body;
  std::vector<ucontext_t> contexts;
  std::vector<char> stacks, finished;
  ucontext_t scheduler;

  static Fibers* self;
  static void enter() {
    self->body(self->current);
    self->finished[self->current] = true;
  }

  void yield() { swapcontext(&contexts[current], &scheduler); }

  void run() {
    self = this;
    contexts.resize(count);
    finished.assign(count, false);
    stacks.resize(count * kStackBytes);
    for (int t = 0; t < count; ++t) {
      getcontext(&contexts[t]);
      contexts[t].uc_stack.ss_sp = &stacks[t * kStackBytes];
      contexts[t].uc_stack.ss_size = kStackBytes;
      contexts[t].uc_link = &scheduler;
      makecontext(&contexts[t], &enter, 0);
    }
    for (int num_finished = 0; num_finished < count && !has_failed;) {
      num_finished = 0;
      for (int i = 0; i < count; ++i) {
        current = is_descending ? count - 1 - i : i;
        swapcontext(&scheduler, &contexts[current]);
        num_finished += finished[current];
      }
      has_failed = num_finished != 0 && num_finished != count;
    }
  }
};
Fibers* Fibers::self;

struct CtaMemory {
  std::vector<int64_t> values[2];
  int32_t raised = 0;
};

class FiberBlock {
 public:
  static constexpr int32_t kWarp = 4;

  FiberBlock(Fibers& fibers, CtaMemory& memory, int32_t thread, int32_t cta, int32_t num_ctas)
      : fibers_(fibers), memory_(memory), thread_(thread), cta_(cta), num_ctas_(num_ctas) {}

  int32_t thread() const { return thread_; }
  int32_t num_threads() const { return fibers_.count; }
  int32_t cta() const { return cta_; }
  int32_t num_ctas() const { return num_ctas_; }
  void sync() const { fibers_.yield(); }
  void raise(int32_t bits) const { memory_.raised |= bits; }
  int32_t raised() const { return memory_.raised; }

  bool any(bool value) {
    int64_t total;
    scan_sum(static_cast<int64_t>(value), &total);
    return total > 0;
  }

  template <class T>
  T scan_sum(T value, T* total) {
    return scan(value, total, [](T a, T b) { return a + b; });
  }

  int32_t scan_max(int32_t value, int32_t* total) {
    return scan(value, total, [](int32_t a, int32_t b) { return a > b ? a : b; });
  }

 private:
  template <class T, class Op>
  T scan(T value, T* total, Op op) {
    auto& values = memory_.values[turn_];
    turn_ ^= 1;
    values[thread_] = value;
    sync();
    T before = 0, all = 0;
    for (int32_t t = 0; t < num_threads(); ++t) {
      if (t == thread_) before = all;
      all = op(all, static_cast<T>(values[t]));
    }
    *total = all;
    return before;
  }

  Fibers& fibers_;
  CtaMemory& memory_;
  int32_t thread_, cta_, num_ctas_, turn_ = 0;
};

}  // namespace

// False if a barrier was not reached by all threads.
extern "C" bool run_planner(const fi::PlanKernelParams* params, int num_ctas, int num_threads,
                            bool is_descending) {
  const int64_t bytes = fi::planner::scratch_bytes(*params);
  for (int cta = 0; cta < num_ctas; ++cta) {
    std::vector<int64_t> garbage(bytes / 8, 0x7bcdefabcdefabcd);
    CtaMemory memory;
    for (auto& values : memory.values) values.resize(num_threads);
    Fibers fibers{num_threads, 0, is_descending};
    fibers.body = [&](int thread) {
      FiberBlock block(fibers, memory, thread, cta, num_ctas);
      fi::planner::Scratch scratch;
      fi::planner::place_scratch(*params, reinterpret_cast<char*>(garbage.data()), &scratch);
      if (params->tiling.chunk.value > 0) {
        fi::planner::StepPlanner<FiberBlock, true>(*params, scratch, block).run();
      } else {
        fi::planner::StepPlanner<FiberBlock, false>(*params, scratch, block).run();
      }
    };
    fibers.run();
    if (fibers.has_failed) return false;
  }
  return true;
}

extern "C" int quotient_of(int64_t a, int64_t b) { return fi::quotient_of(a, b); }
extern "C" int divisor_quotient(int n, int d) { return fi::make_divisor(d).quotient(n); }
extern "C" int64_t long_quotient(int64_t n, int d, int* rest) {
  const fi::Quotient64 out = fi::divide(n, fi::make_divisor(d));
  *rest = out.remainder;
  return out.quotient;
}
"""


def build(folder: Path) -> ctypes.CDLL:
    """Compile the planner's device code for the CPU."""
    (folder / "planner.cc").write_text(SOURCE)
    flags = "-std=c++20 -O1 -g -Wall -Wextra -Werror -Wno-missing-field-initializers -fPIC -shared"
    command = [*find_compiler().command, *shlex.split(flags), f"-I{INCLUDE_ROOT}"]
    subprocess.run([*command, "planner.cc", "-o", "planner.so"], check=True, cwd=folder)
    library = ctypes.CDLL(str(folder / "planner.so"))
    library.run_planner.restype = ctypes.c_bool
    library.quotient_of.argtypes = [ctypes.c_int64, ctypes.c_int64]
    library.long_quotient.argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.c_void_p]
    library.long_quotient.restype = ctypes.c_int64
    return library


def plan_on_fibers(
    library: ctypes.CDLL,
    case: PlanCase,
    num_ctas: int,
    num_threads: int,
    is_descending: bool = False,
) -> tuple[NDArray[np.uint8], int]:
    """All bytes of the device's plan, written over FILL, and the status word."""
    config = case.config()
    layout = config.layout()
    plan = empty_plan(layout.total_bytes)
    status = np.zeros(1, np.int32)
    params = _core.PlanKernelParams(config, layout)
    params.num_requests = case.num_requests
    params.qo_indptr = case.qo_indptr.ctypes.data
    params.kv_len = case.kv_len.ctypes.data
    params.kv_len_is_int64 = case.kv_len.itemsize == 8
    params.plan = plan.ctypes.data
    params.status = status.ctypes.data
    run_params(library, params, num_ctas, num_threads, is_descending)
    return plan, int(status[0])


def empty_plan(num_bytes: int) -> NDArray[np.uint8]:
    """Memory full of FILL, aligned as plans are."""
    plan = np.full(num_bytes + 64, FILL, np.uint8)
    start = -plan.ctypes.data % 64
    return plan[start : start + num_bytes]


def run_params(
    library: ctypes.CDLL,
    params: _core.PlanKernelParams,
    num_ctas: int,
    num_threads: int,
    is_descending: bool = False,
) -> None:
    """Run what a launch with these parameters would run."""
    met = library.run_planner(bytes(params), num_ctas, num_threads, is_descending)
    assert met, "a barrier was reached by some threads only"
