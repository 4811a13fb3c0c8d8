// The CPU kernels for processors with avx2, fma, f16c. Run only after a look at the processor.
#if defined(__x86_64__)
// The system headers first: what they define must not be compiled for the raised instruction set.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define DN_DETR_AVX2
#define DN_DETR_VECTOR_BYTES 32
#include "kernels_body.h"

namespace dn_detr_d2 {
const Kernels kAvx2Kernels = make_kernels();
} // namespace dn_detr_d2

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
