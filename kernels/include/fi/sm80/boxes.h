// KV tiles as boxes of tensor maps, and the barriers that they land at.
#pragma once

#include "fi/ptx/tensor_map.h"
#include "fi/sm80/load.h"

namespace fi::sm80 {

// The barriers that boxes land at, one for each stage, for all items of a CTA. A barrier's phases
// have parities 0 1 0 1; `parities` are those of the next ones, a bit each.
struct Landings {
  static constexpr int kMost = 3;
  static constexpr int kMostPages = 128 / kLeastBoxTokens;
  uint64_t barriers[kMost];
  uint32_t parities;
  // Page ids of the boxes of an item's first tiles, one for each stage, where they are known.
  bool are_known;
  int32_t pages[kMost][kMostPages];

  // For one thread; a CTA barrier before anything lands.
  __device__ void init() {
#pragma unroll
    for (uint64_t& barrier : barriers) ptx::init_landing(ptx::shared_address(&barrier));
    parities = 0;
    are_known = false;
  }
};

__device__ inline Landings& landings() {
  __shared__ Landings landings;
  return landings;
}

// Loads KV tiles as boxes of the cache, 128 bytes of each token of a page: fetch() reads the page
// id of this thread's box, a tile ahead of load(), which starts the copy. The tensor memory
// accelerator makes the addresses; the copies of a tile are a few instructions of each warp.
// kReadsOnce: no other tile reads this KV.
template <class S, class T, bool kReadsOnce>
class BoxLoader {
  static constexpr SharedPlan kPlan = kShared<S, T>;
  static constexpr int kPartsK = S::kHeadDimQk * S::kKvBytes / kBoxBytes;
  static constexpr int kParts = kPartsK + S::kHeadDimVo * S::kKvBytes / kBoxBytes;
  static constexpr int kPartBytes = T::kKvTile * kBoxBytes;  // of all rows of a tile
  static_assert(S::kAligned && S::kPlainPages);
  static_assert(S::kHeadDimQk * S::kKvBytes % kBoxBytes == 0);
  static_assert(S::kHeadDimVo * S::kKvBytes % kBoxBytes == 0);
  static_assert(kPlan.stages % kBoxAtom == 0 && kPlan.stage_k % kBoxAtom == 0);
  static_assert(T::kKvTile / kLeastBoxTokens * kParts <= T::kThreads, "a thread for each box");
  static_assert(T::kStages <= Landings::kMost);
  static_assert(T::kKvTile / kLeastBoxTokens <= Landings::kMostPages);
  static_assert(T::kStages * Landings::kMostPages <= T::kThreads);

 public:
  __device__ BoxLoader(const KernelParams& p, const CurrentItem& current)
      : p_(p),
        current_(current),
        tiles_(current.item, log_of_box(p)),
        num_tiles_(tiles_.count()),
        parities_(landings().parities) {}

  __device__ int num_tiles() const { return num_tiles_; }
  __device__ const KvTiles<T::kKvTile, true>& tiles() const { return tiles_; }

  // Waits until a tile is there: every T::kStages-th has the same barrier.
  __device__ void wait(int tile) const {
    const uint32_t parity = (parities_ >> tile % T::kStages ^ tile / T::kStages) & 1;
    ptx::wait_landing(landing(tile), parity);
  }
  // For one thread, when all have passed the last wait(): what the next item finds.
  __device__ void end() const {
    uint32_t parities = parities_;
#pragma unroll
    for (int stage = 0; stage < T::kStages; ++stage) {
      const int phases = (num_tiles_ + T::kStages - 1 - stage) / T::kStages;
      parities ^= (phases & 1) << stage;
    }
    landings().parities = parities;
  }

  // Page id of this thread's box of `tile`, -1 for none. Entries past the range are never
  // dereferenced.
  __device__ int32_t fetch(int tile) const {
    const int32_t row = first_row(), position = tiles_.begin(tile) + row;
    if (tile >= num_tiles_ || row >= T::kKvTile || position >= tiles_.end(tile)) return -1;
    return id_of(current_.pages[(position >> p_.page_shift) * p_.table.entry_stride]);
  }
  // The same of one of the first tiles, which prefetch_pages() may have brought.
  __device__ int32_t fetch_first(int tile) const {
    if (!landings().are_known) return fetch(tile);
    const int32_t row = first_row();
    if (tile >= num_tiles_ || row >= T::kKvTile || tiles_.begin(tile) + row >= tiles_.end(tile)) {
      return -1;
    }
    return id_of(landings().pages[tile][row >> tiles_.log_box]);
  }

  // Starts the copies of the page ids that the first tiles of `next` want, an item that comes later
  // on. They stay unknown where it begins within its KV, or has a hole, or no boxes. For all
  // threads; a CTA barrier before and after.
  template <class Classes>
  __device__ static void prefetch_pages(const KernelParams& p, const WorkItem& next) {
    const int32_t thread = static_cast<int32_t>(ptx::thread_index()), log_box = log_of_box(p);
    const bool are_known = next.tile_class < kBoxClasses<S, Classes> && !begins_within<S>(next) &&
                           next.hole_end <= next.hole_begin;
    if (thread == 0) landings().are_known = are_known;
    const int32_t tile = thread / Landings::kMostPages, box = thread % Landings::kMostPages;
    const int32_t first = next.kv_begin >> log_box << log_box, row = box << log_box;
    const int32_t position = first + tile * T::kKvTile + row;
    if (!are_known || tile >= T::kStages || row >= T::kKvTile || position >= next.kv_end) return;
    const int32_t* pages = page_row(p.table, next.table_row);
    ptx::cp_async_4(ptx::shared_address(&landings().pages[tile][box]),
                    pages + (position >> p.page_shift) * p.table.entry_stride);
  }

  // Starts the copies of a tile whose page ids fetch() brought; past the last one, of none.
  __device__ void load(int tile, int32_t page, uint32_t smem) const {
    if (tile >= num_tiles_) return;
    const uint32_t landing = BoxLoader::landing(tile);
    if (ptx::thread_index() == 0) {
      const int32_t tokens = min_i32(tiles_.end(tile) - tiles_.begin(tile), T::kKvTile);
      const int32_t boxes = (tokens + (1 << tiles_.log_box) - 1) >> tiles_.log_box;
      ptx::announce_bytes(landing, (boxes << tiles_.log_box) * (kParts * kBoxBytes));
    }
    if (page < 0) return;
    const uint32_t part = box() % kParts;
    const bool is_k = part < kPartsK;
    const uint32_t part_of = is_k ? part : part - kPartsK;
    const TensorMap& map = is_k ? p_.k_boxes : p_.v_boxes;
    const uint32_t to =
        smem + part_of * kPartBytes + (is_k ? 0 : kPlan.stage_k) + first_row() * kBoxBytes;
    const int32_t token = (tiles_.begin(tile) + first_row()) & ((1 << p_.page_shift) - 1);
    const int32_t element = part_of * (kBoxBytes / S::kKvBytes);
    if constexpr (kReadsOnce) {
      ptx::copy_box(to, map, element, current_.item.kv_head, token, page, landing,
                    ptx::evict_first());
    } else {
      ptx::copy_box(to, map, element, current_.item.kv_head, token, page, landing);
    }
  }

  // Rows of V outside of a tile's run, which have landed with the rest, become zero: what lies
  // there may be anything, and weights of zero do not hide a NaN. For all threads; if it says so, a
  // barrier follows.
  __device__ bool clear_outside(int tile, uint32_t smem) const {
    const int32_t begin = tiles_.begin(tile);
    const int32_t first = tiles_.first(tile) - begin, end = tiles_.end(tile) - begin;
    if (first <= 0 && end >= T::kKvTile) return false;
    constexpr int kChunks = kBoxBytes / 16;
    const uint32_t zeros[4] = {};
    for (int i = static_cast<int>(ptx::thread_index()); i < T::kKvTile * kChunks;
         i += T::kThreads) {
      if (i / kChunks >= first && i / kChunks < end) continue;
#pragma unroll
      for (int part = 0; part < kParts - kPartsK; ++part) {
        ptx::store_shared_16(smem + kPlan.stage_k + part * kPartBytes + i * 16, zeros);
      }
    }
    ptx::publish_to_products();
    return true;
  }

 private:
  // An entry below zero is out of contract, but its box must land: as zeros, past all pages.
  __device__ static int32_t id_of(int32_t entry) { return entry & 0x7fffffff; }

  __device__ static uint32_t landing(int tile) {
    return ptx::shared_address(&landings().barriers[tile % T::kStages]);
  }

  // Boxes go round the warps: each starts a few of them.
  __device__ static uint32_t box() {
    return ptx::thread_index() % 32 * T::kWarps + ptx::thread_index() / 32;
  }
  __device__ int first_row() const { return static_cast<int>(box() / kParts) << tiles_.log_box; }

  const KernelParams& p_;
  const CurrentItem& current_;
  KvTiles<T::kKvTile, true> tiles_;
  int num_tiles_;
  uint32_t parities_;
};

}  // namespace fi::sm80
