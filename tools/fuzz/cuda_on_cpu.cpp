// The CUDA kernels on the emulator, behind the CPU kernels' own description of a call.
#include "cuda_on_cpu.h"

#include "cuda_emulator.h"
// After the emulator, whose words it needs.
#include "../../csrc/cuda/kernels.cuh"

#include <algorithm>

namespace dn_detr_d2 {
namespace {

template <typename T, bool kFused, int G, int V>
void run_geometry(const CudaCall& call, bool backward) {
  using A = Wide<T>;
  Arguments<T, A> a{};
  a.S = call.S, a.H = call.H, a.D = call.D, a.Q = call.Q, a.L = call.L, a.K = call.K;
  std::vector<Level> levels;
  int start = 0;
  for (int l = 0; l < a.L; ++l) {
    levels.push_back({int(call.shapes[2 * l]), int(call.shapes[2 * l + 1]), start});
    start += levels[l].height * levels[l].width;
  }
  std::copy_n(levels.begin(), std::min(a.L, kInlineLevels), a.levels);
  a.more_levels = levels.data();
  a.value = static_cast<const T*>(call.value);
  a.points = static_cast<const A*>(call.points);
  a.weights = static_cast<const A*>(call.weights);
  a.reference = static_cast<const A*>(call.reference);
  a.reference_dims = call.reference_dims;
  a.output = static_cast<T*>(call.output);
  a.grad_output = static_cast<const T*>(call.grad_output);
  a.grad_value = static_cast<A*>(call.grad_value);
  a.grad_points = static_cast<A*>(call.grad_points);
  a.grad_weights = static_cast<A*>(call.grad_weights);
  a.grad_reference = static_cast<A*>(call.grad_reference);

  const int slots = kThreads / G;
  a.tiles = (a.Q + slots - 1) / slots;
  const int lanes = std::min(slots, a.Q) * G;
  const unsigned threads = (lanes + emulator::kWarp - 1) / emulator::kWarp * emulator::kWarp; // the rest has no work
  const unsigned blocks = call.N * a.H * a.tiles;
  if (backward) {
    emulator::launch(blocks, threads, [&] { backward_kernel<kFused, G, V, T, A>(a); });
  } else {
    emulator::launch(blocks, threads, [&] { forward_kernel<kFused, G, V, T, A>(a); });
  }
}

template <typename T>
void run_type(const CudaCall& call, bool backward) {
  constexpr int kWidest = 16 / sizeof(T);
  const bool fused = call.reference != nullptr;
  if (call.D % kWidest != 0) {
    fused ? run_geometry<T, true, 32, 1>(call, backward) : run_geometry<T, false, 32, 1>(call, backward);
  } else if (call.D <= 4 * kWidest) {
    fused ? run_geometry<T, true, 4, kWidest>(call, backward) : run_geometry<T, false, 4, kWidest>(call, backward);
  } else {
    fused ? run_geometry<T, true, 8, kWidest>(call, backward) : run_geometry<T, false, 8, kWidest>(call, backward);
  }
}

} // namespace

void cuda_on_cpu(const CudaCall& call, int dtype, bool backward) {
  switch (dtype) {
    case 0:
      return run_type<double>(call, backward);
    case 1:
      return run_type<float>(call, backward);
    case 2:
      return run_type<__nv_bfloat16>(call, backward);
    default:
      return run_type<__half>(call, backward);
  }
}

} // namespace dn_detr_d2
