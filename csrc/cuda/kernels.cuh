// The CUDA kernels. Included by ms_deform_attn_cuda.cu, and by the emulator of dev/fuzz/, which runs them on a CPU, so
// nothing here includes PyTorch.
//
// A group of G neighbouring lanes of a warp works on one slot, that is one (image, query, head). Each lane carries V
// channels, which fill one 16-byte load where the channels allow it (V = 1 otherwise). A group takes its points B at a
// time: lane j < B *owns* point j of the batch, reads its location and weight and does the arithmetic of
// ms_deform_attn.h once; then, point after point, the owner's results are handed to all lanes, which load the corners. In the
// backward pass the sums over channels travel the other way: after each batch, lane j holds the sums of point j.
// Channels beyond G * V are done in further rounds.
//
// The fused form with the usual numbers of levels and points has kernels of its own (kUsual): they divide by constants, have
// the loop over batches unrolled, and each lane keeps the exponentials of its points in registers.
//
// The backward kernel adds to the gradient of the value as it goes, in whatever order blocks run. For one that is always the
// same it writes down instead where each point lies; the points are sorted by that, and gather_kernel sums up each cell.
//
// Blocks walk over the queries of one (image, head) before the next, so that a slice of value stays in the L2 cache. Where
// the queries are the cells themselves (Q = S, an encoder's self-attention), a block takes a tile of cells of one level in
// place of queries in a row: the points of neighbours read the same cells, which then come from the L1 cache.
// Shuffles need all lanes of a warp: only whole warps return early, lanes without work own points without corners.
#pragma once

#include "../ms_deform_attn.h"

namespace dn_detr_d2 {
namespace {

// Type that sums are kept in: "wide".
template <typename T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <typename T>
using Wide = typename WideOf<T>::type;

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kMostThreads = 512; // of a block of the forward kernel
constexpr int kTileWidth = 8; // cells
constexpr int kUsualLevels = 4, kUsualPoints = 4; // of the deformable family, of whose fused forms there are kernels
// Blocks that must fit on an SM. More do not fit in the forms that models call; told so, the compiler uses the registers
// that are left and needs fewer instructions.
template <typename T>
constexpr int kResident = sizeof(T) == 8 ? 1 : 2;
constexpr int kInlineLevels = 32;
constexpr int kKeptBatches = 4; // batches of points whose wide gradients the backward kernel keeps on chip
constexpr unsigned kAllLanes = 0xffffffffu;

struct Level {
  int height, width;
  int start; // cells of the levels before it
  int first_tile; // tiles of the levels before it, if queries are tiled
  int first_place; // places of the levels before it, see place_of()
};

struct Map {
  int S, H, D, L;
  Level levels[kInlineLevels];
  const Level* more_levels; // all of them, on the device, if there are more than kInlineLevels
  int places; // of an image and head, see place_of()
};

// One call; all tensors contiguous, letters as in docs/operator.md. T is the type of value and output, P that of locations
// and weights (or what they are made of): T or wide. Gradients have the type of what they are gradients of, but those that
// are sums over queries, of value and reference, are wide. Loads of several numbers want the addresses that launch.cuh asks
// for.
template <typename T, typename P>
struct Arguments : Map {
  using A = Wide<T>;
  int Q, K;
  int tiles; // blocks for the queries of one (image, head)
  bool tiled; // query i belongs to cell i, and a block takes kTileWidth columns and as many rows as it has slots for
  const T* value; // (N, S, H, D)
  const P* points; // (N, Q, H, L, K, 2) locations, or offsets in the fused form
  const P* weights; // (N, Q, H, L, K), or logits in the fused form
  const A* reference; // (N, Q, L, R) in the fused form
  int reference_dims; // R: 2 or 4
  T* output; // (N, Q, H * D)
  const T* grad_output; // (N, Q, H * D)
  A* grad_value; // (N, S, H, D), zeros to be added to
  P* grad_points;
  P* grad_weights;
  A* wide_grad_weights; // as grad_weights; memory that the backward kernel of the fused form needs if needs_memory()
  A* grad_reference; // (N, Q, L, R), zeros to be added to, or null
  // In place of grad_value if the backward kernel sorts; grad_reference is (N, Q, H, L, K, R) then, not summed.
  int* point_places; // (N, Q, H, L, K), image and head * places + place_of() the point; N * H * places if it touches nothing
  A* shares; // (N, Q, H, L, K, 4), weight of each corner
};

// What gather_kernel reads: the points in the order of their places, and those of a place in their own order.
template <typename T>
struct Gather : Map {
  using A = Wide<T>;
  int points; // L * K
  int blocks; // for the cells of one (image, head)
  const int64_t* order; // numbers of the points, (N, Q, H, L, K) counted through
  const int* starts; // (N * H * places + 1): where the points of each place begin in `order`
  const A* shares; // as in Arguments
  const T* grad_output; // (N, Q, H * D)
  T* grad_value; // (N, S, H, D)
};

// Points that the lanes of a group own at a time in the backward kernel.
template <int G>
constexpr int kBatch = G < 8 ? G : 8;

// Whether the backward kernel of the fused form needs Arguments::wide_grad_weights: the gradients of the logits are made
// from those of the weights when all of these are known, and a 16-bit tensor cannot hold them unrounded until then.
template <bool kFused, int G, typename T, typename P>
bool needs_memory(int64_t points) {
  return kFused && sizeof(P) < sizeof(Wide<T>) && points > int64_t(kKeptBatches) * kBatch<G>;
}

__device__ __forceinline__ float widen(float x) {
  return x;
}
__device__ __forceinline__ double widen(double x) {
  return x;
}
__device__ __forceinline__ float widen(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ __forceinline__ float widen(__half x) {
  return __half2float(x);
}

__device__ __forceinline__ void narrow(float x, float& to) {
  to = x;
}
__device__ __forceinline__ void narrow(double x, double& to) {
  to = x;
}
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& to) {
  to = __float2bfloat16(x);
}
__device__ __forceinline__ void narrow(float x, __half& to) {
  to = __float2half(x);
}

// V values that are loaded and stored together.
template <typename T, int V>
struct alignas(V * sizeof(T)) Pack {
  T lane[V];
};

template <typename T, int V, typename A>
__device__ __forceinline__ void load(const T* p, A (&values)[V]) {
  const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(p);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    values[i] = widen(pack.lane[i]);
  }
}

template <typename T, int V, typename A>
__device__ __forceinline__ void store(T* p, const A (&values)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    narrow(values[i], pack.lane[i]);
  }
  *reinterpret_cast<Pack<T, V>*>(p) = pack;
}

// The same channels in another cell, `bytes` a cell. The product is one instruction; left to itself the compiler makes
// four of it once it has moved the widening of `bytes` out of a loop.
template <typename T>
__device__ __forceinline__ T* advance(T* p, int cells, int bytes) {
#if defined(__CUDA_ARCH__)
  int64_t distance;
  asm("mul.wide.s32 %0, %1, %2;" : "=l"(distance) : "r"(cells), "r"(bytes));
#else
  const int64_t distance = int64_t(cells) * bytes;
#endif
  return (T*)((char*)p + distance);
}

// The corners of a point that lie in its level, of V channels. Four loads are under way before the first is waited for.
template <int V, typename T>
__device__ __forceinline__ void
load_corners(const T* value, int cell, int width, int corners, int bytes, Pack<T, V> (&packs)[4]) {
  const int steps[4] = {0, 1, width, width + 1};
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    if (corners >> c & 1) {
      packs[c] = *reinterpret_cast<const Pack<T, V>*>(advance(value, cell + steps[c], bytes));
    }
  }
}

// Adds to global memory; since the old values are not used, these become reductions, on sm_90 one for four floats.
__device__ __forceinline__ void add_four(float* p, float a, float b, float c, float d) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  atomicAdd(reinterpret_cast<float4*>(p), make_float4(a, b, c, d));
#else
  atomicAdd(p, a);
  atomicAdd(p + 1, b);
  atomicAdd(p + 2, c);
  atomicAdd(p + 3, d);
#endif
}

template <int V, typename A>
__device__ __forceinline__ void add(A* p, const A (&values)[V]) {
  if constexpr (sizeof(A) == 4 && V % 4 == 0) {
#pragma unroll
    for (int i = 0; i < V; i += 4) {
      add_four(p + i, values[i], values[i + 1], values[i + 2], values[i + 3]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      atomicAdd(p + i, values[i]);
    }
  }
}

template <int G, typename A>
__device__ __forceinline__ A group_sum(A x) {
#pragma unroll
  for (int distance = G / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, distance, G);
  }
  return x;
}

template <int G, typename A>
__device__ __forceinline__ A group_max(A x) {
#pragma unroll
  for (int distance = G / 2; distance > 0; distance /= 2) {
    const A other = __shfl_xor_sync(kAllLanes, x, distance, G);
    x = other > x ? other : x;
  }
  return x;
}

// The level among `count` whose cells, tiles or places, from `first` on, include this one.
__device__ __forceinline__ Level level_of(const Level* levels, int count, int Level::*first, int number) {
  int l = 0;
  while (l + 1 < count && number >= levels[l + 1].*first) {
    ++l;
  }
  return levels[l];
}

// Query of slot `slot` of `slots` in this tile of cells, -1 where the tile reaches over the edge of its level.
__device__ __forceinline__ int query_in_tile(const Level* levels, int count, int tile, int slot, int slots) {
  const Level level = level_of(levels, count, &Level::first_tile, tile);
  const int number = tile - level.first_tile, across = (level.width + kTileWidth - 1) / kTileWidth;
  const int x = number % across * kTileWidth + slot % kTileWidth;
  const int y = number / across * (slots / kTileWidth) + slot / kTileWidth;
  return x < level.width && y < level.height ? level.start + y * level.width + x : -1;
}

// Levels, and points of a level; constants in the kernels for the usual numbers.
template <bool kUsual>
struct Counts {
  int L, K;

  __device__ __forceinline__ Counts(int levels, int points)
      : L(kUsual ? kUsualLevels : levels), K(kUsual ? kUsualPoints : points) {}
};

// Where this thread works.
template <int G>
struct Slot {
  int lane; // in the group
  bool active;
  int64_t row; // (image, query)
  int64_t index; // (image, query, head)
  int64_t first; // element of value of the image's first cell, this head

  template <typename T, typename P>
  __device__ __forceinline__ Slot(const Arguments<T, P>& a, const Level* levels) {
    const int slice = blockIdx.x / a.tiles, tile = blockIdx.x % a.tiles;
    const int image = slice / a.H, head = slice % a.H;
    const int slot = threadIdx.x / G, slots = blockDim.x / G;
    const int query = a.tiled ? query_in_tile(levels, a.L, tile, slot, slots) : tile * slots + slot;
    lane = threadIdx.x % G;
    active = 0 <= query && query < a.Q;
    row = int64_t(image) * a.Q + query;
    index = row * a.H + head;
    first = (int64_t(image) * a.S * a.H + head) * a.D;
  }
};

// A point as its owner sees it. Without work all fields are 0: no corners, no weight.
template <typename A>
struct Owned {
  Point<A, int> point{};
  Level level{};
  A weight = 0;
  A everywhere = 0; // what the point adds to all channels: 0, or NaN
  A offset_x = 0, offset_y = 0;
  Reference<A> reference{};
};

// Largest logit of the slot, and one over the sum of the exponentials. In kernels for the usual sizes each lane keeps the
// exponentials of its own points.
template <typename A, int kCount>
struct Softmax {
  A largest = 0, scale = 1;
  A kept[kCount] = {};

  __device__ __forceinline__ A weight(A logit) const {
    return exp(logit - largest) * scale;
  }
};

// Points that a lane of a group owns, if these are kept.
template <bool kUsual, int G>
constexpr int kKept = kUsual ? kUsualLevels * kUsualPoints / G : 1;

template <bool kUsual, int G, typename T, typename P>
__device__ __forceinline__ Softmax<Wide<T>, kKept<kUsual, G>> softmax(const Arguments<T, P>& a, const Slot<G>& slot) {
  using A = Wide<T>;
  const Counts<kUsual> counts(a.L, a.K);
  Softmax<A, kKept<kUsual, G>> result;
  if constexpr (kUsual) {
    const int64_t base = slot.active ? slot.index * kUsualLevels * kUsualPoints + slot.lane : 0;
#pragma unroll
    for (int i = 0; i < kKept<kUsual, G>; ++i) {
      result.kept[i] = widen(a.weights[base + i * G]);
    }
    A largest = result.kept[0];
#pragma unroll
    for (int i = 1; i < kKept<kUsual, G>; ++i) {
      largest = result.kept[i] > largest ? result.kept[i] : largest;
    }
    largest = group_max<G>(largest);
    A sum = 0;
#pragma unroll
    for (int i = 0; i < kKept<kUsual, G>; ++i) {
      result.kept[i] = exp(result.kept[i] - largest);
      sum += result.kept[i];
    }
    result.scale = A(1) / group_sum<G>(sum);
    return result;
  }
  const int count = slot.active ? counts.L * counts.K : 0;
  const int64_t base = slot.index * counts.L * counts.K;
  result.largest = -INFINITY;
  for (int i = slot.lane; i < count; i += G) {
    const A logit = A(widen(a.weights[base + i]));
    result.largest = logit > result.largest ? logit : result.largest;
  }
  result.largest = group_max<G>(result.largest);
  A sum = 0;
  for (int i = slot.lane; i < count; i += G) {
    sum += exp(A(widen(a.weights[base + i])) - result.largest);
  }
  result.scale = A(1) / group_sum<G>(sum);
  return result;
}

template <bool kFused, bool kUsual, int G, typename T, typename P>
__device__ __forceinline__ Owned<Wide<T>>
own(const Arguments<T, P>& a, const Slot<G>& slot, const Level* levels, const Softmax<Wide<T>, kKept<kUsual, G>>& soft,
    int i) {
  using A = Wide<T>;
  const Counts<kUsual> counts(a.L, a.K);
  Owned<A> owned;
  if (!slot.active || i >= counts.L * counts.K) {
    return owned;
  }
  const int l = i / counts.K;
  const int64_t element = slot.index * counts.L * counts.K + i;
  owned.level = levels[l];
  A xy[2];
  load<P, 2>(a.points + 2 * element, xy);
  A x = xy[0], y = xy[1];
  if constexpr (kUsual) {
    owned.weight = soft.kept[i / G] * soft.scale;
  } else {
    owned.weight = widen(a.weights[element]);
  }
  if constexpr (kFused && !kUsual) {
    owned.weight = soft.weight(owned.weight);
  }
  if constexpr (kFused) {
    const A* r = a.reference + (slot.row * counts.L + l) * a.reference_dims;
    owned.reference = a.reference_dims == 2 ? around_point(r[0], r[1], owned.level.height, owned.level.width)
                                            : inside_box(r[0], r[1], r[2], r[3], counts.K);
    owned.offset_x = x;
    owned.offset_y = y;
    x = owned.reference.x + x * owned.reference.step_x;
    y = owned.reference.y + y * owned.reference.step_y;
  }
  if (locate(x, y, owned.level.height, owned.level.width, owned.point)) {
    owned.point.cell += owned.level.start;
  } else {
    owned.point = {};
    owned.everywhere = outside(x, y);
  }
  return owned;
}

template <bool kUsual = false>
__device__ __forceinline__ const Level* shared_levels(const Map& a) {
  __shared__ Level levels[kInlineLevels];
  if (!kUsual && a.L > kInlineLevels) {
    return a.more_levels;
  }
  for (int l = threadIdx.x; l < a.L; l += blockDim.x) {
    levels[l] = a.levels[l];
  }
  __syncthreads();
  return levels;
}

// Number of the place where a point has corner 0. Points that touch a level of h x w cells have it in one of (h + 1) x (w +
// 1) places, the first row and column of which lie outside.
template <typename A>
__device__ __forceinline__ int place_of(const Owned<A>& owned) {
  const int width = owned.level.width;
  const int behind = owned.point.cell - owned.level.start + width + 1; // (row + 1) * width + column + 1
  const bool has_left = owned.point.has(0) || owned.point.has(2);
  return owned.level.first_place + behind + (behind - has_left) / width;
}

// One slot a group: a weighted sum of corners, written once.
template <bool kFused, bool kUsual, int G, int V, typename T, typename P>
__global__ void __launch_bounds__(kMostThreads, kResident<T>) forward_kernel(const __grid_constant__ Arguments<T, P> a) {
  using A = Wide<T>;
  const Counts<kUsual> counts(a.L, a.K);
  const Level* levels = shared_levels<kUsual>(a);
  const Slot<G> slot(a, levels);
  if (!__any_sync(kAllLanes, slot.active)) {
    return;
  }
  Softmax<A, kKept<kUsual, G>> soft;
  if constexpr (kFused) {
    soft = softmax<kUsual>(a, slot);
  }
  const int bytes = a.H * a.D * static_cast<int>(sizeof(T));

  for (int round = 0; round < a.D; round += G * V) {
    const int channel = round + slot.lane * V;
    const T* value = a.value + slot.first + channel;
    A sums[V] = {};
    A everywhere = 0;
#pragma unroll (kUsual ? 4 : 1)
    for (int batch = 0; batch < counts.L * counts.K; batch += G) {
      const Owned<A> mine = own<kFused, kUsual>(a, slot, levels, soft, batch + slot.lane);
      everywhere += mine.weight * mine.everywhere;
      A mine_share[4];
      corner_weights(mine.point, mine.weight, mine_share);
      const int mine_packed = mine.level.width << 4 | int(mine.point.corners);
#pragma unroll
      for (int j = 0; j < (G < 8 ? G : 8); ++j) {
#pragma unroll 1
        for (int k = j; k < G; k += 8) { // once, unless G is 32
          const int packed = __shfl_sync(kAllLanes, mine_packed, k, G);
          const int cell = __shfl_sync(kAllLanes, mine.point.cell, k, G);
          const int width = packed >> 4, corners = channel < a.D ? packed : 0;
          const int steps[4] = {0, 1, width, width + 1};
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const A share = __shfl_sync(kAllLanes, mine_share[c], k, G);
            if (corners >> c & 1) {
              A corner[V];
              load<T, V>(advance(value, cell + steps[c], bytes), corner);
#pragma unroll
              for (int v = 0; v < V; ++v) {
                sums[v] += share * corner[v];
              }
            }
          }
        }
      }
    }
    everywhere = group_sum<G>(everywhere);
    if (slot.active && channel < a.D) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        sums[v] += everywhere;
      }
      store<T, V>(a.output + slot.index * a.D + channel, sums);
    }
  }
}

// Of each lane's sums[j], adds up all lanes of the group and leaves the total of point j in sums[0] of lane j.
template <int G, int B, typename A>
__device__ __forceinline__ void reduce_scatter(A (&sums)[B], int lane) {
#pragma unroll
  for (int distance = G / 2; distance >= B; distance /= 2) {
#pragma unroll
    for (int j = 0; j < B; ++j) {
      sums[j] += __shfl_xor_sync(kAllLanes, sums[j], distance, G);
    }
  }
#pragma unroll
  for (int distance = B / 2; distance > 0; distance /= 2) {
    const bool upper = (lane & distance) != 0;
#pragma unroll
    for (int j = 0; j < distance; ++j) {
      const A keep = upper ? sums[j + distance] : sums[j], give = upper ? sums[j] : sums[j + distance];
      sums[j] = keep + __shfl_xor_sync(kAllLanes, give, distance, G);
    }
  }
}

// Gradients of the weights, wide, until those of the logits can be made of them; a lane reads what it has written itself.
// They stay in grad_weights if that is wide, else in shared memory, else (many points) in memory that the caller brings.
template <int B, typename T, typename P>
struct KeptGradients {
  using A = Wide<T>;
  const Arguments<T, P>& a;
  A* shared; // kThreads apart

  // i: number of the point in its slot; element: in the tensor.
  __device__ __forceinline__ void put(int64_t element, int i, A gradient) const {
    if constexpr (sizeof(P) == sizeof(A)) {
      a.grad_weights[element] = gradient;
    } else if (a.L * a.K <= kKeptBatches * B) {
      shared[i / B * kThreads + threadIdx.x] = gradient;
    } else {
      a.wide_grad_weights[element] = gradient;
    }
  }
  __device__ __forceinline__ A get(int64_t element, int i) const {
    if constexpr (sizeof(P) == sizeof(A)) {
      return a.grad_weights[element];
    } else if (a.L * a.K <= kKeptBatches * B) {
      return shared[i / B * kThreads + threadIdx.x];
    } else {
      return a.wide_grad_weights[element];
    }
  }
};

// One slot a group: adds to grad_value at the corners, or if it sorts writes down what gather_kernel needs to do so; writes
// the gradients of locations (offsets) and weights (logits).
template <bool kFused, bool kUsual, bool kSorts, int G, int V, typename T, typename P>
__global__ void __launch_bounds__(kThreads, kResident<T>) backward_kernel(const __grid_constant__ Arguments<T, P> a) {
  using A = Wide<T>;
  constexpr int B = kBatch<G>;
  const Counts<kUsual> counts(a.L, a.K);
  const Level* levels = shared_levels<kUsual>(a);
  const Slot<G> slot(a, levels);
  if (!__any_sync(kAllLanes, slot.active)) {
    return;
  }
  Softmax<A, kKept<kUsual, G>> soft;
  if constexpr (kFused) {
    soft = softmax<kUsual>(a, slot);
  }
  const int bytes = a.H * a.D * static_cast<int>(sizeof(T)), grad_bytes = a.H * a.D * static_cast<int>(sizeof(A));
  const int points = counts.L * counts.K;
  __shared__ A memory[kFused && sizeof(P) < sizeof(A) ? kKeptBatches * kThreads : 1];
  const KeptGradients<B, T, P> kept{a, memory};
  A mean = 0; // of the weights' gradients, under the softmax

#pragma unroll (kUsual ? 4 : 1)
  for (int batch = 0; batch < points; batch += B) {
    const int i = batch + slot.lane;
    const Owned<A> mine = own<kFused, kUsual>(a, slot, levels, soft, slot.lane < B ? i : points);
    const int mine_packed = mine.level.width << 4 | int(mine.point.corners);
    if constexpr (kSorts) {
      if (slot.active && slot.lane < B && i < points) {
        const int64_t element = slot.index * points + i;
        const int slice = blockIdx.x / a.tiles, slices = gridDim.x / a.tiles;
        a.point_places[element] = mine.point.corners ? slice * a.places + place_of(mine) : slices * a.places;
        A share[4];
        corner_weights(mine.point, mine.weight, share);
        store<A, 4>(a.shares + 4 * element, share);
      }
    }
    A sums_x[B] = {}, sums_y[B] = {}, sums_weight[B] = {};

    for (int round = 0; round < a.D; round += G * V) {
      const int channel = round + slot.lane * V;
      const bool busy = slot.active && channel < a.D;
      const T* value = a.value + slot.first + channel;
      A upstream[V] = {};
      if (busy) {
        load<T, V>(a.grad_output + slot.index * a.D + channel, upstream);
      }
#pragma unroll
      for (int j = 0; j < B; ++j) {
        const int packed = __shfl_sync(kAllLanes, mine_packed, j, G);
        const int cell = __shfl_sync(kAllLanes, mine.point.cell, j, G);
        const A weight = __shfl_sync(kAllLanes, mine.weight, j, G);
        Point<A, int> point{};
        point.fx = __shfl_sync(kAllLanes, mine.point.fx, j, G);
        point.fy = __shfl_sync(kAllLanes, mine.point.fy, j, G);
        const int width = packed >> 4, corners = busy ? packed : 0;
        Pack<T, V> loaded[4];
        load_corners<V>(value, cell, width, corners, bytes, loaded);
        if constexpr (!kSorts) {
          A share[4];
          corner_weights(point, weight, share);
          const int steps[4] = {0, 1, width, width + 1};
#pragma unroll
          for (int c = 0; c < 4; ++c) { // needs none of the loads, so it runs while they are under way
            if (corners >> c & 1) {
              A grad[V];
#pragma unroll
              for (int v = 0; v < V; ++v) {
                grad[v] = upstream[v] * share[c];
              }
              add<V>(advance(a.grad_value + slot.first + channel, cell + steps[c], grad_bytes), grad);
            }
          }
        }
        A dots[4] = {};
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (corners >> c & 1) {
#pragma unroll
            for (int v = 0; v < V; ++v) {
              dots[c] += upstream[v] * widen(loaded[c].lane[v]);
            }
          }
        }
        // With a weight and a size of one; the owner multiplies the sums with its own.
        const PointGradient<A> gradient = point_gradient(point, dots, A(1), 1, 1);
        sums_x[j] += gradient.x;
        sums_y[j] += gradient.y;
        sums_weight[j] += gradient.weight;
      }
    }

    reduce_scatter<G>(sums_x, slot.lane);
    reduce_scatter<G>(sums_y, slot.lane);
    reduce_scatter<G>(sums_weight, slot.lane);
    if (slot.active && slot.lane < B && i < points) {
      const int64_t element = slot.index * points + i;
      const A inside = mine.point.corners ? mine.weight : A(0); // outside, a weight that is not finite changes nothing
      A x = sums_x[0] * inside * A(mine.level.width) + mine.everywhere;
      A y = sums_y[0] * inside * A(mine.level.height) + mine.everywhere;
      const A weight = sums_weight[0] + mine.everywhere;
      if constexpr (kFused) {
        mean += mine.weight * weight;
        if (a.grad_reference != nullptr) {
          const int64_t r = (kSorts ? element : slot.row * counts.L + i / counts.K) * a.reference_dims;
          atomicAdd(a.grad_reference + r, x);
          atomicAdd(a.grad_reference + r + 1, y);
          if (a.reference_dims == 4) {
            const A half = box_step<A>(counts.K);
            atomicAdd(a.grad_reference + r + 2, x * mine.offset_x * half);
            atomicAdd(a.grad_reference + r + 3, y * mine.offset_y * half);
          }
        }
        x *= mine.reference.step_x;
        y *= mine.reference.step_y;
      }
      const A xy[2] = {x, y};
      store<P, 2>(a.grad_points + 2 * element, xy);
      if constexpr (kFused) {
        kept.put(element, i, weight);
      } else {
        narrow(weight, a.grad_weights[element]);
      }
    }
  }

  if constexpr (kFused) { // gradients of the weights become those of the logits; each lane reads what it has written
    mean = group_sum<G>(mean);
    if (slot.active && slot.lane < B) {
      for (int i = slot.lane; i < points; i += B) {
        const int64_t element = slot.index * points + i;
        const A weight = kUsual ? soft.kept[i / G] * soft.scale : soft.weight(widen(a.weights[element]));
        narrow(weight * (kept.get(element, i) - mean), a.grad_weights[element]);
      }
    }
  }
}

// One cell of an (image, head) a warp: the gradient of the value there, from the points that have a corner in it. Groups of
// G lanes take turns; what each point adds, and when, depends on nothing but `order`.
template <int G, int V, typename T>
__global__ void __launch_bounds__(kThreads) gather_kernel(const __grid_constant__ Gather<T> a) {
  using A = Wide<T>;
  constexpr int kGroups = kWarp / G, kTogether = G < 8 ? G : 8;
  const Level* levels = shared_levels(a);
  const int slice = blockIdx.x / a.blocks, lane = threadIdx.x % kWarp;
  const int cell = blockIdx.x % a.blocks * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (cell >= a.S) {
    return;
  }
  const Level level = level_of(levels, a.L, &Level::start, cell);
  const int y = (cell - level.start) / level.width, x = (cell - level.start) % level.width;
  // The cell is corner 3 of the points in the place above to the left, 2 of those above, 1 of those to the left, 0 of those
  // in its own.
  const int* above = a.starts + slice * a.places + level.first_place + y * (level.width + 1) + x;
  const int* below = above + level.width + 1;
  const int bytes = a.D * static_cast<int>(sizeof(T));
  const int first_above = above[0], second_above = above[1], count_above = above[2] - first_above;
  const int first_below = below[0], second_below = below[1], count = count_above + below[2] - first_below;

  for (int round = 0; round < a.D; round += G * V) {
    const int channel = round + lane % G * V;
    A sums[V] = {};
    for (int batch = 0; batch < count; batch += kWarp) {
      A mine_share = 0;
      int mine_slot = -1;
      if (const int i = batch + lane; i < count) {
        const bool is_above = i < count_above;
        const int place = is_above ? first_above + i : first_below + (i - count_above);
        const int corner = is_above ? (place < second_above ? 3 : 2) : (place < second_below ? 1 : 0);
        const int64_t point = a.order[place];
        mine_share = a.shares[4 * point + corner];
        mine_slot = static_cast<int>(static_cast<unsigned>(point) / static_cast<unsigned>(a.points));
      }
#pragma unroll 1
      for (int first = 0; first < G; first += kTogether) { // once, unless G is 32
        Pack<T, V> upstream[kTogether]; // all on their way before the first is waited for
        bool adds[kTogether];
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          const int slot = __shfl_sync(kAllLanes, mine_slot, (first + j) * kGroups + lane / G, kWarp);
          adds[j] = slot >= 0 && channel < a.D;
          if (adds[j]) {
            upstream[j] = *reinterpret_cast<const Pack<T, V>*>(advance(a.grad_output + channel, slot, bytes));
          }
        }
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          const A share = __shfl_sync(kAllLanes, mine_share, (first + j) * kGroups + lane / G, kWarp);
          if (adds[j]) {
#pragma unroll
            for (int v = 0; v < V; ++v) {
              sums[v] += share * widen(upstream[j].lane[v]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int distance = kWarp / 2; distance >= G; distance /= 2) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        sums[v] += __shfl_xor_sync(kAllLanes, sums[v], distance, kWarp);
      }
    }
    if (lane < G && channel < a.D) {
      const int64_t row = (int64_t(slice / a.H) * a.S + cell) * a.H + slice % a.H;
      store<T, V>(a.grad_value + row * a.D + channel, sums);
    }
  }
}

} // namespace
} // namespace dn_detr_d2
