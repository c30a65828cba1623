#define WK_NAMESPACE avx512
#define WK_LANES 16
#define WK_REGISTERS 32
#include "unit.hpp"

namespace wk {
WK_KERNELS(kernels_avx512, "avx512")
}  // namespace wk
