// Warp-level matrix instructions: ldmatrix and mma.m16n8k16. PTX ISA 9.7.14.
//
// Fragments of lane l, with r = l / 4 and c = 2 * (l % 4):
//   A (16 x 16): a0 = (r, c..c+1), a1 = (r + 8, c..), a2 = (r, c + 8..), a3 = (r + 8, c + 8..)
//   B (16 x 8):  b0 = (k = c..c+1, n = r), b1 = (k = c + 8.., n = r)
//   C (16 x 8):  c0, c1 = (r, c..c+1), c2, c3 = (r + 8, c..c+1)
#pragma once

#include "fi/core/elements.h"

namespace fi::ptx {

// Four 8 x 8 matrices of 16-bit elements; lanes 8i..8i+7 give the rows of matrix i.
__device__ inline void ldmatrix_x4(uint32_t (&out)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(smem)
               : "memory");
}

__device__ inline void ldmatrix_x4_trans(uint32_t (&out)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(smem)
               : "memory");
}

// c and d += a times the halves of b, b0 b1 and b2 b3; fp32 accumulators. Both products in one
// statement: they are half of what a main loop costs the compiler.
template <class Element>
__device__ inline void mma_m16n16k16(float (&c)[4], float (&d)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[4]);

template <>
__device__ inline void mma_m16n16k16<BFloat16>(float (&c)[4], float (&d)[4], const uint32_t (&a)[4],
                                               const uint32_t (&b)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
      "{%8, %9, %10, %11}, {%12, %13}, {%0, %1, %2, %3};\n"
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%4, %5, %6, %7}, "
      "{%8, %9, %10, %11}, {%14, %15}, {%4, %5, %6, %7};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(d[0]), "+f"(d[1]), "+f"(d[2]),
        "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]));
}

template <>
__device__ inline void mma_m16n16k16<Float16>(float (&c)[4], float (&d)[4], const uint32_t (&a)[4],
                                              const uint32_t (&b)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
      "{%8, %9, %10, %11}, {%12, %13}, {%0, %1, %2, %3};\n"
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%4, %5, %6, %7}, "
      "{%8, %9, %10, %11}, {%14, %15}, {%4, %5, %6, %7};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(d[0]), "+f"(d[1]), "+f"(d[2]),
        "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]));
}

// c += a times b.
template <class Element>
__device__ inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1);

template <>
__device__ inline void mma_m16n8k16<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                              uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ inline void mma_m16n8k16<Float16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// An 8 x 8 matrix of 16-bit elements, transposed: lane l has (l / 4, c..c+1) before and after.
__device__ inline uint32_t transpose(uint32_t pair) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(out) : "r"(pair));
  return out;
}

}  // namespace fi::ptx
