// Warpgroup-level matrix products: D (64 x N) += A (64 x 16) * B (16 x N), D in fp32 registers, A
// in registers or shared memory, B in shared memory. sm_90a. PTX ISA 9.7.15.
//
// Each warp of the four holds 16 rows of A and of D, in the fragments of mma.m16n8k16 (mma.h). The
// products run beside the warps that start them: until wait_products() their registers and shared
// memory belong to them.
#pragma once

#include "fi/core/elements.h"

namespace fi::ptx {

// Operands in shared memory are of swizzled rows: 64 elements of 16 bits each, 16-byte chunk c of
// row r at chunk c ^ r % 8. Eight rows make an atom, which lies at a multiple of its size.
constexpr int kSwizzledRow = 128, kSwizzleAtom = 8 * kSwizzledRow;

// Describes an operand; of more than 64 elements in a row, the next 64 lie `part` bytes further.
// Sixteen elements along a row are 32 bytes further, sixteen rows 2048.
__device__ inline uint64_t swizzled_operand(uint32_t smem, uint32_t part) {
  constexpr uint32_t kSwizzle128 = 1u << 30, kAtoms = kSwizzleAtom / 16;
  uint64_t operand;
  asm("mov.b64 %0, {%1, %2};"
      : "=l"(operand)
      : "r"(part / 16 << 16 | smem / 16), "r"(kSwizzle128 | kAtoms));
  return operand;
}

// The operand `bytes` after another. The address is in the lower half, which does not overflow.
__device__ inline uint64_t operand_after(uint64_t operand, uint32_t bytes) {
  return operand + bytes / 16;
}

// What generic instructions of this thread, cp.async among them, wrote to shared memory is there
// for products that start after the next barrier.
__device__ inline void publish_to_products() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// Before products start: what the warpgroup wrote to their registers is there.
__device__ inline void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

// Ends a group of products.
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

// Waits until at most `kPending` of the newest groups run.
template <int kPending>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// Registers of products hold their values here, before begin_products() and after the wait: without
// it the compiler might move what computes or uses them past either.
template <int kBlocks>
__device__ inline void settle(float (&d)[kBlocks][4]) {
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
  }
}

template <int kBlocks>
__device__ inline void settle(uint32_t (&a)[kBlocks][4]) {
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
  }
}

#define FI_D4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define FI_D16(i) FI_D4(i), FI_D4(i + 1), FI_D4(i + 2), FI_D4(i + 3)
#define FI_D32(i) FI_D16(i), FI_D16(i + 4)
#define FI_D64(i) FI_D32(i), FI_D32(i + 8)
#define FI_R16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FI_R32 \
  FI_R16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FI_R64                                                                                   \
  FI_R32                                                                                         \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// Both operands in shared memory, their rows along the sum.
#define FI_PRODUCT_OF_ROWS(kind, registers, a_at, b_at, adds_at, ...)                   \
  asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " adds_at                        \
               ", 0;\n"                                                                 \
               "wgmma.mma_async.sync.aligned." kind " {" registers "}, " a_at ", " b_at \
               ", adds, 1, 1, 0, 0;\n}\n"                                               \
               : __VA_ARGS__                                                            \
               : "l"(a), "l"(b), "n"(static_cast<int>(kAdds)))
// A in registers, the rows of B across the sum.
#define FI_PRODUCT_ACROSS_ROWS(kind, registers, a_at, b_at, ...)                 \
  asm volatile(                                                                  \
      "{\n.reg .pred adds;\nsetp.eq.b32 adds, 0, 0;\n"                           \
      "wgmma.mma_async.sync.aligned." kind " {" registers "}, {" a_at "}, " b_at \
      ", adds, 1, 1, 1;\n}\n"                                                    \
      : __VA_ARGS__                                                              \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

template <class Element>
constexpr bool kIsBFloat16 = false;
template <>
constexpr bool kIsBFloat16<BFloat16> = true;

// D = A * B, or that added: 64 rows, 8 * kBlocks columns.
template <class Element, bool kAdds, int kBlocks>
__device__ inline void start_product_of_rows(float (&d)[kBlocks][4], uint64_t a, uint64_t b) {
  static_assert(kBlocks == 4 || kBlocks == 8);
  if constexpr (kBlocks == 4 && kIsBFloat16<Element>) {
    FI_PRODUCT_OF_ROWS("m64n32k16.f32.bf16.bf16", FI_R16, "%16", "%17", "%18", FI_D16(0));
  } else if constexpr (kBlocks == 4) {
    FI_PRODUCT_OF_ROWS("m64n32k16.f32.f16.f16", FI_R16, "%16", "%17", "%18", FI_D16(0));
  } else if constexpr (kIsBFloat16<Element>) {
    FI_PRODUCT_OF_ROWS("m64n64k16.f32.bf16.bf16", FI_R32, "%32", "%33", "%34", FI_D32(0));
  } else {
    FI_PRODUCT_OF_ROWS("m64n64k16.f32.f16.f16", FI_R32, "%32", "%33", "%34", FI_D32(0));
  }
}

// D += A * B: 64 rows, columns of blocks kFirst to kFirst + kCount.
template <class Element, int kFirst, int kCount, int kBlocks>
__device__ inline void start_product_across_rows(float (&d)[kBlocks][4], const uint32_t (&a)[4],
                                                 uint64_t b) {
  static_assert(kCount == 8 || kCount == 16);
  if constexpr (kCount == 8 && kIsBFloat16<Element>) {
    FI_PRODUCT_ACROSS_ROWS("m64n64k16.f32.bf16.bf16", FI_R32, "%32, %33, %34, %35", "%36",
                           FI_D32(kFirst));
  } else if constexpr (kCount == 8) {
    FI_PRODUCT_ACROSS_ROWS("m64n64k16.f32.f16.f16", FI_R32, "%32, %33, %34, %35", "%36",
                           FI_D32(kFirst));
  } else if constexpr (kIsBFloat16<Element>) {
    FI_PRODUCT_ACROSS_ROWS("m64n128k16.f32.bf16.bf16", FI_R64, "%64, %65, %66, %67", "%68",
                           FI_D64(kFirst));
  } else {
    FI_PRODUCT_ACROSS_ROWS("m64n128k16.f32.f16.f16", FI_R64, "%64, %65, %66, %67", "%68",
                           FI_D64(kFirst));
  }
}

#undef FI_D4
#undef FI_D16
#undef FI_D32
#undef FI_D64
#undef FI_R16
#undef FI_R32
#undef FI_R64
#undef FI_PRODUCT_OF_ROWS
#undef FI_PRODUCT_ACROSS_ROWS

}  // namespace fi::ptx
