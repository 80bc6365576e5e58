// x86-64-v2: SSE4.2, 4 floats. What every machine that loads the core can run.
#include "cpu/kernel.h"

namespace fi::cpu {

constinit const IsaKernels kIsaV2 = make_kernels("v2");

}  // namespace fi::cpu
