// What the kernels of one instruction set offer, in plain pointers: no PyTorch header may be compiled with raised
// instruction sets (its inline functions would leak into the whole process).
#pragma once

#include <cstdint>

namespace dn_detr_d2 {

enum class Dtype : int { kDouble, kFloat, kBFloat16, kHalf };
constexpr int kNumDtypes = 4;

// One call. "Wide" is double if the values are double, else float; all that is not value, output or their gradients is
// wide. Tensors are contiguous. Letters as in docs/operator.md.
struct Problem {
  int64_t N, S, H, D, Q, L, K;
  const int64_t* shapes; // (L, 2) as (h, w)
  const void* value; // (N, S, H, D)
  const void* locations; // wide (N, Q, H, L, K, 2); the fused form does without
  const void* weights; // wide (N, Q, H, L, K); the forward pass of the fused form does without

  // The fused form: locations from offsets and references, weights from logits. Pointers do not tell which form it is: those
  // of empty tensors are null.
  bool fused;
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

// Bytes of scratch a thread needs, aligned to 64: one row of weights and of locations and the sums in whole vectors; or
// the locations of one point set and the largest level twice.
static inline int64_t forward_scratch(const Problem& p, Dtype dtype) {
  const int64_t wide = dtype == Dtype::kDouble ? 8 : 4;
  return (p.D + p.L * p.K + 2 * p.K) * wide + 2 * 64;
}
static inline int64_t backward_scratch(const Problem& p, Dtype dtype) {
  const int64_t wide = dtype == Dtype::kDouble ? 8 : 4;
  int64_t largest = 0;
  for (int64_t level = 0; level < p.L; ++level) {
    const int64_t cells = p.shapes[2 * level] * p.shapes[2 * level + 1];
    largest = cells > largest ? cells : largest;
  }
  return (2 * largest * p.D + 2 * p.K) * wide;
}

// Whether the slices of grad_value of these kernels must be zero before they run: those that do not come from scratch are
// added to where they are.
static inline bool adds_in_place(const Problem& p, Dtype dtype) {
  bool all_crowded = true;
  for (int64_t level = 0; level < p.L; ++level) {
    all_crowded = all_crowded && is_crowded(p, level);
  }
  return (dtype == Dtype::kDouble || dtype == Dtype::kFloat) && !all_crowded;
}

// Kernels work on a range of independent tasks; scratch belongs to the thread.
struct Kernels {
  // Rows are (image, query).
  void (*forward[kNumDtypes])(const Problem&, int64_t begin, int64_t end, void* scratch);
  // Tasks are (image, head, level): each owns its slice of grad_value, so nothing is added to by two threads and the
  // result does not depend on how many there are.
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
