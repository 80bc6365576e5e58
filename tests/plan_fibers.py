"""The planner kernel's body on the CPU: its threads are fibers, its barriers switch between them.

Fibers run one after another from barrier to barrier, in ascending or descending order of thread: a
missing barrier shows as a wrong plan in one of the two. A barrier that only some threads reach is
an error.
"""

from __future__ import annotations

import ctypes
import shlex
import struct
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

#include <algorithm>
#include <any>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <utility>
#include <vector>

#include "fi/common/planner.h"

#ifndef FIBERS_OF_A_WARP
#define FIBERS_OF_A_WARP 4  // of small steps, too, several
#endif

namespace {

constexpr std::size_t kStackBytes = 64 << 10;

enum State : char { kRunning, kAtWarpBarrier, kAtBarrier, kFinished };

struct Fibers {
  int count, warp, current = 0;
  bool is_descending, has_failed = false;
  std::function<void(int)> body;
  std::vector<ucontext_t> contexts;
  std::vector<char> stacks;
  std::vector<State> states;
  ucontext_t scheduler;

  static Fibers* self;
  static void enter() {
    self->body(self->current);
    self->states[self->current] = kFinished;
  }

  void wait(State state) {
    states[current] = state;
    swapcontext(&contexts[current], &scheduler);
  }

  // Lets fibers [first, last) go on if all of them wait there.
  bool release(int first, int last, State state) {
    for (int t = first; t < last; ++t) {
      if (states[t] != state) return false;
    }
    for (int t = first; t < last; ++t) states[t] = kRunning;
    return true;
  }

  void run() {
    self = this;
    contexts.resize(count);
    states.assign(count, kRunning);
    stacks.resize(count * kStackBytes);
    for (int t = 0; t < count; ++t) {
      getcontext(&contexts[t]);
      contexts[t].uc_stack.ss_sp = &stacks[t * kStackBytes];
      contexts[t].uc_stack.ss_size = kStackBytes;
      contexts[t].uc_link = &scheduler;
      makecontext(&contexts[t], &enter, 0);
    }
    while (true) {
      for (int i = 0; i < count; ++i) {
        current = is_descending ? count - 1 - i : i;
        if (states[current] == kRunning) swapcontext(&scheduler, &contexts[current]);
      }
      bool goes_on = false;
      for (int t = 0; t < count; t += warp) {
        goes_on |= release(t, std::min(t + warp, count), kAtWarpBarrier);
      }
      if (goes_on || release(0, count, kAtBarrier)) continue;
      has_failed = !release(0, count, kFinished);
      return;
    }
  }
};
Fibers* Fibers::self;

struct CtaMemory {
  std::vector<std::any> values[2];
  std::vector<int32_t> bits[2], lanes[2], marks, tile_costs;
  char* scratch;
  fi::planner::ClassRules classes[fi::kMaxTileClasses];
};

class FiberBlock {
 public:
  static constexpr int32_t kWarp = FIBERS_OF_A_WARP;

  FiberBlock(Fibers& fibers, CtaMemory& memory, int32_t thread, int32_t cta, int32_t num_ctas)
      : fibers_(fibers), memory_(memory), thread_(thread), cta_(cta), num_ctas_(num_ctas) {}

  int32_t thread() const { return thread_; }
  int32_t num_threads() const { return fibers_.count; }
  int32_t num_lanes() const { return std::min(kWarp, fibers_.count); }
  int32_t lane() const { return thread_ % num_lanes(); }
  int32_t warp() const { return thread_ / num_lanes(); }
  int32_t cta() const { return cta_; }
  int32_t num_ctas() const { return num_ctas_; }
  int32_t times_ctas(int32_t n) const { return n * num_ctas_; }
  int32_t over_ctas(int32_t n) const { return n / num_ctas_; }
  void sync() const { fibers_.wait(kAtBarrier); }
  char* scratch() const { return memory_.scratch; }
  const fi::planner::ClassRules* classes() const { return memory_.classes; }
  int32_t* marks() const { return memory_.marks.data(); }
  int32_t* tile_costs() const { return memory_.tile_costs.data() + warp() * num_tile_costs(); }
  int32_t num_tile_costs() const { return 4 * num_lanes(); }
  void add(int32_t* to, int32_t value) const { *to += value; }
  void copy_8(void* to, const void* from) {
    std::memcpy(to, &kPending, 8);
    copies_.push_back({to, from});
  }
  void wait_for_forest() {}
  void end_copies() {
    for (const auto& [to, from] : copies_) std::memcpy(to, from, 8);
    copies_.clear();
  }

  template <int32_t kParamBytes>
  void prepare(const fi::PlanKernelParams& p) const {
    memory_.marks[thread_] = -1;
    for (int32_t c = thread_; c < p.tiling.num_classes; c += num_threads()) {
      memory_.classes[c] = fi::planner::class_rules(p, c);
    }
    sync();
  }

  uint32_t ballot(bool is_set) {
    const int32_t* lanes = gather(is_set);
    uint32_t result = 0;
    for (int32_t t = 0; t < num_lanes(); ++t) result |= static_cast<uint32_t>(lanes[t]) << t;
    return result;
  }

  int32_t shuffle(int32_t value, int32_t from) { return gather(value)[from]; }

  uint32_t warp_sum(uint32_t value) {
    const int32_t* lanes = gather(static_cast<int32_t>(value));
    return std::accumulate(lanes, lanes + num_lanes(), 0u);
  }

  uint32_t warp_scan(uint32_t value) {
    const int32_t* lanes = gather(static_cast<int32_t>(value));
    return std::accumulate(lanes, lanes + lane() + 1, 0u);
  }

  int32_t last_before(bool is_marked, int32_t value) {
    const int32_t* lanes = gather(is_marked ? value : kUnmarked);
    for (int32_t t = lane() - 1; t >= 0; --t) {
      if (lanes[t] != kUnmarked) return lanes[t];
    }
    return 0x7bcdef;
  }

  template <class Sums>
  Sums scan(const Sums& value, Sums* total, int32_t* bits = nullptr, int32_t num_words = 99) {
    require_zeros(value, num_words);
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
    if constexpr (Sums::kIsWords) spoil(&before, num_words);
    return before;
  }

 private:
  static constexpr int32_t kUnmarked = -0x7bcdef;

  template <class Sums>
  static constexpr int32_t num_words_of() {
    return Sums::kIsWords ? sizeof(Sums) / sizeof(uint32_t) : 0;
  }

  // What the caller says of its words.
  template <class Sums>
  void require_zeros(const Sums& value, int32_t num_words) {
    const auto* words = reinterpret_cast<const char*>(&value);
    for (int32_t w = num_words; w < num_words_of<Sums>(); ++w) {
      uint32_t word;
      std::memcpy(&word, words + w * sizeof(word), sizeof(word));
      if (word != 0) std::abort();
    }
  }

  // And what it may not use.
  template <class Sums>
  static void spoil(Sums* sums, int32_t num_words) {
    for (int32_t w = num_words; w < num_words_of<Sums>(); ++w) {
      const uint32_t garbage = 0x7bcdef;
      std::memcpy(reinterpret_cast<char*>(sums) + w * sizeof(garbage), &garbage, sizeof(garbage));
    }
  }

  // The values of all lanes, which call it together.
  const int32_t* gather(int32_t value) {
    auto& lanes = memory_.lanes[lanes_turn_];
    lanes_turn_ ^= 1;
    lanes[thread_] = value;
    fibers_.wait(kAtWarpBarrier);
    return &lanes[warp() * num_lanes()];
  }

  static constexpr int64_t kPending = 0x7bcdef7bcdef;
  std::vector<std::pair<void*, const void*>> copies_;

  Fibers& fibers_;
  CtaMemory& memory_;
  int32_t thread_, cta_, num_ctas_, turn_ = 0, lanes_turn_ = 0;
};

}  // namespace

using fi::planner::Mode;

template <Mode kMode>
void plan(const fi::PlanKernelParams& params, FiberBlock& block) {
  using Cost = typename fi::planner::CostType<kMode>::Type;
  auto at = fi::planner::scratch_at<Cost>(params, block.scratch());
  fi::planner::StepPlanner<FiberBlock, kMode>(params, at, block).run();
}

template <int32_t kPerThread, int32_t kClasses>
auto find_plan(const Mode& mode) {
#if HAS_NODES
  if (!mode.has_nodes) std::abort();
  if (mode.is_narrow) return &plan<Mode{kPerThread, kClasses, false, true, true, true}>;
  return &plan<Mode{kPerThread, kClasses, false, true, false, true}>;
#else
  if (mode.has_nodes) std::abort();
  if (mode.is_invariant) return &plan<Mode{kPerThread, kClasses, true, false, false}>;
  if (mode.from_start && mode.is_narrow) {
    return &plan<Mode{kPerThread, kClasses, false, true, true}>;
  }
  if (mode.from_start) return &plan<Mode{kPerThread, kClasses, false, true, false}>;
  if (mode.is_narrow) return &plan<Mode{kPerThread, kClasses, false, false, true}>;
  return &plan<Mode{kPerThread, kClasses, false, false, false}>;
#endif
}

template <int32_t kPerThread>
auto find_plan(const Mode& mode) {
  if (mode.num_classes == 1) return find_plan<kPerThread, 1>(mode);
  if (mode.num_classes == 2) return find_plan<kPerThread, 2>(mode);
  return find_plan<kPerThread, 3>(mode);
}

constexpr int kGuard = 16;  // words past the scratch

// False if a barrier was not reached by all threads.
extern "C" bool run_planner(const fi::PlanKernelParams* params, int num_ctas, int num_threads,
                            bool is_descending, const Mode* mode) {
  const int64_t bytes = params->scratch_layout.total_bytes;
  const auto run = mode->per_thread == 1 ? find_plan<1>(*mode) : find_plan<4>(*mode);
  for (int cta = 0; cta < num_ctas; ++cta) {
    constexpr int64_t kGarbage = 0x7bcdefabcdefabcd;
    std::vector<int64_t> garbage(bytes / 8 + kGuard, kGarbage);
    CtaMemory memory;
    memory.scratch = reinterpret_cast<char*>(garbage.data());
    for (auto& values : memory.values) values.resize(num_threads);
    for (auto& bits : memory.bits) bits.resize(num_threads);
    for (auto& lanes : memory.lanes) lanes.resize(num_threads);
    memory.marks.assign(num_threads, 0x7bcdef);
    memory.tile_costs.assign(4 * num_threads, 0x7bcdef);
    Fibers fibers{num_threads, std::min(num_threads, FiberBlock::kWarp), 0, is_descending};
    fibers.body = [&](int thread) {
      FiberBlock block(fibers, memory, thread, cta, num_ctas);
      run(*params, block);
    };
    fibers.run();
    const auto is_spoilt = [](int64_t word) { return word != kGarbage; };
    if (std::any_of(garbage.end() - kGuard, garbage.end(), is_spoilt)) std::abort();
    if (fibers.has_failed) return false;
  }
  return true;
}

extern "C" int quotient_of(int64_t a, int64_t b) { return fi::quotient_of(a, b); }
extern "C" int small_quotient(unsigned a, int factor, int rest, int b, unsigned* left) {
  const fi::Quotient32 out = fi::small_quotient(a, factor, rest, b);
  *left = out.remainder;
  return out.quotient;
}
extern "C" int divisor_quotient(int n, int d) { return fi::make_divisor(d).quotient(n); }
extern "C" int64_t long_quotient(int64_t n, int d, int* rest) {
  const fi::Quotient64 out = fi::make_long_divisor(d).divide(n);
  *rest = out.remainder;
  return out.quotient;
}
"""


def build(folder: Path, *, has_nodes: bool = False) -> ctypes.CDLL:
    """Compile the planner's device code for the CPU, for prefix forests or without nodes."""
    (folder / "planner.cc").write_text(SOURCE)
    flags = "-std=c++20 -O1 -g -Wall -Wextra -Werror -Wno-missing-field-initializers -fPIC -shared"
    command = [*find_compiler().command, *shlex.split(flags), f"-I{INCLUDE_ROOT}"]
    command.append(f"-DHAS_NODES={int(has_nodes)}")
    subprocess.run([*command, "planner.cc", "-o", "planner.so"], check=True, cwd=folder)
    library = ctypes.CDLL(str(folder / "planner.so"))
    library.run_planner.restype = ctypes.c_bool
    library.quotient_of.argtypes = [ctypes.c_int64, ctypes.c_int64]
    library.small_quotient.argtypes = [ctypes.c_uint, *[ctypes.c_int] * 3, ctypes.c_void_p]
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
    params.forest = 0 if case.forest is None else case.forest.ctypes.data
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
    flags = (params.is_invariant, params.from_start, params.is_narrow, params.has_nodes)
    mode = struct.pack("ii????", launch.per_thread, params.num_classes, *flags)
    met = library.run_planner(
        bytes(params), launch.num_ctas, launch.num_threads, launch.is_descending, mode
    )
    assert met, "a barrier was reached by some threads only"
