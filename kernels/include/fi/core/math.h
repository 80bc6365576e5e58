// fp32 math in base 2. Units: a name ends in _log2 when the quantity is a base-2 logarithm.
#pragma once

#include "fi/core/types.h"

namespace fi {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ inline float neg_infinity() { return __int_as_float(0xff800000); }

// ex2.approx: 2 ulp, 2^-inf = 0. PTX ISA 9.7.3.22.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// rcp.approx: 1 ulp. An exact quotient would call a subroutine in the rare case, and registers kept
// for the call are missing in the main loop. PTX ISA 9.7.3.14.
__device__ inline float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A word whose bits from `first` on are set. PTX ISA 9.7.8.8: a shift by 32 or more leaves nothing.
__device__ inline uint32_t bits_from(int first) {
  uint32_t bits;
  asm("shl.b32 %0, %1, %2;" : "=r"(bits) : "r"(~0u), "r"(max_i32(first, 0)));
  return bits;
}

// The larger of two; NaN if either is. PTX ISA 9.7.3.12.
__device__ inline float max_nan(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

}  // namespace fi
