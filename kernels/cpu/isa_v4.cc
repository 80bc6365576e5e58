// x86-64-v4: AVX-512 F/BW/CD/DQ/VL, 16 floats.
#include "cpu/kernel.h"

namespace fi::cpu {

constinit const IsaKernels kIsaV4 = make_kernels("v4");

}  // namespace fi::cpu
