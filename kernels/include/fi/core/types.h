// Fixed-width integers, the host/device marker and the element types that cross the C++/Python
// boundary. NVRTC finds no <cstdint>, so device builds spell the integers out themselves.
#pragma once

#if defined(__CUDACC_RTC__)
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#else
#include <cstdint>
#endif

#if defined(__CUDACC__)
#define FI_HOST_DEVICE __host__ __device__
#else
#define FI_HOST_DEVICE
#endif

// Loops of few rounds: unrolled, they would only fill the instruction cache.
#if defined(__CUDACC__)
#define FI_ROLLED _Pragma("unroll 1")
#else
#define FI_ROLLED
#endif

namespace fi {

// Values are shared with fi_backend/formats.py (DTYPE_CODES).
enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat8E4M3 = 3 };

FI_HOST_DEVICE constexpr int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }
FI_HOST_DEVICE constexpr int32_t min_i32(int32_t a, int32_t b) { return a < b ? a : b; }
FI_HOST_DEVICE constexpr int32_t max_i32(int32_t a, int32_t b) { return a > b ? a : b; }

}  // namespace fi
