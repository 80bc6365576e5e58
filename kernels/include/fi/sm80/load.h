// Gathered loads of a query tile and of KV tiles into shared memory with cp.async.
#pragma once

#include "fi/attention/kernel_params.h"
#include "fi/ptx/cp_async.h"
#include "fi/sm80/config.h"

namespace fi::sm80 {

// Who a packed row is: its row of q and out, and its position. Rows past num_rows repeat row 0.
struct RowInfo {
  int32_t token;
  int32_t q_pos;
};

template <class S, class T>
__device__ inline void load_rows(const KernelParams& p, const WorkItem& item,
                                 const GatheredToken* gathered, RowInfo* rows) {
  for (int x = threadIdx.x; x < T::kRows; x += kThreads) {
    const int row = item.row_begin + (x < item.num_rows ? x : 0);
    const int local = row / S::kGroupSize;
    if (item.request >= 0) {
      rows[x] = {item.qo_begin + local, item.q_pos_begin + local};
    } else {
      const GatheredToken& g = gathered[item.qo_begin + local];
      rows[x] = {g.token, g.q_pos};
    }
  }
}

// Query rows -> shared memory; rows past num_rows become zero.
template <class S, class T>
__device__ inline void load_q(const KernelParams& p, const WorkItem& item, const RowInfo* rows,
                              uint32_t smem_q) {
  using Element = typename S::Element;
  constexpr int kChunks = S::kHeadDimQk / 8;
  for (int i = threadIdx.x; i < T::kRows * kChunks; i += kThreads) {
    const int x = i / kChunks, chunk = i % kChunks;
    const int head = item.kv_head * S::kGroupSize + (item.row_begin + x) % S::kGroupSize;
    const Element* source = static_cast<const Element*>(p.q) + rows[x].token * p.q_stride_token +
                            head * p.q_stride_head + chunk * 8;
    ptx::cp_async_16(smem_q + (x * S::kPitchQk + chunk * 8) * 2, source, x < item.num_rows);
  }
}

// The KV positions of an item in tiles: two runs, before and after the hole.
template <int kKvTile>
struct KvTiles {
  int32_t first_begin, first_end, second_begin, second_end;
  int32_t first_tiles, num_tiles;

  __device__ explicit KvTiles(const WorkItem& item) {
    const bool hole = item.hole_end > item.hole_begin;
    first_begin = item.kv_begin;
    first_end = hole ? item.hole_begin : item.kv_end;
    second_begin = hole ? item.hole_end : item.kv_end;
    second_end = item.kv_end;
    first_tiles = (first_end - first_begin + kKvTile - 1) / kKvTile;
    num_tiles = first_tiles + (second_end - second_begin + kKvTile - 1) / kKvTile;
  }
  __device__ int32_t begin(int32_t tile) const {
    return tile < first_tiles ? first_begin + tile * kKvTile
                              : second_begin + (tile - first_tiles) * kKvTile;
  }
  __device__ int32_t end(int32_t tile) const { return tile < first_tiles ? first_end : second_end; }
};

// Loads KV tiles through the page table. Each thread owns the same 16-byte column of several token
// rows; it fetches the page ids of a tile one tile ahead, so that their latency hides behind math.
template <class S, class T>
class KvLoader {
  using Element = typename S::Element;
  static constexpr int kChunksK = S::kHeadDimQk / 8;
  static constexpr int kChunksV = S::kHeadDimVo / 8;
  static constexpr int kLanesPerRow = 8;  // threads of one token row; each copies every 8th chunk
  static constexpr int kRowsPerPass = kThreads / kLanesPerRow;
  static constexpr int kPasses = T::kKvTile / kRowsPerPass;

 public:
  __device__ KvLoader(const KernelParams& p, const WorkItem& item)
      : p_(p),
        pages_(page_row(p.table, item.table_row)),
        k_(static_cast<const Element*>(p.kv.k) + item.kv_head * p.kv.k_stride.head),
        v_(static_cast<const Element*>(p.kv.v) + item.kv_head * p.kv.v_stride.head),
        tiles_(item) {}

  __device__ int num_tiles() const { return tiles_.num_tiles; }
  __device__ const KvTiles<T::kKvTile>& tiles() const { return tiles_; }

  // Page ids of this thread's rows of `tile`. Entries past the range are never dereferenced.
  __device__ void fetch_pages(int tile) {
    const int begin = tiles_.begin(tile), end = tiles_.end(tile);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int pos = begin + row_of_pass(i);
      if (pos >= end) continue;
      if constexpr (S::kPlainPages) {
        page_[i] = pages_[pos / page_size() * p_.table.entry_stride];
      } else {
        page_[i] = page_id(p_.table, pages_, pos / page_size());
      }
    }
  }

  // Starts the copies of `tile` whose pages fetch_pages() brought; one commit group.
  __device__ void load(int tile, uint32_t smem_k, uint32_t smem_v) const {
    const int begin = tiles_.begin(tile), end = tiles_.end(tile);
    const int lane = threadIdx.x % kLanesPerRow;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int row = row_of_pass(i), pos = begin + row;
      const bool valid = pos < end;
      const int64_t page = valid ? page_[i] : 0;
      const int in_page = valid ? pos % page_size() : 0;
      const Element* k = k_ + page * p_.kv.k_stride.page + in_page * p_.kv.k_stride.token;
#pragma unroll
      for (int c = 0; c < (kChunksK + kLanesPerRow - 1) / kLanesPerRow; ++c) {
        const int chunk = c * kLanesPerRow + lane;
        if (kChunksK % kLanesPerRow == 0 || chunk < kChunksK) {
          ptx::cp_async_16(smem_k + (row * S::kPitchQk + chunk * 8) * 2, k + chunk * 8, valid);
        }
      }
      const Element* v = v_ + page * p_.kv.v_stride.page + in_page * p_.kv.v_stride.token;
#pragma unroll
      for (int c = 0; c < (kChunksV + kLanesPerRow - 1) / kLanesPerRow; ++c) {
        const int chunk = c * kLanesPerRow + lane;
        if (kChunksV % kLanesPerRow == 0 || chunk < kChunksV) {
          ptx::cp_async_16(smem_v + (row * S::kPitchVo + chunk * 8) * 2, v + chunk * 8, valid);
        }
      }
    }
  }

 private:
  __device__ static int row_of_pass(int i) { return i * kRowsPerPass + threadIdx.x / kLanesPerRow; }
  __device__ int page_size() const { return S::kPageSize ? S::kPageSize : p_.table.page_size; }

  const KernelParams& p_;
  const int32_t* pages_;
  const Element* k_;
  const Element* v_;
  KvTiles<T::kKvTile> tiles_;
  int32_t page_[kPasses];
};

}  // namespace fi::sm80
