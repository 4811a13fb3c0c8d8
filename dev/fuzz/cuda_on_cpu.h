// One call of a CUDA kernel; fields as Arguments in csrc/cuda/kernels.cuh. Points, weights and their gradients are wide, or
// of the type of value. Addresses are as aligned as one element.
#pragma once

#include <cstdint>

namespace dn_detr_d2 {

struct CudaCall {
  int N, S, H, D, Q, L, K;
  const int64_t* shapes;
  const void *value, *points, *weights, *reference;
  int reference_dims;
  void* output;
  const void* grad_output;
  // Of value and reference zeros to be added to, wide; if `sorts`, that of value is of its type.
  void *grad_value, *grad_points, *grad_weights, *grad_reference;
  bool narrow_points; // points and weights of the type of value
  bool copies_points; // where they are not aligned for pairs, as the operators do
  bool sorts; // the backward pass with an order of additions that is always the same
  uint64_t shuffle; // seed of the order in which blocks and threads run; 0: that of their numbers
};

// dtype: as the CPU kernels' Dtype.
void cuda_on_cpu(const CudaCall& call, int dtype, bool backward);

} // namespace dn_detr_d2
