#define WK_NAMESPACE avx2
#define WK_LANES 8
#define WK_REGISTERS 16
#include "unit.hpp"

namespace wk {
WK_KERNELS(kernels_avx2, "avx2")
}  // namespace wk
