// The CPU kernels for every processor of the architecture: 16-byte vectors, which the compiler maps on SSE2 or NEON.
#include "kernels.h"

#define DN_DETR_VECTOR_BYTES 16
#include "kernels_body.h"

namespace dn_detr_d2 {
const Kernels kDefaultKernels = make_kernels();
} // namespace dn_detr_d2
