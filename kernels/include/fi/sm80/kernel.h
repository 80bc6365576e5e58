// The sm80-class attention kernel: a persistent grid whose CTAs walk their spans of work items.
// Serves Ampere to Blackwell; the correct baseline that every other kernel is measured against.
#pragma once

#include "fi/ptx/grid.h"
#include "fi/sm80/boxes.h"
#include "fi/sm80/merge.h"
#include "fi/sm80/rotation.h"

namespace fi::sm80 {

// The launch's shared memory. Alignment may cost a CTA as much: only where swizzled rows need it.
template <bool kSwizzles>
__device__ char* dynamic_shared() {
  if constexpr (kSwizzles) {
    extern __shared__ __align__(ptx::kSwizzleAtom) char smem_of_atoms[];
    return smem_of_atoms;
  } else {
    extern __shared__ __align__(16) char smem[];
    return smem;
  }
}

// Where tiles lie for products by warpgroups: the launch's shared memory by another name, as all
// such arrays begin at the same address. Read anew at every call, on purpose: descriptors are made
// in uniform registers, and what lives in a vector register would be moved there for each product.
extern "C" {
extern __shared__ __align__(ptx::kSwizzleAtom) char fi_smem_of_products[];
}
__device__ inline uint32_t shared_of_products() {
  uint32_t address;
  asm volatile("mov.u32 %0, fi_smem_of_products;" : "=r"(address) : "l"(fi_smem_of_products));
  __builtin_assume(address % ptx::kSwizzleAtom == 0);
  return address;
}

// What the CTA works on.
__device__ inline CurrentItem& current_item() {
  __shared__ CurrentItem current;
  return current;
}

// An item of class T, one of Classes.
template <class S, class V, class T, class Classes>
__device__ void run_item(const KernelParams& p, CurrentItem& current, char* smem) {
  constexpr SharedPlan kPlan = kShared<S, T>;
  const WorkItem& item = current.item;
  VariantRow* rows = reinterpret_cast<VariantRow*>(smem + kPlan.rows);
  const uint32_t smem_q = ptx::shared_address(smem);
  const auto stage = [&](int tile) {
    return smem_q + kPlan.stages + tile % T::kStages * kPlan.stage_bytes;
  };
  const WarpLoop<S, V, T> loop(p, current, rows);
  WarpState<S, T> state;
  if constexpr (kInBoxes<S, T>) {
    static_assert(!V::kTurns);
    using Loader = BoxLoader<S, T, Classes::template kHoldsBlock<T>>;
    const Loader loader(p, current);
    const auto& tiles = loader.tiles();
    const int num_tiles = loader.num_tiles();
    const typename Loader::Boxes first = loader.fetch_first();
#pragma unroll
    for (int t = 0; t < T::kStages - 1; ++t) loader.start(loader.prepare(t, first, stage(t)));
    typename Loader::Boxes boxes = loader.fetch(0);
    load_rows<S, V, T>(p, current, rows);
    __syncthreads();
    load_q<S, T>(p, item.num_rows, rows, smem_q);
    ptx::cp_async_commit();
    load_units<S, T, Classes>(p, item, rows, smem);
    state.clear();
    ptx::cp_async_wait<0>();
    if constexpr (kByWarpgroups<S, T>) ptx::publish_to_products();
    __syncthreads();  // queries have landed
    if (current.left > 0) Loader::template prefetch_pages<Classes>(p, current.next);
    // Kernels of more than decodes have two CTAs a multiprocessor at most where a class has many
    // rows: a tile each on its way does not keep memory busy. Two each do; the second a little
    // later, so that the first is there early.
    constexpr bool kFills = T::kStages == 2 && (!S::kDecodes || kByWarpgroups<S, T>);
    if (kFills) loader.start(loader.prepare(1, first, stage(1)));
    const auto prepare = [&](int next) {
      const auto copies = loader.prepare(next, boxes, stage(next));
      if (next % Loader::kLanes == Loader::kLanes - 1) boxes = loader.fetch(next + 1);
      return copies;
    };
    if constexpr (kByWarpgroups<S, T>) {
      // What the next copies need to know is found out beside products.
      static_assert(kFills);
      const PlainTiles plain = loop.plain_tiles(tiles);
      for (int t = 0; t < num_tiles; ++t) {
        const bool is_plain = plain.hold(t);
        const uint32_t products = shared_of_products();
        const uint32_t products_kv = products + kPlan.stages + t % T::kStages * kPlan.stage_bytes;
        loader.wait(t);
        if (!is_plain && loader.clear_outside(t, stage(t))) __syncthreads();
        typename Loader::Copies copies;
        const auto nothing = [] {};
        const auto prepares = [&] { copies = prepare(t + T::kStages); };
        loop.tile_of_warpgroups(products, products_kv, tiles, t, is_plain, state, nothing,
                                prepares);
        __syncthreads();  // every warp has left the stage, which may be refilled
        loader.start(copies);
      }
    } else {
      for (int t = 0; t < num_tiles; ++t) {
        loader.wait(t);
        if (!kFills) loader.start(prepare(t + T::kStages - 1));
        if (loader.clear_outside(t, stage(t))) __syncthreads();
        loop.tile(smem_q, stage(t), tiles.begin(t), tiles.first(t), tiles.end(t), state);
        __syncthreads();  // every warp has left the stage, which may be refilled
        if (kFills) loader.start(prepare(t + T::kStages));
      }
    }
    if (ptx::thread_index() == T::kThreads - 1) loader.end();
  } else {
    const KvLoader<S, T, Classes::template kHoldsBlock<T>> loader(p, current, smem);
    const auto& tiles = loader.tiles();
    const int num_tiles = loader.num_tiles();
    // Page ids of all stages at once, a token a thread.
    constexpr int kTokens = T::kStages * T::kKvTile;
    constexpr int kRounds = (kTokens + T::kThreads - 1) / T::kThreads;
    int32_t first_pages[kRounds];
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int token = r * T::kThreads + static_cast<int>(ptx::thread_index());
      first_pages[r] = loader.fetch(token / T::kKvTile, token % T::kKvTile);
    }
    load_rows<S, V, T>(p, current, rows);
    __syncthreads();
    load_q<S, T>(p, item.num_rows, rows, smem_q);  // while the page ids are on their way
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int token = r * T::kThreads + static_cast<int>(ptx::thread_index());
      if (kTokens % T::kThreads != 0 && token >= kTokens) break;
      loader.publish(token / T::kKvTile, token % T::kKvTile, first_pages[r]);
    }
    __syncthreads();
#pragma unroll 1
    for (int t = 0; t < T::kStages - 1; ++t) {
      loader.load(t, stage(t), ptx::thread_index());
      ptx::cp_async_commit();
    }
    load_units<S, T, Classes>(p, item, rows, smem);
    state.clear();
    PlainTiles plain = {};
    if constexpr (kByWarpgroups<S, T>) plain = loop.plain_tiles(tiles);
    for (int t = 0; t < num_tiles; ++t) {
      TileRotation<S, V, T> rotation(p, current, rows, smem_q);
      rotation.fetch(tiles, t);  // while the tile is on its way
      const uint32_t thread = ptx::thread_index();
      const uint32_t products = kByWarpgroups<S, T> ? shared_of_products() : smem_q;
      ptx::cp_async_wait<T::kStages - 2>();
      if constexpr (kByWarpgroups<S, T>) ptx::publish_to_products();
      __syncthreads();  // tile t has landed, and every warp has left the stage refilled next
      const int next = t + T::kStages - 1;
      loader.load(next, stage(next), thread);
      ptx::cp_async_commit();
      int32_t page;
      const auto fetch = [&] { page = loader.fetch(next + 1); };
      const auto publish = [&] { loader.publish(next + 1, page); };
      if constexpr (kByWarpgroups<S, T>) {
        rotation.turn(tiles, t, stage(t));
        loop.tile_of_warpgroups(products,
                                products + kPlan.stages + t % T::kStages * kPlan.stage_bytes, tiles,
                                t, plain.hold(t), state, fetch, publish);
      } else {
        fetch();
        rotation.turn(tiles, t, stage(t));
        loop.tile(smem_q, stage(t), tiles.begin(t), tiles.first(t), tiles.end(t), state);
        publish();
      }
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // queries have landed, even without a tile, and all have left their place
  }
  if constexpr (T::kWarpsN > 1) {
    // The stages become the meeting place of the warps' states.
    merge_warps<S, V, T>(p, item, rows, loop.first_row(), loop.is_idle(), smem + kPlan.stages,
                         state);
  } else {
    if (loop.is_idle()) return;
    write_rows<S, V, T>(p, item, rows, loop.first_row(), smem, state);
  }
}

// Merge units of request items whose states are written and not announced yet. They are announced
// together when the CTA has done its span: prefixes, which come first in the order of items, are
// mostly done by then, and a CTA merges its own requests at once. To merge before would make its
// other items late, and with them all who wait for their states: in kernels of boxes, which have
// memory to spare, even spans of short items have room.
constexpr int kMostPending = 5, kMostPendingInBoxes = 12;
template <int kRoom>
struct PendingUnits {
  static constexpr int kMost = kRoom;
  ArrivingUnit units[kMost];
  int count;      // here and not in a register, of which main loops have none to spare
  int most_rows;  // of those

  __device__ void clear() { count = most_rows = 0; }

  // Lists an item's unit: by one thread, before the item's work, at whose end it is complete.
  __device__ void list(const PlanView& plan, const WorkItem& item) {
    ArrivingUnit& to = units[count++];
    to.unit = item.unit;
    to.request = item.request;
    most_rows = max_int(most_rows, item.num_rows);
    ptx::cp_async_4(ptx::shared_address(&to.expected), &plan.units[item.unit].expected);
    ptx::cp_async_4(ptx::shared_address(&to.num_rows), &plan.units[item.unit].num_rows);
  }
};

// Where a CTA has one state at a time to announce, of few rows: announces an item's partial state
// to its merge unit, and merges that if no state of it is missing.
template <class S, class V, class Classes>
__device__ void arrive_and_merge_one(const KernelParams& p, const WorkItem& item, int* is_done) {
  MergeJob job;
  look_up<S, Classes>(p, item.unit, item.request, job);
  __syncthreads();  // the state is written
  if (ptx::thread_index() == 0) {
    *is_done = ptx::arrive_last(p.arrivals + item.unit, job.unit.expected);
  }
  __syncthreads();
  if (*is_done) merge_unit<S, V, Classes>(p, job);
}

// Of the threads of a warp whose units are complete, the first `most`; every CTA counts from
// another one.
template <class S>
__device__ bool is_complete_and_mine(bool is_complete, int most) {
  const uint32_t complete = __ballot_sync(0xffffffff, is_complete);
  const uint32_t first = blockIdx.x * S::kGroupSize % 32;
  const uint32_t place = (ptx::thread_index() - first) % 32;
  const uint32_t before = __funnelshift_r(complete, complete, first) & ((1u << place) - 1);
  return is_complete && __popc(before) < most;
}

// Units that a CTA merges at the end of a step without prefixes, each by as many threads.
template <class S, class Classes>
struct FewUnits {
  static constexpr int kMost = 2, kThreads = Classes::kThreads / kMost;
  static constexpr int kQuads = kFewQuads<Classes>;
  // More rows than two passes merge sooner where they are spread over all threads.
  static constexpr int kMostRows = 2 * (kThreads / kLanesOfRow<S, kQuads>);
};

// Announces the states of few units and merges those of which no state is missing, without ado:
// a unit's threads look it up themselves, into registers, so that the barrier behind which the
// states are announced does not wait for that.
template <class S, class V, class Classes, class Pending>
__device__ void arrive_and_merge_few(const KernelParams& p, const Pending& pending, int* is_done) {
  using Few = FewUnits<S, Classes>;
  const int x = static_cast<int>(ptx::thread_index());
  const int i = x / Few::kThreads, thread = x % Few::kThreads;
  const bool exists = i < pending.count;
  const ArrivingUnit& own = pending.units[i];
  MergeJob job;
  if (exists) look_up<S, Classes>(p, own.unit, own.request, job);
  __syncthreads();  // the states are written, the pending units complete
  if (exists && thread == 0) is_done[i] = ptx::arrive_last(p.arrivals + own.unit, own.expected);
  __syncthreads();
  if (!exists || !is_done[i]) return;
  const RowShare share = share_rows<S, Few::kThreads, Few::kQuads>(thread);
  for (int row = share.row; row < job.unit.num_rows; row += share.rows_at_once) {
    merge_row<S, V, Classes, true, Few::kQuads>(p, job, row, share);
  }
}

// How long a CTA that has done its span looks for units to merge, in cycles: about 30 us.
constexpr uint32_t kMostWait = 60000;

// Announces partial states to their merge units, `count` of which unit(i) tells: those of the rows
// of a node item, equal ones side by side, or of pending request items. A state has a thread: one
// after the other their atomics would cost an L2 latency each. Meanwhile other threads look up what
// a merge needs to know. Then merges units that are complete.
//
// The last CTA of a prefix completes the units of all members at once. It merges what nobody else
// claims: CTAs that have done their span look for a while whether units that they announced are
// complete, and claim some, each from another one on.
//
// kAreaAt: where shared memory is free past what unit(i) reads.
template <class S, class V, class Classes, int kAreaAt, class Unit>
__device__ void arrive_and_merge(const KernelParams& p, const Unit& unit, int count,
                                 bool is_of_node, bool is_last, bool has_nodes, char* smem) {
  static_assert(Classes::kMaxRows <= Classes::kThreads, "a thread for each row");
  const int x = static_cast<int>(ptx::thread_index());
  auto& area = *reinterpret_cast<MergeArea<Classes>*>(ptx::here(smem) + kAreaAt);
  __syncthreads();  // the states are written, the pending units complete
  // A state is announced once: that of a node item for all rows of a unit, of request items each.
  const auto begins = [&](int i) {
    return i < count && (!is_of_node || i == 0 || unit(i - 1).unit != unit(i).unit);
  };
  bool is_open = begins(x);
  const ArrivingUnit own = is_open ? unit(x) : ArrivingUnit{};
  int32_t* const counter = p.arrivals + own.unit;
  const bool waits = has_nodes && is_last;
  const uint32_t begin = ptx::cycles();
  // Units of a warp. Those of a decoded token each merge together in the time of one.
  int most = !waits ? 32 : is_of_node ? 1 : max_int(1, 16 / S::kGroupSize);
  bool takes = !is_of_node && count <= most;  // no need to claim what is complete at once
  bool is_complete = is_open && (takes ? ptx::arrive_last(counter, own.expected)
                                       : ptx::arrive(counter) == own.expected);
  const int other = (x + Classes::kThreads / 2) % Classes::kThreads;
  if (begins(other)) {
    look_up<S, Classes>(p, unit(other).unit, unit(other).request, area.jobs[other]);
  }
  while (true) {
    const bool is_mine = is_complete_and_mine<S>(is_complete, most);
    area.done.list(is_mine && (takes || ptx::claim(counter, own.expected)), own.num_rows);
    if (is_mine) is_open = is_complete = false;
    takes = false;
    __syncthreads();
    const auto all = area.done.all();
    if (all.count > 0) {
      merge_units<S, V, Classes>(p, area, all);
      most = min_int(2 * most, 32);
    }
    if (!has_nodes) return;
    if (is_open) {
      const int32_t arrived = ptx::arrivals(counter);
      is_open = arrived > 0;
      is_complete = arrived == own.expected;
    }
    const bool is_in_time = waits && ptx::cycles() - begin < kMostWait;
    if (!__syncthreads_or(is_open && (is_complete || is_in_time))) return;
  }
}

// An item's work where the kernel is compiled in one piece...
struct InPlace {
  template <class S, class V, class T, class Classes>
  __device__ static void run(const KernelParams& p, CurrentItem& current, char* smem) {
    run_item<S, V, T, Classes>(p, current, smem);
  }
};

// ...and where each class's work is compiled by itself: a comment, which names the class, gives way
// to it (jit/parts.py). The operand tells that what is written to the item is read there.
struct Apart {
  template <class S, class V, class T, class Classes>
  __device__ static void run(const KernelParams&, CurrentItem& current, char*) {
    asm volatile("// fi_part %1x%2x%3" ::"r"(ptx::shared_address(&current)), "n"(T::kRows),
                 "n"(T::kKvTile), "n"(T::kStages)
                 : "memory");
  }
};

template <class T, class...>
using FirstOf = T;

// V is the variant; Tiles are the launch's tile classes in the planner's order.
template <class Work, class S, class V, class... Tiles>
__device__ void run_items(const KernelParams& p) {
  using Classes = TileClasses<Tiles...>;
  char* const smem = dynamic_shared<((kByWarpgroups<S, Tiles> || kInBoxes<S, Tiles>) || ...)>();
  CurrentItem& current = current_item();
  using Few = FewUnits<S, Classes>;
  __shared__ int is_done[Few::kMost];
  constexpr bool kAnyInBoxes = kAnyBoxes<S, Classes>;
  __shared__ PendingUnits<kAnyInBoxes ? kMostPendingInBoxes : kMostPending> pending;
  static_assert(sizeof(current) + sizeof(is_done) + sizeof(pending) <=
                (kAnyInBoxes ? kBoxAtom - sizeof(Landings) : kStaticBytes));
  constexpr bool kArrivesOne = S::kDecodes && Classes::kMaxRows <= 16;
  constexpr int kAreaAt = most_of(kShared<S, Tiles>.stages...);
  static_assert(kArrivesOne ||
                kAreaAt + sizeof(MergeArea<Classes>) <= most_of(kShared<S, Tiles>.bytes...));
  static_assert(kStaticBytes + sizeof(Landings) <= kBoxAtom);
  if constexpr (kAnyInBoxes) {
    if (ptx::thread_index() == 0) {
      ptx::prefetch_map(p.k_boxes);
      ptx::prefetch_map(p.v_boxes);
      landings().init(Classes::kThreads / 32);
    }
  }
  ptx::wait_for_previous_grid();  // of which plan, queries and KV may be
  prefetch_item(plan_of(p).first_items + blockIdx.x, current);  // before it is known to exist
  const int first = ptx::load_word(plan_of(p).cta_ptr + blockIdx.x);
  const int end = ptx::load_word(plan_of(p).cta_ptr + blockIdx.x + 1);
  const bool has_nodes = !S::kDecodes && ptx::load_word(&plan_of(p).header->num_nodes) > 0;
  ptx::cp_async_wait_all();
  if (first == end) return;
  if (ptx::thread_index() == 0) {
    pending.clear();
    current.end = end;
    current.left = end - first;
    current.has_nodes = has_nodes;
    current.k_stride = p.kv.k_stride;
    current.v_stride = p.kv.v_stride;
    current.table = p.table;
  }
  __syncthreads();
  if constexpr (kInBoxes<S, FirstOf<Tiles...>>) {
    BoxLoader<S, FirstOf<Tiles...>, true>::template prefetch_pages<Classes>(p, current.next);
  }
  while (true) {
    advance_item<S, V::kRolls>(p, current);
    if constexpr (kAnyInBoxes) ptx::cp_async_wait_all();  // page ids
    __syncthreads();
    if (current.left > 0) prefetch_item(plan_of(p).items + (current.end - current.left), current);
    const WorkItem& item = current.item;
    // By a warp that has little to do before the first copies.
    if (!kArrivesOne && item.partial_row >= 0 && item.request >= 0 &&
        ptx::thread_index() == Classes::kThreads - 1) {
      pending.list(plan_of(p), item);
    }
    // The same of all lanes, by a way that shows it: uniform registers are kept through the work.
    const int own_class = __shfl_sync(0xffffffff, item.tile_class, 0);
    int c = 0;
    UnitPlaces places{};
    bool is_published = true;  // what threads wrote to where boxes land
    ((own_class == c++
          ? (Work::template run<S, V, Tiles, Classes>(p, current, smem),
             void(places = unit_places<S, Tiles>()), void(is_published = kInBoxes<S, Tiles>))
          : void()),
     ...);
    if (kAnyInBoxes && !is_published && ptx::thread_index() == 0) landings().are_known = false;
    const bool is_last = current.left == 0;
    // Merges are left: meanwhile the next grid comes as far as it can. Sooner is slower where there
    // are nodes, perhaps for the places that its CTAs then find
    // (docs/notes/2026-11-29-between-grids.md); steps of prompts are long, and have nothing to win.
    if (is_last && (item.request < 0 || item.num_rows <= kMostBoxRows)) ptx::start_next_grid();
    const bool is_of_node = item.partial_row >= 0 && item.request < 0;
    if constexpr (kArrivesOne) {
      if (item.partial_row >= 0) arrive_and_merge_one<S, V, Classes>(p, item, is_done);
    } else {
      const int count = is_of_node ? item.num_rows : pending.count;
      if (is_of_node || count == pending.kMost || (is_last && count > 0)) {
        if constexpr (kAnyInBoxes) {
          const bool are_few = count <= Few::kMost && pending.most_rows <= Few::kMostRows;
          if (is_last && are_few && !current.has_nodes) {
            arrive_and_merge_few<S, V, Classes>(p, pending, is_done);
            return;
          }
        }
        const auto unit = [&](int i) { return is_of_node ? places(smem, i) : pending.units[i]; };
        arrive_and_merge<S, V, Classes, kAreaAt>(p, unit, count, is_of_node, is_last,
                                                 current.has_nodes, smem);
        if (ptx::thread_index() == 0) pending.clear();  // of a node item, too: requests follow
        is_published = false;
      }
    }
    if (is_last) return;  // at once: to publish would be to wait for what was stored
    if (kAnyInBoxes && !is_published) ptx::publish_to_products();
    __syncthreads();  // shared memory belongs to the next item
  }
}

// The kernel.
template <class S, class V, class... Tiles>
__device__ void run(const KernelParams& p) {
  run_items<InPlace, S, V, Tiles...>(p);
}

// The kernel without the work of its classes...
template <class S, class V, class... Tiles>
__device__ void run_frame(const KernelParams& p) {
  run_items<Apart, S, V, Tiles...>(p);
}

// ...and the work of one, T. The operand stands for what the frame writes.
template <class S, class V, class T, class... Tiles>
__device__ void run_part(const KernelParams& p) {
  CurrentItem& current = current_item();
  asm volatile("// the current item" ::"r"(ptx::shared_address(&current)) : "memory");
  run_item<S, V, T, TileClasses<Tiles...>>(p, current,
                                           dynamic_shared<kByWarpgroups<S, T> || kInBoxes<S, T>>());
}

}  // namespace fi::sm80
