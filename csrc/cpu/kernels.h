// What the kernels of one instruction set offer, in plain pointers: no PyTorch header may be compiled with raised
// instruction sets (its inline functions would leak into the whole process).
#pragma once

#include <cstdint>

namespace dn_detr_d2 {

enum class Dtype { kDouble, kFloat, kBFloat16, kHalf };
constexpr int kNumDtypes = 4;

// One call. "Wide" is double if the values are double, else float; all that is not value, output or their gradients is
// wide. Tensors are contiguous. Letters as in docs/operator.md.
struct Problem {
  int64_t N, S, H, D, Q, L, K;
  const int64_t* shapes; // (L, 2) as (h, w)
  const void* value; // (N, S, H, D)
  const void* locations; // wide (N, Q, H, L, K, 2), or null in the fused form
  const void* weights; // wide (N, Q, H, L, K); the forward pass of the fused form does without

  // The fused form: locations from offsets and references, weights from logits.
  const void* reference; // wide (N, Q, L, R)
  int reference_dims; // R: 2 or 4
  const void* offsets; // wide (N, Q, H, L, K, 2)
  const void* logits; // wide (N, Q, H, L, K)

  void* output; // (N, Q, H * D)
  const void* grad_output; // (N, Q, H * D)
  void* grad_value; // (N, S, H, D)
  void* grad_locations; // wide, of offsets in the fused form
  void* grad_weights; // wide, before the softmax in the fused form
  void* grad_reference; // wide (N, Q, H, L, R) to be summed over H, or null
};

// Whether a level's cells are read several times each on the average, so that copying them pays.
static inline bool is_crowded(const Problem& p, int64_t level) {
  return p.Q * p.K * 4 >= p.shapes[2 * level] * p.shapes[2 * level + 1];
}

// Kernels work on a range of independent tasks; scratch belongs to the thread.
struct Kernels {
  // Rows are (image, query). Scratch: wide (D + L * K + 2 * K) and 128 bytes.
  void (*forward[kNumDtypes])(const Problem&, int64_t begin, int64_t end, void* scratch);
  // Tasks are (image, head, level): each owns its slice of grad_value, so nothing is added to by two threads and the
  // result does not depend on how many there are. Scratch: wide (2 * largest level * D + 2 * K).
  void (*backward[kNumDtypes])(const Problem&, int64_t begin, int64_t end, void* scratch);
  // Rows are (image, query, head): logits -> weights, and grad_weights -> gradient of the logits in place. Indexed by
  // the dtype of the value; both run in wide.
  void (*softmax[kNumDtypes])(const Problem&, void* weights, int64_t begin, int64_t end);
  void (*softmax_backward[kNumDtypes])(const Problem&, int64_t begin, int64_t end);
};

extern const Kernels kDefaultKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

} // namespace dn_detr_d2
