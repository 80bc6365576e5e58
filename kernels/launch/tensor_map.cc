#include "launch/tensor_map.h"

#include <algorithm>
#include <string>

#include "fi/sm80/config.h"
#include "launch/driver.h"

namespace fi::launch {

TensorMap map_of_cache(const CacheTensor& cache) {
  // From cuda.h of CUDA 13.0.
  constexpr int kUint8 = 0, kUint16 = 1, kNotInterleaved = 0, kSwizzle128Bytes = 3,
                kPromoteTo128Bytes = 2, kZerosOutside = 0;
  constexpr unsigned kRank = 4;
  const auto [pages, tokens, heads, dim] = cache.shape;
  const int64_t row_bytes = dim * cache.element_bytes;
  const auto stride = [&](int axis) {  // of an axis of one element it means nothing
    return static_cast<uint64_t>(cache.shape[axis] > 1 ? cache.strides[axis] * cache.element_bytes
                                                       : row_bytes);
  };
  const uint64_t sizes[kRank] = {static_cast<uint64_t>(dim), static_cast<uint64_t>(heads),
                                 static_cast<uint64_t>(tokens), static_cast<uint64_t>(pages)};
  const uint64_t strides[kRank - 1] = {stride(2), stride(1), stride(0)};
  const uint32_t box[kRank] = {
      static_cast<uint32_t>(sm80::kBoxBytes / cache.element_bytes), 1,
      static_cast<uint32_t>(std::min<int64_t>(tokens, sm80::kMostBoxTokens)), 1};
  const uint32_t steps[kRank] = {1, 1, 1, 1};
  TensorMap map;
  const Driver& d = driver();
  const Result error =
      d.tensor_map_encode(&map, cache.element_bytes == 1 ? kUint8 : kUint16, kRank,
                          const_cast<void*>(cache.data), sizes, strides, box, steps,
                          kNotInterleaved, kSwizzle128Bytes, kPromoteTo128Bytes, kZerosOutside);
  if (error) {
    fail(d, error, "kv",
         "a cache of " + std::to_string(pages) + " pages that a tensor map describes",
         "keep strides below 2^40 bytes");
  }
  return map;
}

}  // namespace fi::launch
