// Copies into shared memory, Ampere's asynchronous ones first. PTX ISA 9.7.9.25.3.
#pragma once

#include "fi/core/types.h"

namespace fi::ptx {

// 16 bytes past L1; writes zeros and reads nothing when !valid.
__device__ inline void cp_async_16(uint32_t smem, const void* gmem, bool valid) {
  // A predicate costs nothing; a number of bytes to read, arithmetic on the sources of K and of V.
  asm volatile(
      "{\n"
      ".reg .pred ignore;\n"
      "setp.eq.u32 ignore, %2, 0;\n"
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, ignore;\n"
      "}\n" ::"r"(smem),
      "l"(gmem), "r"(static_cast<uint32_t>(valid))
      : "memory");
}

// The L2's policy for memory that nobody reads again: first to make room. PTX ISA 9.7.9.16.
__device__ inline uint64_t evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// cp_async_16 with a policy of the L2.
__device__ inline void cp_async_16(uint32_t smem, const void* gmem, bool valid, uint64_t policy) {
  asm volatile(
      "{\n"
      ".reg .pred ignore;\n"
      "setp.eq.u32 ignore, %2, 0;\n"
      "cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, ignore, %3;\n"
      "}\n" ::"r"(smem),
      "l"(gmem), "r"(static_cast<uint32_t>(valid)), "l"(policy)
      : "memory");
}

// 4 and 8 bytes through L1.
__device__ inline void cp_async_4(uint32_t smem, const void* gmem) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;\n" ::"r"(smem), "l"(gmem) : "memory");
}
__device__ inline void cp_async_8(uint32_t smem, const void* gmem) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;\n" ::"r"(smem), "l"(gmem) : "memory");
}

__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most `kPending` of this thread's newest groups are in flight.
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Waits until all copies of this thread have landed, committed or not.
__device__ inline void cp_async_wait_all() { asm volatile("cp.async.wait_all;\n" ::: "memory"); }

__device__ inline void store_shared_16(uint32_t smem, const uint32_t (&words)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(smem), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// 4 or 16 bytes from and to shared memory.
template <int kWords>
__device__ inline void load_shared(uint32_t smem, uint32_t* words) {
  static_assert(kWords == 1 || kWords == 4);
  if constexpr (kWords == 1) {
    asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(words[0]) : "r"(smem) : "memory");
  } else {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(smem)
                 : "memory");
  }
}
template <int kWords>
__device__ inline void store_shared(uint32_t smem, const uint32_t* words) {
  static_assert(kWords == 1 || kWords == 4);
  if constexpr (kWords == 1) {
    asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(smem), "r"(words[0]) : "memory");
  } else {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(smem), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
  }
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace fi::ptx
