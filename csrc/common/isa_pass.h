// One pass of foreach_isa.h: the vectors and the kernels of BF_ISA. No include guard on purpose.

#include "common/simd.h"
#include BF_KERNELS

#undef BF_ISA
#undef BF_VECTOR_BYTES
#undef BF_REGISTERS
#undef BF_BF16_DOT
#undef BF_INT8_DOT
