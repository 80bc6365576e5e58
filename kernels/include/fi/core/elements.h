// Element types: packing pairs of 16-bit values, widening 8-bit ones. Types of our own: an
// attention kernel needs two conversions, and CUDA's headers take 30 ms of every compilation.
#pragma once

#include "fi/core/types.h"

struct __nv_bfloat16;  // of CUDA's headers, for code that includes them
struct __half;

namespace fi {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct Float8E4M3 {
  uint8_t bits;
};

template <class Element>
struct ElementOps;

template <>
struct ElementOps<BFloat16> {
  static __device__ uint32_t pack(float lo, float hi) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
    return pair;
  }
  static __device__ void unpack(uint32_t pair, float& lo, float& hi) {
    lo = __uint_as_float(pair << 16);
    hi = __uint_as_float(pair & 0xffff0000u);
  }
  static __device__ BFloat16 from_float(float x) {
    BFloat16 element;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(element.bits) : "f"(x));
    return element;
  }

  // Two e4m3 values that `kPermutation` (PTX prmt, of `bytes` and 0) brings to bits 15..8 and
  // 31..24, zeros below; one statement, of which a main loop has many. e4m3 is sign, 4 exponent and
  // 3 mantissa bits with bias 7; shifted into place they read as a bf16 2^120 too small, denormals
  // included. A NaN of the cache comes out as 480.
  template <uint32_t kPermutation>
  static __device__ uint32_t widen_e4m3(uint32_t bytes) {
    uint32_t pair;
    asm("{\n.reg .b32 two, bits, scale, zero;\n"
        "prmt.b32 two, %1, 0, %2;\n"
        "shr.b32 bits, two, 4;\nand.b32 bits, bits, 0x07f007f0;\n"
        "lop3.b32 bits, two, 0x80008000, bits, 0xea;\n"  // two & signs | bits
        "mov.b32 scale, 0x7b807b80;\nmov.b32 zero, 0x80008000;\n"
        "fma.rn.bf16x2 %0, bits, scale, zero;\n}\n"
        : "=r"(pair)
        : "r"(bytes), "n"(kPermutation));
    return pair;
  }
};

template <>
struct ElementOps<Float16> {
  static __device__ uint32_t pack(float lo, float hi) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
    return pair;
  }
  static __device__ void unpack(uint32_t pair, float& lo, float& hi) {
    asm("{\n.reg .b16 a, b;\nmov.b32 {a, b}, %2;\ncvt.f32.f16 %0, a;\ncvt.f32.f16 %1, b;\n}\n"
        : "=f"(lo), "=f"(hi)
        : "r"(pair));
  }
  static __device__ Float16 from_float(float x) {
    Float16 element;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(element.bits) : "f"(x));
    return element;
  }

  // As above; an fp16 read from these bits is 2^8 too small.
  template <uint32_t kPermutation>
  static __device__ uint32_t widen_e4m3(uint32_t bytes) {
    uint32_t pair;
    asm("{\n.reg .b32 two, bits, scale;\n"
        "prmt.b32 two, %1, 0, %2;\n"
        "shr.b32 bits, two, 1;\nand.b32 bits, bits, 0x3f803f80;\n"
        "lop3.b32 bits, two, 0x80008000, bits, 0xea;\n"
        "mov.b32 scale, 0x5c005c00;\n"
        "mul.rn.f16x2 %0, bits, scale;\n}\n"
        : "=r"(pair)
        : "r"(bytes), "n"(kPermutation));
    return pair;
  }
};

template <>
struct ElementOps<__nv_bfloat16> : ElementOps<BFloat16> {};
template <>
struct ElementOps<__half> : ElementOps<Float16> {};

}  // namespace fi
