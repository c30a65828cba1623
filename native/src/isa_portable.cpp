#define WK_NAMESPACE portable
#define WK_LANES 4
#define WK_REGISTERS 16
#include "unit.hpp"

namespace wk {
WK_KERNELS(kernels_portable, "portable")
}  // namespace wk
