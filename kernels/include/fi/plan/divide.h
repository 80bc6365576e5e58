// Integer division where it is needed often: GPUs have no instruction for it and emulate 32 bits in
// some 20 instructions, 64 bits in some 70. Exact, and the same on host and device.
#pragma once

#include "fi/core/types.h"

namespace fi {

// A divisor known before the launch, as multiplication and shift.
//   multiplier = floor(2^shift / value) + 1 with shift = 31 + ceil(log2(value)): it exceeds
//   2^shift / value by at most 1, hence n * multiplier / 2^shift exceeds n / value by less than
//   n / 2^shift <= 1 / value for n < 2^31: too little to reach the next integer.
// Example: value 5, shift 34, multiplier 3435973837; 14 * 3435973837 >> 34 = 2.
// Source: Granlund and Montgomery, Division by Invariant Integers using Multiplication, 1994.
struct Divisor {
  int32_t value;
  uint32_t multiplier;
  int32_t shift;

  // floor(n / value) and its remainder, for 0 <= n < 2^31.
  FI_HOST_DEVICE int32_t quotient(int32_t n) const {
    return static_cast<int32_t>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * multiplier >>
                                shift);
  }
  FI_HOST_DEVICE int32_t remainder(int32_t n) const { return n - quotient(n) * value; }

  FI_HOST_DEVICE int32_t ceil_quotient(int32_t n) const { return quotient(n + value - 1); }
};

FI_HOST_DEVICE constexpr Divisor make_divisor(int32_t value) {
  int32_t log = 0;
  while ((int64_t{1} << log) < value) ++log;
  const uint64_t power = uint64_t{1} << (31 + log);
  return {value, static_cast<uint32_t>(power / static_cast<uint64_t>(value) + 1), 31 + log};
}

struct Quotient64 {
  int64_t quotient;
  int32_t remainder;
};

// Long division of n >= 0 in 16-bit digits, for divisors below 2^15.
FI_HOST_DEVICE inline Quotient64 divide(int64_t n, const Divisor& divisor) {
  Quotient64 out{0, 0};
  for (int32_t shift = 48; shift >= 0; shift -= 16) {
    const int32_t digits = out.remainder << 16 | static_cast<int32_t>(n >> shift & 0xffff);
    const int32_t digit = divisor.quotient(digits);
    out.quotient = out.quotient << 16 | digit;
    out.remainder = digits - digit * divisor.value;
  }
  return out;
}

// floor(a / b) for a >= 0 and b > 0 where it is below 2^31. A float guesses it to within 2^-22 of
// itself or to one below or above: one round does for quotients below 2^22.
FI_HOST_DEVICE inline int32_t quotient_of(int64_t a, int64_t b) {
  int32_t quotient = 0;
  while (true) {
#if defined(__CUDA_ARCH__)
    const float guess = __fdividef(static_cast<float>(a), static_cast<float>(b));
#else
    const float guess = static_cast<float>(a) / static_cast<float>(b);
#endif
    quotient += static_cast<int32_t>(guess);
    a -= static_cast<int32_t>(guess) * b;
    if (a < 0) {
      --quotient;
      a += b;
    } else if (a >= b) {
      ++quotient;
      a -= b;
    }
    if (a >= 0 && a < b) return quotient;
  }
}

}  // namespace fi
