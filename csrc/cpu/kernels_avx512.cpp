// The CPU kernels for processors with avx2, fma, f16c, avx512f, avx512bw, avx512dq, avx512vl. Run only after a look at the processor.
#if defined(__x86_64__)
// The system headers first: what they define must not be compiled for the raised instruction set.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif

#define DN_DETR_AVX512
#define DN_DETR_VECTOR_BYTES 64
#include "kernels_body.h"

namespace dn_detr_d2 {
const Kernels kAvx512Kernels = make_kernels();
} // namespace dn_detr_d2

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
