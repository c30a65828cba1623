#define WK_NAMESPACE neon
#define WK_LANES 4
#define WK_REGISTERS 32
#include "unit.hpp"

namespace wk {
WK_KERNELS(kernels_neon, "neon")
}  // namespace wk
