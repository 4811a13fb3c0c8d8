// How a call becomes a launch: which loads its channels and addresses allow, and which queries a block takes. Included by
// ms_deform_attn_cuda.cu and by the emulator of dev/fuzz/, so that the emulator tests these rules too.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels.cuh"

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

// Calls launch(kUsual), true where there is a kernel for the usual numbers of levels and points and the call has these.
template <typename T, bool kFused, int G, typename Launch>
void with_counts(int levels, int points, Launch launch) {
  if constexpr (kFused && G <= 8 && sizeof(T) < 8) {
    if (levels == kUsualLevels && points == kUsualPoints) {
      return launch(std::true_type());
    }
  }
  launch(std::false_type());
}

// Tiles of kTileWidth columns and `rows` rows that cover the levels; fills in the levels' first tiles.
template <typename T, typename P>
int64_t count_tiles(Arguments<T, P>& a, int rows) {
  int64_t tiles = 0;
  for (int l = 0; l < a.L; ++l) {
    Level& level = a.levels[l];
    level.first_tile = static_cast<int>(tiles);
    tiles += (int64_t(level.width) + kTileWidth - 1) / kTileWidth * ((level.height + rows - 1) / rows);
  }
  return tiles;
}

// Divides the queries of one (image, head) among blocks of `lanes` lanes a slot: fills in a.tiles, a.tiled and the levels'
// first tiles. Returns the threads of a block. Queries are tiled if there is one for each cell, unless the levels are so
// narrow that most of a tile lies outside. Forward blocks then grow to tiles of 64 queries; the backward kernel has no
// registers for more than kThreads.
template <typename T, typename P>
int plan_blocks(Arguments<T, P>& a, int lanes, bool backward) {
  const int in_rows = kThreads / lanes; // queries of a block
  const int threads = backward ? kThreads : std::min(64 * lanes, kMostThreads);
  a.tiles = static_cast<int>((int64_t(a.Q) + in_rows - 1) / in_rows);
  a.tiled = false;
  if (a.Q == a.S && a.L <= kInlineLevels) {
    const int64_t tiles = count_tiles(a, threads / lanes / kTileWidth);
    a.tiled = tiles <= 2 * int64_t(a.tiles) + a.L;
    a.tiles = a.tiled ? static_cast<int>(tiles) : a.tiles;
  }
  return a.tiled ? threads : kThreads;
}

// Places of the points of an (image, head), see place_of(); fills in the levels' first places, from 0 to the result if that
// is below 2^31.
inline int64_t count_places(Level* levels, int count) {
  int64_t places = 0;
  for (int l = 0; l < count; ++l) {
    levels[l].first_place = static_cast<int>(places);
    places += (int64_t(levels[l].height) + 1) * (int64_t(levels[l].width) + 1);
  }
  return places;
}

// What gather_kernel works on; `order`, `starts` and `grad_value` are left to the caller.
template <typename T, typename P>
Gather<T> make_gather(const Arguments<T, P>& a) {
  Gather<T> gather{};
  static_cast<Map&>(gather) = a;
  gather.points = a.L * a.K;
  gather.blocks = (a.S + kThreads / kWarp - 1) / (kThreads / kWarp);
  gather.shares = a.shares;
  gather.grad_output = a.grad_output;
  return gather;
}

} // namespace
} // namespace dn_detr_d2
