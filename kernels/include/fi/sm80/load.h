// Gathered loads of a query tile and of KV tiles into shared memory with cp.async.
#pragma once

#include "fi/attention/kernel_params.h"
#include "fi/ptx/cp_async.h"
#include "fi/ptx/thread.h"
#include "fi/ptx/wgmma.h"
#include "fi/sm80/config.h"

namespace fi::sm80 {

static_assert(sizeof(VariantRow) == kRowInfoBytes);

// Bytes from the start of a tile of kRows swizzled rows to a 16-byte chunk of one of them.
template <int kRows>
__device__ inline uint32_t swizzled_chunk(uint32_t row, uint32_t chunk) {
  return chunk / 8 * (kRows * ptx::kSwizzledRow) + row * ptx::kSwizzledRow + (chunk ^ row) % 8 * 16;
}

// Where a packed row of queries lies: products take 64 rows, 16 of each of four warps.
template <class S, class T>
__device__ inline uint32_t place_of_row(uint32_t row) {
  if constexpr (!kByWarpgroups<S, T> || T::kRowBlocks == 1) return row;
  return row / 16 % 2 * 64 + row / 32 * 16 + row % 16;
}

__device__ inline float scale_of(const DeviceScale& s, int32_t kv_head) {
  return s.data ? s.data[s.per_head ? kv_head : 0] : 1.0f;
}

// Positions and lengths of an item's rows.
struct RowBox {
  int32_t q_pos_min, q_pos_max;
  int32_t q_len_min, q_len_max;
  int32_t kv_len_min, kv_len_max;
};

// What a CTA works on, and what comes next. It lies in shared memory: the main loop has no register
// left for it.
struct CurrentItem {
  WorkItem item;
  RowBox box;
  const int32_t* pages;  // the item's row of the page table
  WorkItem next;         // on its way while the item is computed
  int32_t end;           // of the CTA's items in the plan
  int32_t left;          // items of the CTA after this one
  float scale;           // of its logits, the scales of q and k included
  bool has_nodes;        // whether the plan has any
  // Of the launch. As parameters they would be kept in registers through a loop over tiles, which a
  // kernel of many classes has not left for its smallest.
  KvStrides k_stride, v_stride;
  PageTableView table;
};

__device__ inline PlanView plan_of(const KernelParams& p) {
  return view_plan(ptx::here(p.plan), p.layout);
}

// Starts the copy of an item of the plan to current.next; landed when all copies of the CTA have.
__device__ inline void prefetch_item(const WorkItem* item, CurrentItem& current) {
  constexpr uint32_t kChunks = sizeof(WorkItem) / 16;
  const uint32_t thread = ptx::thread_index();
  if (thread >= kChunks) return;
  ptx::cp_async_16(ptx::shared_address(&current.next) + thread * 16,
                   reinterpret_cast<const char*>(item) + thread * 16, true);
}

// The box of a request item's rows, which ascend.
template <class S>
__device__ inline RowBox box_of(const WorkItem& item) {
  const int first = item.row_begin / S::kGroupSize;
  const int last = (item.row_begin + item.num_rows - 1) / S::kGroupSize;
  return {item.q_pos_begin + first,
          item.q_pos_begin + last,
          item.q_len,
          item.q_len,
          item.kv_len,
          item.kv_len};
}

// Tokens between positions where items of a prefix begin: a multiple of all KV tiles, less than
// most spans.
constexpr int32_t kCommonPositions = 1280;

// The first of those positions that an item of a prefix holds; where it has none, or for a request,
// at most its kv_begin.
template <class S>
__device__ inline int32_t common_position(const WorkItem& item) {
  if (S::kDecodes || item.request >= 0) return 0;
  const int32_t common = ceil_div(item.kv_begin, kCommonPositions) * kCommonPositions;
  return common < item.kv_end ? common : 0;
}
// Whether an item begins there, and ends with what lies before.
template <class S>
__device__ inline bool begins_within(const WorkItem& item) {
  return common_position<S>(item) > item.kv_begin;
}

// Makes the next item the current one; a CTA barrier before and after. An item without a hole gets
// an empty one at its end: the main loop need not ask. Where slots roll, it lies after the leading
// tokens: a tile has them or others. The box of a node item's rows is empty until
// load_rows().
//
// A prefix is read by several row tiles, each cut into spans of its own. Every item begins at a
// common position, if it holds one, and ends with what lies before: what one has read the others
// then find in the L2, wherever the spans begin.
template <class S, bool kRolls>
__device__ inline void advance_item(const KernelParams& p, CurrentItem& current) {
  constexpr uint32_t kWords = sizeof(WorkItem) / 4;
  const uint32_t thread = ptx::thread_index();
  if (thread < kWords) {
    const WorkItem& next = current.next;
    const int32_t* const field = reinterpret_cast<const int32_t*>(&next) + thread;
    const int32_t* word = field;
    const bool is_of_hole = word == &next.hole_begin || word == &next.hole_end;
    const bool moves = is_of_hole && next.hole_end <= next.hole_begin;
    if (moves) word = &next.kv_end;
    int32_t value = *word;
    if (kRolls && moves) value = min_i32(max_i32(p.rotation.sink_prefix, next.kv_begin), value);
    if (!kRolls && begins_within<S>(next)) {
      if (field == &next.kv_begin || field == &next.kv_end) value = common_position<S>(next);
      if (field == &next.hole_begin) value = next.kv_end;
      if (field == &next.hole_end) value = next.kv_begin;
    }
    reinterpret_cast<int32_t*>(&current.item)[thread] = value;
  } else if (thread == 32) {  // a warp of its own: the row may have to be looked up
    constexpr int32_t kLow = -(1 << 30), kHigh = 1 << 30;
    current.pages = page_row(p.table, current.next.table_row);
    current.left -= 1;
    const int kv_head = current.next.kv_head;
    current.scale = p.scale * scale_of(p.q_scale, kv_head) * scale_of(p.k_scale, kv_head);
    current.box = {kHigh, kLow, kHigh, kLow, kHigh, kLow};
    if (S::kDecodes || current.next.request >= 0) current.box = box_of<S>(current.next);
  }
}

// Whether the functions of a variant can ask for a request's lengths.
template <class V>
constexpr bool kAsksLengths = V::kHasLogits || V::kHasMasks || V::Outputs::kCount > 0;

// Extends the box by a row of each thread of `lanes`, which are of one warp.
template <class V>
__device__ inline void extend_box(uint32_t lanes, const VariantRow& row, RowBox& box) {
  const auto extend = [&](int32_t value, int32_t& least, int32_t& most) {
    const int32_t low = __reduce_min_sync(lanes, value), high = __reduce_max_sync(lanes, value);
    if (ptx::thread_index() % 32 != 0) return;
    atomicMin(&least, low);
    atomicMax(&most, high);
  };
  extend(row.q_pos, box.q_pos_min, box.q_pos_max);
  if constexpr (kAsksLengths<V>) {
    extend(row.q_len, box.q_len_min, box.q_len_max);
    extend(row.kv_len, box.kv_len_min, box.kv_len_max);
  }
}

// Who each packed row is; rows past num_rows repeat row 0. Those of a node item come from requests
// in any order, and extend the box.
template <class S, class V, class T>
__device__ inline void load_rows(const KernelParams& p, CurrentItem& current, VariantRow* rows) {
  static_assert(T::kRows <= T::kThreads, "a thread for each row");
  const WorkItem& item = current.item;
  const int x = static_cast<int>(ptx::thread_index());
  if (x >= T::kRows) return;
  const int row = item.row_begin + (x < item.num_rows ? x : 0);
  const int local = row / S::kGroupSize;
  const int q_head = item.kv_head * S::kGroupSize + row % S::kGroupSize;
  if (S::kDecodes || item.request >= 0) {
    rows[x] = {item.q_pos_begin + local,
               item.qo_begin + local,
               q_head,
               item.request,
               item.q_len,
               item.kv_len};
    return;
  }
  const PlanView plan = plan_of(p);
  const GatheredToken& g = plan.gathered[item.qo_begin + local];
  VariantRow who = {g.q_pos, g.token, q_head, g.request, 0, 0};
  if constexpr (kAsksLengths<V>) {
    who.q_len = plan.requests[g.request].q_len;
    who.kv_len = plan.requests[g.request].kv_len;
  }
  rows[x] = who;
  extend_box<V>(~0u >> (32 - min_int(T::kRows, 32)), who, current.box);
}

// A merge unit that an item announces its partial state to.
struct ArrivingUnit {
  int32_t unit, request;
  int32_t expected, num_rows;  // MergeUnit's
};

// Where a node item keeps the merge unit of each row until it is done: in what pads the rows of its
// query tile, or, where they are swizzled, follows them.
struct UnitPlaces {
  int first, stride;  // bytes

  __device__ ArrivingUnit& operator()(char* smem, int row) const {
    return *reinterpret_cast<ArrivingUnit*>(smem + first + row * stride);
  }
};
template <class S, class T>
__device__ constexpr UnitPlaces unit_places() {
  constexpr int kQueryRow = S::kHeadDimQk * 2;
  if (kByWarpgroups<S, T>) return {T::kRows * kQueryRow, 16};
  static_assert(kShared<S, T>.pitch_q - kQueryRow >= sizeof(ArrivingUnit));
  return {kQueryRow, kShared<S, T>.pitch_q};
}

// The merge units of a node item's rows, looked up while its first KV is on its way.
template <class S, class T, class Classes>
__device__ inline void load_units(const KernelParams& p, const WorkItem& item,
                                  const VariantRow* rows, char* smem) {
  const int x = static_cast<int>(ptx::thread_index());
  if (S::kDecodes || item.request >= 0 || x >= item.num_rows) return;
  const PlanView plan = plan_of(p);
  const int request = rows[x].request;
  const PlannedRequest& r = plan.requests[request];
  const int packed =
      (rows[x].token - r.qo_begin) * S::kGroupSize + (item.row_begin + x) % S::kGroupSize;
  const int unit =
      r.unit_base + item.kv_head * r.num_tiles + (packed >> Classes::log_rows(r.tile_class));
  const MergeUnit& of_row = plan.units[unit];
  unit_places<S, T>()(smem, x) = {unit, request, of_row.expected, of_row.num_rows};
}

// 16 bytes of a row to shared memory; zeros and no access when !valid. Unaligned rows are read
// element by element, and have landed when the CTA barrier that ends a stage's wait is passed.
template <class S, class Element>
__device__ inline void copy_chunk(uint32_t smem, const char* source, bool valid) {
  if constexpr (S::kAligned) {
    ptx::cp_async_16(smem, source, valid);
  } else {
    uint32_t words[4] = {0, 0, 0, 0};
    constexpr int kPerWord = 4 / sizeof(Element);
#pragma unroll
    for (int i = 0; i < 16 / static_cast<int>(sizeof(Element)); ++i) {
      uint32_t bits = 0;
      if constexpr (sizeof(Element) == 1) {
        if (valid) bits = reinterpret_cast<const uint8_t*>(source)[i];
      } else {
        if (valid) bits = reinterpret_cast<const uint16_t*>(source)[i];
      }
      words[i / kPerWord] |= bits << (i % kPerWord * 8 * sizeof(Element));
    }
    ptx::store_shared_16(smem, words);
  }
}

// Calls visit(x, part) for every part of every row that is this thread's; kParts of them each. The
// number of rounds is a constant: without it the compiler adds loops for what is left of one.
template <int kRows, int kParts, int kThreads, int kUnroll, class Visit>
__device__ inline void for_each_part(int thread, Visit visit) {
  constexpr int kCount = kRows * kParts;
#pragma unroll kUnroll
  for (int round = 0; round < (kCount + kThreads - 1) / kThreads; ++round) {
    if constexpr (kThreads % kParts == 0) {
      const int x = round * (kThreads / kParts) + thread / kParts;
      if (kCount % kThreads == 0 || x < kRows) visit(x, thread % kParts);
    } else {
      const int i = round * kThreads + thread;
      if (kCount % kThreads == 0 || i < kCount) visit(i / kParts, i % kParts);
    }
  }
}

// Query rows -> shared memory; rows past num_rows become zero. With an fp8 cache the eight 4-byte
// words of each 16 components are stored in the order 0 2 4 6 1 3 5 7: the order in which a lane
// receives K's components from ldmatrix (main_loop.h).
template <class S, class T>
__device__ inline void load_q(const KernelParams& p, int num_rows, const VariantRow* rows,
                              uint32_t smem_q) {
  using Element = typename S::Element;
  constexpr int kPitch = kShared<S, T>.pitch_q;
  const int thread = static_cast<int>(ptx::thread_index());
  const auto source_of = [&](int x) {
    return static_cast<const Element*>(p.q) + rows[x].token * p.q_stride_token +
           rows[x].q_head * p.q_stride_head;
  };
  if constexpr (!S::kFp8) {
    for_each_part<T::kRows, S::kHeadDimQk / 8, T::kThreads, 4>(thread, [&](int x, int chunk) {
      const char* source = reinterpret_cast<const char*>(source_of(x) + chunk * 8);
      const uint32_t row = place_of_row<S, T>(x);
      const uint32_t at =
          kByWarpgroups<S, T> ? swizzled_chunk<T::kRows>(row, chunk) : row * kPitch + chunk * 16;
      copy_chunk<S, Element>(smem_q + at, source, x < num_rows);
    });
  } else {
    for_each_part<T::kRows, S::kHeadDimQk / 16, T::kThreads, 4>(thread, [&](int x, int group) {
      uint32_t w[8] = {};
      if (x < num_rows) {
        const Element* source = source_of(x) + group * 16;
        if constexpr (S::kAligned) {
          reinterpret_cast<uint4*>(w)[0] = reinterpret_cast<const uint4*>(source)[0];
          reinterpret_cast<uint4*>(w)[1] = reinterpret_cast<const uint4*>(source)[1];
        } else {
#pragma unroll
          for (int e = 0; e < 16; ++e) {
            w[e / 2] |= uint32_t{reinterpret_cast<const uint16_t*>(source)[e]} << e % 2 * 16;
          }
        }
      }
      const uint32_t even[4] = {w[0], w[2], w[4], w[6]}, odd[4] = {w[1], w[3], w[5], w[7]};
      ptx::store_shared_16(smem_q + x * kPitch + group * 32, even);
      ptx::store_shared_16(smem_q + x * kPitch + group * 32 + 16, odd);
    });
  }
}

// The KV positions of an item in tiles: two runs, before and after the hole (advance_item). Tiles
// of boxes begin where one does, which may be before the run.
template <int kKvTile, bool kInBoxes>
struct KvTiles {
  const WorkItem& item;
  int32_t log_box;  // positions where tiles begin are multiples of 1 << log_box
  int32_t before_hole;

  __device__ explicit KvTiles(const WorkItem& of, int32_t log_box)
      : item(of),
        log_box(kInBoxes ? log_box : 0),
        before_hole(tiles_of(of.kv_begin, of.hole_begin)) {}

  __device__ int32_t count() const { return before_hole + tiles_of(item.hole_end, item.kv_end); }
  __device__ int32_t begin(int32_t tile) const {
    return box_at(first(tile)) + (tile < before_hole ? tile : tile - before_hole) * kKvTile;
  }
  // The run that a tile is of: its first position, and the one behind it.
  __device__ int32_t first(int32_t tile) const {
    const int32_t* first = tile < before_hole ? &item.kv_begin : &item.hole_end;
    return *first;
  }
  __device__ int32_t end(int32_t tile) const {
    const int32_t* last = tile < before_hole ? &item.hole_begin : &item.kv_end;
    return *last;
  }

 private:
  __device__ int32_t box_at(int32_t position) const {
    return kInBoxes ? position >> log_box << log_box : position;
  }
  // An empty run has none, wherever it lies.
  __device__ int32_t tiles_of(int32_t first, int32_t end) const {
    if (kInBoxes && end <= first) return 0;
    return ceil_div(end - box_at(first), kKvTile);
  }
};

// log2 of the tokens of a box: those of a page, or of a part of it.
__device__ inline int32_t log_of_box(const KernelParams& p) {
  return min_i32(p.page_shift, log_of(kMostBoxTokens));
}

// Where a token's K and V rows begin, in bytes from the cache's bases; kNoRow past the range, which
// is a source of copies that read nothing.
struct alignas(16) RowOffsets {
  int64_t k, v;
};
constexpr int64_t kNoRow = -16;

// Loads KV tiles through the page table in three steps, each a tile ahead of the next: fetch()
// reads a tile's page ids, one token a thread; publish() turns them into offsets in shared memory;
// load() starts the copies, 16 bytes a thread. Page ids so travel while the tensor cores work, and
// no thread holds more than one of them in a register. kReadsOnce: no other tile reads this KV.
template <class S, class T, bool kReadsOnce>
class KvLoader {
  using Element = typename S::KvElement;
  static constexpr SharedPlan kPlan = kShared<S, T>;
  static constexpr int kChunksK = S::kHeadDimQk * S::kKvBytes / 16;
  static constexpr int kChunksV = S::kHeadDimVo * S::kKvBytes / 16;
  // Threads of one token row; each copies every 8th (4th) of its chunks.
  static constexpr int kLanesPerRow = max_int(kChunksK, kChunksV) < 8 ? 4 : 8;
  static constexpr int kRowsPerPass = T::kThreads / kLanesPerRow;
  static constexpr bool kFromShared = T::kWarpsN > 1 || !S::kAligned;
  // Bytes between rows of a tile, and between a row's chunks that one thread copies.
  static constexpr bool kSwizzles = kByWarpgroups<S, T>;
  static constexpr int kRowK = kSwizzles ? ptx::kSwizzledRow : kPlan.pitch_k;
  static constexpr int kRowV = kSwizzles ? ptx::kSwizzledRow : kPlan.pitch_v;
  static constexpr int kNextChunk = kSwizzles ? T::kKvTile * ptx::kSwizzledRow : kLanesPerRow * 16;
  // Offsets of a token's K and V by a thread each.
  static constexpr bool kSplits = kSwizzles && !kFromShared && T::kThreads == 2 * T::kKvTile;
  static_assert(!kSwizzles || (kLanesPerRow == 8 && kRowsPerPass % 8 == 0));
  static_assert(T::kKvTile <= T::kThreads);
  // KV that no other tile reads leaves the L2 to the rest.
  static constexpr bool kEvictsFirst = kReadsOnce && S::kAligned;

 public:
  static constexpr int kPasses = (T::kKvTile + kRowsPerPass - 1) / kRowsPerPass;

  __device__ KvLoader(const KernelParams& p, const CurrentItem& current, char* smem)
      : p_(p),
        current_(current),
        offsets_(reinterpret_cast<RowOffsets*>(smem + kPlan.offsets)),
        tiles_(current.item, 0),
        num_tiles_(tiles_.count()) {}

  __device__ int num_tiles() const { return num_tiles_; }
  __device__ const KvTiles<T::kKvTile, false>& tiles() const { return tiles_; }

  // Page id of this thread's token of `tile`, -1 for none.
  __device__ int32_t fetch(int tile) const {
    const uint32_t thread = ptx::thread_index();
    return kSplits || thread < T::kKvTile ? fetch(tile, thread % T::kKvTile) : -1;
  }

  // Page id of one token of `tile`. Entries past the range are never dereferenced.
  __device__ int32_t fetch(int tile, int token) const {
    if (tile >= num_tiles_) return -1;
    const int pos = tiles_.begin(tile) + token;
    if (pos >= tiles_.end(tile)) return -1;
    const PageTableView& table = kFromShared || !S::kPlainPages ? current_.table : p_.table;
    if constexpr (S::kPlainPages) {
      return current_.pages[(pos >> p_.page_shift) * table.entry_stride];
    }
    return page_id(table, current_.pages, pos / table.page_size);
  }

  // Offsets of `tile`, whose page id fetch() brought; load() may read them after a CTA barrier.
  __device__ void publish(int tile, int32_t page) const {
    const uint32_t thread = ptx::thread_index(), token = thread % T::kKvTile;
    if constexpr (kSplits) {
      const bool is_v = thread >= T::kKvTile;
      RowOffsets& row = offsets_[tile % T::kStages * T::kKvTile + token];
      (is_v ? row.v : row.k) =
          page < 0 ? kNoRow : offset_of(is_v ? p_.kv.v_stride : p_.kv.k_stride, page, tile, token);
    } else {
      if (thread < T::kKvTile) publish(tile, token, page);
    }
  }
  __device__ void publish(int tile, int token, int32_t page) const {
    RowOffsets row = {kNoRow, kNoRow};
    if (page >= 0) {
      row.k = offset_of(kFromShared ? current_.k_stride : p_.kv.k_stride, page, tile, token);
      row.v = offset_of(kFromShared ? current_.v_stride : p_.kv.v_stride, page, tile, token);
    }
    offsets_[tile % T::kStages * T::kKvTile + token] = row;
  }

  // Starts the copies of a published tile; past the last one, of zeros. What depends on the thread
  // comes first in each address: the rest are constants of the instruction.
  __device__ void load(int tile, uint32_t smem, uint32_t thread) const {
    const uint32_t lane = thread % kLanesPerRow, first_row = thread / kLanesPerRow;
    const RowOffsets* offsets = offsets_ + tile % T::kStages * T::kKvTile + first_row;
    const uint32_t place = kSwizzles ? (lane ^ first_row) % 8 * 16 : lane * 16;
    const uint32_t smem_k = smem + place + first_row * kRowK;
    const uint32_t smem_v = smem + place + first_row * kRowV + kPlan.stage_k;
    const char* k = static_cast<const char*>(p_.kv.k) + lane * 16;
    const char* v = static_cast<const char*>(p_.kv.v) + lane * 16;
    const uint64_t policy = kEvictsFirst ? ptx::evict_first() : 0;
    // For warps that multiply themselves their latency spaces the copies out; at once they stall.
    constexpr bool kAtOnce = kByWarpgroups<S, T>;
    RowOffsets all[kPasses];
#pragma unroll
    for (int i = 0; kAtOnce && i < kPasses; ++i) all[i] = offsets[i * kRowsPerPass];
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int row = i * kRowsPerPass;
      if (T::kKvTile % kRowsPerPass != 0 && row + first_row >= T::kKvTile) continue;
      const RowOffsets at = kAtOnce ? all[i] : offsets[row];
      const bool valid = at.k >= 0;
      copy_row<kChunksK>(smem_k + row * kRowK, k + at.k, lane, valid, policy);
      copy_row<kChunksV>(smem_v + row * kRowV, v + at.v, lane, valid, policy);
    }
  }

 private:
  // In bytes, of a token's row in a page.
  __device__ int64_t offset_of(const KvStrides& stride, int32_t page, int tile, int token) const {
    const int in_page = offset_in_page(tiles_.begin(tile) + token);
    return (page * stride.page + in_page * stride.token + current_.item.kv_head * stride.head) *
           S::kKvBytes;
  }

  __device__ int offset_in_page(int pos) const {
    if constexpr (S::kPlainPages) return pos & ((1 << p_.page_shift) - 1);
    return pos % p_.table.page_size;
  }

  // This lane's chunks of a row, from its first one on.
  template <int kChunks>
  __device__ static void copy_row(uint32_t smem, const char* source, uint32_t lane, bool valid,
                                  uint64_t policy) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk += kLanesPerRow) {
      if (kChunks % kLanesPerRow != 0 && chunk + lane >= kChunks) continue;
      const uint32_t to = smem + chunk / kLanesPerRow * kNextChunk;
      if constexpr (kEvictsFirst) {
        ptx::cp_async_16(to, source + chunk * 16, valid, policy);
      } else {
        copy_chunk<S, Element>(to, source + chunk * 16, valid);
      }
    }
  }

  const KernelParams& p_;
  const CurrentItem& current_;
  RowOffsets* offsets_;  // [stages][kv_tile]
  KvTiles<T::kKvTile, false> tiles_;
  int num_tiles_;
};

}  // namespace fi::sm80
