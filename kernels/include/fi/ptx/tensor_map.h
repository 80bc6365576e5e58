// Copies of boxes of a tensor to shared memory by the tensor memory accelerator, and the barriers
// that count their bytes. sm_90. PTX ISA 9.7.9.27.1.2 and 9.7.13.15.
//
// Copies are of the asynchronous proxy: what generic instructions wrote to the same place before
// needs publish_to_products() (wgmma.h) and a barrier. Waiting for a landing shows its bytes to
// generic instructions and to products alike.
#pragma once

#include "fi/attention/tensor_map.h"

namespace fi::ptx {

// A barrier whose phases are complete when `count` threads have announced bytes and these have
// landed. For other threads after the next CTA barrier.
__device__ inline void init_landing(uint32_t barrier, int count) {
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], %1;\n"
      "fence.mbarrier_init.release.cluster;\n" ::"r"(barrier),
      "r"(count)
      : "memory");
}

// Announces bytes of a phase.
__device__ inline void announce_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Waits for the end of a phase, the current one or the one before; phases have parities 0 1 0 1.
__device__ inline void wait_landing(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred landed;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 landed, [%0], %1;\n"
      "@!landed bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Starts the copy of a box of K or V: elements from `element` on of tokens from `token` of a page.
__device__ inline void copy_box(uint32_t smem, const TensorMap& map, int32_t element, int32_t head,
                                int32_t token, int32_t page, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3, %4, %5}], [%6];\n" ::"r"(smem),
      "l"(&map), "r"(element), "r"(head), "r"(token), "r"(page), "r"(barrier)
      : "memory");
}

// copy_box with a policy of the L2 (cp_async.h).
__device__ inline void copy_box(uint32_t smem, const TensorMap& map, int32_t element, int32_t head,
                                int32_t token, int32_t page, uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%2, %3, %4, %5}], [%6], %7;\n" ::"r"(smem),
      "l"(&map), "r"(element), "r"(head), "r"(token), "r"(page), "r"(barrier), "l"(policy)
      : "memory");
}

// Brings a map near before its first use.
__device__ inline void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(&map) : "memory");
}

}  // namespace fi::ptx
