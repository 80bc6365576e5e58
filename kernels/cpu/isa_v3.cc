// x86-64-v3: AVX2, FMA and F16C, 8 floats.
#include "cpu/kernel.h"

namespace fi::cpu {

constinit const IsaKernels kIsaV3 = make_kernels("v3");

}  // namespace fi::cpu
