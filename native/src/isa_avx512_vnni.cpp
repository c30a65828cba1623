// Products of int8 in AVX-512; everything else is computed by the unit of AVX-512.
#define WK_NAMESPACE avx512_vnni
#define WK_LANES 16
#define WK_REGISTERS 32
#define WK_WORD 4
#include "products_unit.hpp"

namespace wk {
extern const Products products_avx512_vnni;
const Products products_avx512_vnni = WK_PRODUCTS;
}  // namespace wk
