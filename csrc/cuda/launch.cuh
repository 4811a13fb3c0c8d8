// How a call becomes a launch: which loads its channels and addresses allow. Included by ms_deform_attn_cuda.cu and by the
// emulator of dev/fuzz/, so that the emulator tests these rules too.
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

// Calls launch(G, V), lanes of a slot and channels of a lane: as many channels as make 16 bytes of `Moved`, if the channels
// and the addresses (of value and gradient) allow it. `Moved` is what the kernel moves most of: the forward kernel reads
// values; the backward kernel adds gradients, which are wide. A lane that adds 16 bytes beside those of its neighbour fills
// whole sectors; with 8 channels of 16-bit values a lane would add two times 16 bytes 32 bytes apart, which took twice as
// long on an H200.
template <typename Moved, typename Launch>
void with_geometry(int64_t channels, bool all_aligned, Launch launch) {
  constexpr int kWidest = 16 / sizeof(Moved);
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
