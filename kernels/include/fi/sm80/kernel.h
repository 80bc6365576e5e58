// The sm80-class attention kernel: a persistent grid whose CTAs walk their spans of work items.
// Serves Ampere to Blackwell; the correct baseline that every other kernel is measured against.
#pragma once

#include "fi/sm80/epilogue.h"

namespace fi::sm80 {

template <class S, class T>
__device__ void run_item(const KernelParams& p, const PlanView& plan, const WorkItem& item,
                         char* smem) {
  using Plan = SharedPlan<S, T>;
  RowInfo* rows = reinterpret_cast<RowInfo*>(smem + Plan::kRowInfo);
  const uint32_t smem_q = ptx::shared_address(smem + Plan::kQuery);
  const uint32_t smem_stage = ptx::shared_address(smem + Plan::kStages);
  const auto stage_k = [&](int tile) {
    return smem_stage + tile % T::kStages * (Plan::kStageK + Plan::kStageV);
  };

  load_rows<S, T>(p, item, plan.gathered, rows);
  __syncthreads();
  load_q<S, T>(p, item, rows, smem_q);

  KvLoader<S, T> loader(p, item);
  const int num_tiles = loader.num_tiles();
#pragma unroll
  for (int t = 0; t < T::kStages - 1; ++t) {
    if (t < num_tiles) {
      loader.fetch_pages(t);
      loader.load(t, stage_k(t), stage_k(t) + Plan::kStageK);
    }
    ptx::cp_async_commit();
  }
  if (T::kStages - 1 < num_tiles) loader.fetch_pages(T::kStages - 1);

  WarpLoop<S, T> loop(p, item, rows);
  loop.find_row_bounds(item);
  WarpState<S, T> state;
  state.clear();
  for (int t = 0; t < num_tiles; ++t) {
    ptx::cp_async_wait<T::kStages - 2>();
    __syncthreads();  // tile t has landed, and every warp has left the stage refilled next
    const int next = t + T::kStages - 1;
    if (next < num_tiles) {
      loader.load(next, stage_k(next), stage_k(next) + Plan::kStageK);
      if (next + 1 < num_tiles) loader.fetch_pages(next + 1);
    }
    ptx::cp_async_commit();
    loop.step(smem_q, stage_k(t), stage_k(t) + Plan::kStageK, loader.tiles().begin(t),
              loader.tiles().end(t), state);
  }
  ptx::cp_async_wait<0>();
  if constexpr (T::kWarpsN > 1) {
    __syncthreads();  // the stages become the meeting place of the warps' states
    merge_warps<S, T>(p, item, rows, smem + Plan::kStages, state);
  } else {
    write_rows<S, T>(p, item, rows, loop.first_row(), state);
  }
}

// Announces the item's partial state and merges every unit that it completes.
template <class S, class ClassRows>
__device__ void arrive_and_merge(const KernelParams& p, const PlanView& plan, ClassRows class_rows,
                                 const WorkItem& item, int* flag) {
  const auto complete = [&](int unit, int request) {
    __syncthreads();
    if (threadIdx.x == 0) *flag = arrive(p.arrivals + unit, plan.units[unit].expected);
    __syncthreads();
    if (*flag) merge_unit<S>(p, plan, class_rows, unit, request, item.kv_head);
  };
  if (item.request >= 0) {
    complete(item.unit, item.request);
    return;
  }
  int last_unit = -1;
  for (int x = 0; x < item.num_rows; ++x) {
    const int row = item.row_begin + x;
    const GatheredToken& g = plan.gathered[item.qo_begin + row / S::kGroupSize];
    const PlannedRequest& request = plan.requests[g.request];
    const int tile =
        (g.local * S::kGroupSize + row % S::kGroupSize) / class_rows(request.tile_class);
    const int unit = request.unit_base + item.kv_head * request.num_tiles + tile;
    if (unit != last_unit) complete(unit, g.request);
    last_unit = unit;
  }
}

// Tiles are the launch's tile classes in the planner's order.
template <class S, class... Tiles>
__device__ void run(const KernelParams& p) {
  extern __shared__ __align__(16) char smem[];
  __shared__ int flag;
  const PlanView plan = view_plan(p.plan, p.layout);
  // Rows of a tile class without an array, which would live in local memory.
  const auto class_rows = [](int tile_class) {
    int c = 0, rows = 0;
    ((tile_class == c++ ? rows = Tiles::kRows : 0), ...);
    return rows;
  };
  const int end = plan.cta_ptr[blockIdx.x + 1];
  for (int i = plan.cta_ptr[blockIdx.x]; i < end; ++i) {
    const WorkItem item = plan.items[i];
    int c = 0;
    ((item.tile_class == c++ ? run_item<S, Tiles>(p, plan, item, smem) : void()), ...);
    if (item.partial_row >= 0) arrive_and_merge<S>(p, plan, class_rows, item, &flag);
    __syncthreads();  // shared memory belongs to the next item
  }
}

}  // namespace fi::sm80
