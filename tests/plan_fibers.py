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
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from plan_batches import PlanCase

from fi_backend import _core
from fi_backend.jit.headers import INCLUDE_ROOT
from fi_backend.jit.host_compiler import find_compiler

FILL = 0xAB


class Launch(NamedTuple):
    """CTAs, threads of each, requests of each thread, and in which order its fibers run."""

    num_ctas: int
    num_threads: int
    per_thread: int = 1
    is_descending: bool = False


SOURCE = r"""
#include <ucontext.h>

#include <any>
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
  std::vector<std::any> values[2];
  std::vector<int32_t> bits[2], marks;
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
  int32_t* marks() const { return memory_.marks.data(); }
  void await_parameters(const fi::PlanKernelParams&) const {}

  // All threads of the CTA call it, as all of a warp must.
  int32_t last_before(bool is_marked, int32_t value) {
    auto& values = memory_.bits[turn_];
    turn_ ^= 1;
    values[thread_] = is_marked ? value : kUnmarked;
    sync();
    for (int32_t t = thread_ - 1; t >= thread_ / kWarp * kWarp; --t) {
      if (values[t] != kUnmarked) return values[t];
    }
    return 0x7bcdef;
  }

  template <class Sums>
  Sums scan(const Sums& value, Sums* total, int32_t* bits = nullptr) {
    auto& values = memory_.values[turn_];
    auto& found = memory_.bits[turn_];
    turn_ ^= 1;
    values[thread_] = value;
    found[thread_] = bits ? *bits : 0;
    sync();
    Sums before, all;
    for (int32_t t = 0; t < num_threads(); ++t) {
      if (t == thread_) before = all;
      all += std::any_cast<const Sums&>(values[t]);
      if (bits) *bits |= found[t];
    }
    *total = all;
    return before;
  }

 private:
  static constexpr int32_t kUnmarked = -0x7bcdef;

  Fibers& fibers_;
  CtaMemory& memory_;
  int32_t thread_, cta_, num_ctas_, turn_ = 0;
};

}  // namespace

template <int kPerThread>
void plan(const fi::PlanKernelParams& params, const fi::planner::Scratch& scratch,
          FiberBlock& block) {
  using fi::planner::StepPlanner;
  if (params.tiling.chunk.value > 0) {
    StepPlanner<FiberBlock, true, kPerThread>(params, scratch, block).run();
  } else {
    StepPlanner<FiberBlock, false, kPerThread>(params, scratch, block).run();
  }
}

// False if a barrier was not reached by all threads.
extern "C" bool run_planner(const fi::PlanKernelParams* params, int num_ctas, int num_threads,
                            int per_thread, bool is_descending) {
  const int64_t bytes = params->scratch_layout.total_bytes;
  for (int cta = 0; cta < num_ctas; ++cta) {
    std::vector<int64_t> garbage(bytes / 8, 0x7bcdefabcdefabcd);
    CtaMemory memory;
    for (auto& values : memory.values) values.resize(num_threads);
    for (auto& bits : memory.bits) bits.resize(num_threads);
    memory.marks.assign(num_threads, 0x7bcdef);
    Fibers fibers{num_threads, 0, is_descending};
    fibers.body = [&](int thread) {
      FiberBlock block(fibers, memory, thread, cta, num_ctas);
      const fi::planner::Scratch scratch = fi::planner::scratch_at(
          params->scratch_layout, reinterpret_cast<char*>(garbage.data()));
      if (per_thread == 1) {
        plan<1>(*params, scratch, block);
      } else {
        plan<4>(*params, scratch, block);
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
  const fi::Quotient64 out = fi::make_long_divisor(d).divide(n);
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
    launch: Launch,
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
    run_params(library, params, launch)
    return plan, int(status[0])


def empty_plan(num_bytes: int) -> NDArray[np.uint8]:
    """Memory full of FILL, aligned as plans are."""
    plan = np.full(num_bytes + 64, FILL, np.uint8)
    start = -plan.ctypes.data % 64
    return plan[start : start + num_bytes]


def run_params(
    library: ctypes.CDLL,
    params: _core.PlanKernelParams,
    launch: Launch,
) -> None:
    """Run what a launch with these parameters would run."""
    met = library.run_planner(bytes(params), *launch)
    assert met, "a barrier was reached by some threads only"
