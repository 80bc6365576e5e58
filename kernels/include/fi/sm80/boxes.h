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

  // For one thread of `warps` warps; a CTA barrier before anything lands.
  __device__ void init(int warps) {
#pragma unroll
    for (uint64_t& barrier : barriers) ptx::init_landing(ptx::shared_address(&barrier), warps);
    parities = 0;
    are_known = false;
  }
};

__device__ inline Landings& landings() {
  __shared__ Landings landings;
  return landings;
}

// Loads KV tiles as boxes of the cache, 128 bytes of each token of a page, in three steps: fetch()
// reads the page ids of this warp's boxes of 32 tiles, those of a tile in each lane; prepare()
// makes of a tile's what start() needs to know to start their copies. The tensor memory accelerator
// makes the addresses. What copies need is alike in all lanes, and the compiler knows: it is kept
// in uniform registers. With operands of a lane each it makes a loop over the lanes around every
// copy.
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
  static_assert(T::kStages <= Landings::kMost);
  static_assert(T::kKvTile / kLeastBoxTokens <= Landings::kMostPages);
  static_assert(T::kStages * Landings::kMostPages <= T::kThreads);

 public:
  __device__ BoxLoader(const KernelParams& p, const CurrentItem& current)
      : p_(p),
        current_(current),
        tiles_(current.item, log_of_box(p)),
        num_tiles_(tiles_.count()),
        kv_head_(ptx::uniform(current.item.kv_head)),
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

  // This warp's boxes of 32 tiles, those of a tile in each lane; -1 for none. A box is a page and
  // which part of it: both fit, as no cache has 2^31 boxes.
  static constexpr int kMostBoxes = ceil_div(T::kKvTile / kLeastBoxTokens, T::kWarps);
  static constexpr int kLanes = 32;
  struct Boxes {
    int32_t of_lane[kMostBoxes];
  };
  // Those of the tiles from `tile` on. Entries past the range are never dereferenced.
  __device__ Boxes fetch(int tile) const {
    return boxes_of(tile + lane(), [&](int, int32_t position) {
      return current_.pages[(position >> p_.page_shift) * p_.table.entry_stride];
    });
  }
  // Those of the first T::kStages tiles; prefetch_pages() may have brought their pages.
  __device__ Boxes fetch_first() const {
    if (!landings().are_known) return fetch(0);
    const int tile = lane() < T::kStages ? lane() : num_tiles_;
    return boxes_of(tile,
                    [&](int i, int32_t) { return landings().pages[tile][i * T::kWarps + warp()]; });
  }

  // Starts the copies of the page ids that the first tiles of `next` want, an item that comes later
  // on. They stay unknown where it begins within its KV, or has a hole, or other tiles. For all
  // threads; a CTA barrier before and after.
  template <class Classes>
  __device__ static void prefetch_pages(const KernelParams& p, const WorkItem& next) {
    const int32_t thread = static_cast<int32_t>(ptx::thread_index()), log_box = log_of_box(p);
    const bool are_known = has_boxes_of<S, T>(Classes{}, next.tile_class) &&
                           !begins_within<S>(next) && next.hole_end <= next.hole_begin;
    if (thread == 0) landings().are_known = are_known;
    const int32_t tile = thread / Landings::kMostPages, box = thread % Landings::kMostPages;
    const int32_t first = next.kv_begin >> log_box << log_box, row = box << log_box;
    const int32_t position = first + tile * T::kKvTile + row;
    if (!are_known || tile >= T::kStages || row >= T::kKvTile || position >= next.kv_end) return;
    const int32_t* pages = page_row(p.table, next.table_row);
    ptx::cp_async_4(ptx::shared_address(&landings().pages[tile][box]),
                    pages + (position >> p.page_shift) * p.table.entry_stride);
  }

  // The copies of this warp's boxes of a tile, for all lanes of the warp; none past the last one.
  struct Copies {
    bool exist;
    uint32_t landing, bytes;
    struct Box {
      int32_t page, token;  // page -1 for none
      uint32_t place;
    } boxes[kMostBoxes];
  };
  __device__ Copies prepare(int tile, const Boxes& boxes, uint32_t smem) const {
    Copies copies = {tile < num_tiles_, landing(tile), 0, {}};
    const int32_t log_box = tiles_.log_box, log_parts = p_.page_shift - log_box;
#pragma unroll
    for (int i = 0; i < kMostBoxes; ++i) {
      const int32_t box = ptx::uniform(boxes.of_lane[i], tile % kLanes);
      const int32_t page = box >> log_parts;
      copies.boxes[i] = {page, (box - (page << log_parts)) << log_box,
                         smem + row_of_box(i, ptx::uniform(warp())) * kBoxBytes};
      if (box >= 0) copies.bytes += kParts * kBoxBytes << log_box;
    }
    return copies;
  }
  // Every warp announces the bytes of its own boxes.
  __device__ void start(const Copies& copies) const {
    if (!copies.exist) return;
    if (ptx::elect()) ptx::announce_bytes(copies.landing, copies.bytes);
#pragma unroll
    for (int i = 0; i < kMostBoxes; ++i) {
      const auto& box = copies.boxes[i];
      if (box.page < 0 || !ptx::elect()) continue;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const bool is_k = part < kPartsK;
        const int part_of = is_k ? part : part - kPartsK;
        const TensorMap& map = is_k ? p_.k_boxes : p_.v_boxes;
        const uint32_t to = box.place + part_of * kPartBytes + (is_k ? 0 : kPlan.stage_k);
        const int32_t element = part_of * (kBoxBytes / S::kKvBytes);
        if constexpr (kReadsOnce) {
          ptx::copy_box(to, map, element, kv_head_, box.token, box.page, copies.landing,
                        ptx::evict_first());
        } else {
          ptx::copy_box(to, map, element, kv_head_, box.token, box.page, copies.landing);
        }
      }
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
  // page(i, position): of the i-th box, which begins there.
  template <class Page>
  __device__ Boxes boxes_of(int tile, const Page& page) const {
    Boxes boxes;
    const int32_t log_parts = p_.page_shift - tiles_.log_box;
    const int32_t begin = tiles_.begin(tile), end = tiles_.end(tile);
#pragma unroll
    for (int i = 0; i < kMostBoxes; ++i) {
      const int32_t row = row_of_box(i, warp()), position = begin + row;
      boxes.of_lane[i] = -1;
      if (tile >= num_tiles_ || row >= T::kKvTile || position >= end) continue;
      const int32_t part = position >> tiles_.log_box & ((1 << log_parts) - 1);
      // An entry below zero is out of contract, but its box must land: as zeros, past all pages.
      boxes.of_lane[i] = (page(i, position) << log_parts | part) & 0x7fffffff;
    }
    return boxes;
  }

  __device__ static int lane() { return static_cast<int>(ptx::thread_index()) % 32; }
  __device__ static uint32_t landing(int tile) {
    return ptx::shared_address(&landings().barriers[tile % T::kStages]);
  }

  // Boxes go round the warps: the first token of a warp's i-th one.
  __device__ static int warp() { return static_cast<int>(ptx::thread_index()) / 32; }
  __device__ int32_t row_of_box(int i, int warp) const {
    return (i * T::kWarps + warp) << tiles_.log_box;
  }

  const KernelParams& p_;
  const CurrentItem& current_;
  KvTiles<T::kKvTile, true> tiles_;
  int num_tiles_;
  int32_t kv_head_;
  uint32_t parities_;
};

}  // namespace fi::sm80
