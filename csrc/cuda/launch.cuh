// How a call becomes a launch: which loads its channels and addresses allow. Included by ms_deform_attn_cuda.cu and by the
// emulator of tools/fuzz/, so that the emulator tests these rules too.
#pragma once

#include <cstdint>
#include <type_traits>

namespace dn_detr_d2 {
namespace {

// Whether 16 bytes can be loaded from here at once. A tensor may start at any element of its storage.
inline bool is_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// Whether two numbers of this many bytes can be loaded from here at once, as the kernels load the (x, y) of a point.
inline bool is_aligned_for_pairs(const void* p, size_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % (2 * bytes) == 0;
}

// Calls launch(G, V) with the widest loads that the channels and the addresses (of value and gradient) allow.
template <typename T, typename Launch>
void with_geometry(int64_t channels, bool all_aligned, Launch launch) {
  constexpr int kWidest = 16 / sizeof(T);
  if (!all_aligned || channels % kWidest != 0) {
    launch(std::integral_constant<int, 32>(), std::integral_constant<int, 1>());
  } else if (channels <= 4 * kWidest) {
    launch(std::integral_constant<int, 4>(), std::integral_constant<int, kWidest>());
  } else {
    launch(std::integral_constant<int, 8>(), std::integral_constant<int, kWidest>());
  }
}

} // namespace
} // namespace dn_detr_d2
