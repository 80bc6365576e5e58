"""The forest kernel's body on the CPU, on the fibers of plan_fibers.py."""

from __future__ import annotations

import ctypes
import shlex
import subprocess
from pathlib import Path

import numpy as np
import plan_fibers
from forest_steps import Step
from numpy.typing import NDArray
from plan_fibers import empty_plan

from fi_backend import _core
from fi_backend.class_plans import plan_capacity
from fi_backend.jit.headers import INCLUDE_ROOT
from fi_backend.jit.host_compiler import find_compiler
from fi_backend.launch import table_view

SOURCE = (
    plan_fibers.SOURCE
    + r"""
#include "fi/common/forest.h"

class ForestFiberBlock : public FiberBlock {
 public:
  using FiberBlock::FiberBlock;

  struct Smallest {
    static constexpr bool kIsWords = false;
    int32_t value = 0x7fffffff;
    void operator+=(const Smallest& other) { value = std::min(value, other.value); }
  };

  int32_t min(int32_t value) {
    Smallest all;
    scan(Smallest{value}, &all);
    return all.value;
  }
  int32_t first_equal(uint64_t number) {
    int32_t first = -1;
    for (int32_t t = num_lanes() - 1; t >= 0; --t) {
      const auto low = static_cast<uint32_t>(shuffle(static_cast<int32_t>(number), t));
      const auto high = static_cast<uint32_t>(shuffle(static_cast<int32_t>(number >> 32), t));
      if ((static_cast<uint64_t>(high) << 32 | low) == number) first = t;
    }
    return first;
  }
  void sync_warp() { shuffle(0, 0); }
  void give(uint64_t* to, const fi::forest::Branch& branch) { *to = fi::forest::word_of(branch); }
  fi::forest::Branch take(uint64_t* from) {
    const uint64_t word = *from;
    *from = 0;
    return fi::forest::branch_of(word);
  }
};

template <class Body>
bool run_cta(int num_threads, bool is_descending, const Body& body) {
  CtaMemory memory;
  for (auto& values : memory.values) values.resize(num_threads);
  for (auto& bits : memory.bits) bits.resize(num_threads);
  for (auto& lanes : memory.lanes) lanes.resize(num_threads);
  Fibers fibers{num_threads, std::min(num_threads, FiberBlock::kWarp), 0, is_descending};
  fibers.body = [&](int thread) {
    ForestFiberBlock block(fibers, memory, thread, 0, 1);
    body(block);
  };
  fibers.run();
  return !fibers.has_failed;
}

// False if a barrier was not reached by all threads.
extern "C" bool run_forest(const fi::ForestKernelParams* p, int num_threads, bool is_descending) {
  for (int r = 0; r < p->num_requests; ++r) {
    const bool met = run_cta(num_threads, is_descending, [&](ForestFiberBlock& block) {
      const fi::forest::Branch branch = fi::forest::Search(*p, block, r).find();
      if (block.thread() == 0) block.give(p->branches + r, branch);
    });
    if (!met) return false;
  }
  std::vector<int64_t> garbage(p->scratch_layout.total_bytes / 8 + 1, 0x7bcdefabcdefabcd);
  const auto scratch =
      fi::forest::scratch_at(p->scratch_layout, reinterpret_cast<char*>(garbage.data()));
  return run_cta(num_threads, is_descending, [&](ForestFiberBlock& block) {
    fi::forest::Builder(*p, scratch, block).run();
  });
}
"""
)


def build(folder: Path, warp: int = 4) -> ctypes.CDLL:
    """Compile the device code for the CPU, with warps of as many fibers."""
    (folder / "forest.cc").write_text(SOURCE)
    flags = "-std=c++20 -O1 -g -Wall -Wextra -Werror -Wno-missing-field-initializers -fPIC -shared"
    command = [*find_compiler().command, *shlex.split(flags), f"-I{INCLUDE_ROOT}"]
    command.append(f"-DFIBERS_OF_A_WARP={warp}")
    subprocess.run([*command, "forest.cc", "-o", "forest.so"], check=True, cwd=folder)
    library = ctypes.CDLL(str(folder / "forest.so"))
    library.run_forest.restype = ctypes.c_bool
    return library


def find_on_fibers(
    library: ctypes.CDLL, step: Step, num_threads: int, is_descending: bool
) -> NDArray[np.uint8]:
    """All bytes of the device's forest, written over FILL."""
    params = _core.ForestKernelParams(plan_capacity(step.capacity))
    batch = step.batch
    branches = np.zeros(max(1, step.capacity.max_requests), np.uint64)
    forest = empty_plan(_core.forest_layout(plan_capacity(step.capacity)).total_bytes)
    params.num_requests = batch.num_requests
    params.qo_indptr = batch.qo_indptr.data_ptr()
    params.kv_len = batch.kv_len.data_ptr()
    params.kv_len_is_int64 = batch.kv_len.element_size() == 8
    params.set_table(table_view(batch))
    params.branches = branches.ctypes.data
    params.forest = forest.ctypes.data
    assert library.run_forest(bytes(params), num_threads, is_descending), "a barrier was missed"
    assert not branches.any(), "what was handed over is left at zero"
    return forest
