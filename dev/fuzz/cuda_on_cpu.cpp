// The CUDA kernels on the emulator, behind the CPU kernels' own description of a call.
#include "cuda_on_cpu.h"

#include "cuda_emulator.h"
// After the emulator, whose words it needs.
#include "../../csrc/cuda/kernels.cuh"
#include "../../csrc/cuda/launch.cuh"

#include <algorithm>

namespace dn_detr_d2 {
namespace {

// Memory of exactly this many elements, aligned as memory of PyTorch.
template <typename T>
std::unique_ptr<T, decltype(&std::free)> allocate(size_t count) {
  return {static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)), std::free};
}

// What the operator does with sort() and searchsorted().
template <typename T, typename P>
void sum_in_order(const CudaCall& call, const Arguments<T, P>& a, const Level* more_levels, size_t points) {
  const size_t places = size_t(call.N) * a.H * a.places;
  std::vector<int64_t> order(points);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(
      order.begin(), order.end(), [&](int64_t i, int64_t j) { return a.point_places[i] < a.point_places[j]; });
  std::vector<int> starts(places + 1), sorted(points);
  std::transform(order.begin(), order.end(), sorted.begin(), [&](int64_t i) { return a.point_places[i]; });
  for (size_t place = 0; place <= places; ++place) {
    starts[place] = std::lower_bound(sorted.begin(), sorted.end(), int(place)) - sorted.begin();
  }
  auto gather = make_gather(a);
  gather.more_levels = more_levels;
  gather.order = order.data();
  gather.starts = starts.data();
  gather.grad_value = static_cast<T*>(call.grad_value);
  const bool all_aligned = is_aligned(call.grad_output) && is_aligned(call.grad_value);
  with_geometry<T>(call.D, all_aligned, [&](auto lanes, auto channels) {
    emulator::launch(call.N * a.H * gather.blocks, kThreads, [&] { gather_kernel<lanes(), channels(), T>(gather); });
  });
}

template <typename T, typename P, bool kFused, int G, int V>
void run_geometry(const CudaCall& call, bool backward) {
  using A = Wide<T>;
  Arguments<T, P> a{};
  a.S = call.S, a.H = call.H, a.D = call.D, a.Q = call.Q, a.L = call.L, a.K = call.K;
  std::vector<Level> levels;
  int start = 0;
  for (int l = 0; l < a.L; ++l) {
    levels.push_back({int(call.shapes[2 * l]), int(call.shapes[2 * l + 1]), start, 0, 0});
    start += levels[l].height * levels[l].width;
  }
  a.places = static_cast<int>(count_places(levels.data(), a.L));
  std::copy_n(levels.begin(), std::min(a.L, kInlineLevels), a.levels);
  a.more_levels = levels.data();
  a.value = static_cast<const T*>(call.value);
  a.points = static_cast<const P*>(call.points);
  a.weights = static_cast<const P*>(call.weights);
  a.reference = static_cast<const A*>(call.reference);
  a.reference_dims = call.reference_dims;
  a.output = static_cast<T*>(call.output);
  a.grad_output = static_cast<const T*>(call.grad_output);
  a.grad_value = static_cast<A*>(call.grad_value);
  a.grad_weights = static_cast<P*>(call.grad_weights);
  a.grad_reference = static_cast<A*>(call.grad_reference);

  const size_t elements = size_t(call.N) * a.Q * a.H * a.L * a.K;
  const auto points = allocate<P>(2 * elements), grad_points = allocate<P>(2 * elements);
  const auto wide = allocate<A>(elements);
  if (call.copies_points && !is_aligned_for_pairs(call.points, sizeof(P))) {
    std::memcpy(points.get(), call.points, 2 * elements * sizeof(P));
    a.points = points.get();
  }
  a.grad_points = grad_points.get();
  const bool sorts = call.sorts && elements > 0 && call.S > 0 && call.D > 0;
  const auto point_places = allocate<int>(elements);
  const auto shares = allocate<A>(4 * elements);
  const size_t by_point = elements * call.reference_dims;
  const auto not_summed = allocate<A>(by_point);
  if (sorts) {
    a.point_places = point_places.get();
    a.shares = shares.get();
    std::fill_n(not_summed.get(), by_point, A(0));
    a.grad_reference = call.reference != nullptr ? not_summed.get() : nullptr;
  }
  a.wide_grad_weights = needs_memory<kFused, G, T, P>(a.L * a.K) ? wide.get() : nullptr;

  const unsigned threads = plan_blocks(a, G, backward), blocks = call.N * a.H * a.tiles;
  if (backward) {
    if (sorts) {
      emulator::launch(blocks, threads, [&] { backward_kernel<kFused, false, true, G, V, T, P>(a); });
    } else {
      with_counts<T, kFused, G>(a.L, a.K, [&](auto usual) {
        emulator::launch(blocks, threads, [&] { backward_kernel<kFused, usual(), false, G, V, T, P>(a); });
      });
    }
    if (elements > 0) {
      std::memcpy(call.grad_points, grad_points.get(), 2 * elements * sizeof(P));
    }
    if (sorts) {
      sum_in_order(call, a, levels.data(), elements);
    }
    if (sorts && call.reference != nullptr) { // over heads and points, as the operator does
      for (size_t i = 0; i < by_point; ++i) {
        const size_t dim = i % call.reference_dims, level = i / call.reference_dims / a.K % a.L;
        const size_t row = i / call.reference_dims / a.K / a.L / a.H;
        static_cast<A*>(call.grad_reference)[(row * a.L + level) * call.reference_dims + dim] += not_summed.get()[i];
      }
    }
  } else {
    with_counts<T, kFused, G>(a.L, a.K, [&](auto usual) {
      emulator::launch(blocks, threads, [&] { forward_kernel<kFused, usual(), G, V, T, P>(a); });
    });
  }
}

template <typename T, typename P>
void run_types(const CudaCall& call, bool backward) {
  const bool all_aligned = is_aligned(call.value) && (!backward || is_aligned(call.grad_output));
  const auto run = [&](auto lanes, auto channels) {
    call.reference != nullptr ? run_geometry<T, P, true, lanes(), channels()>(call, backward)
                              : run_geometry<T, P, false, lanes(), channels()>(call, backward);
  };
  backward ? with_geometry<Wide<T>>(call.D, all_aligned, run) : with_geometry<T>(call.D, all_aligned, run);
}

template <typename T>
void run_type(const CudaCall& call, bool backward) {
  call.narrow_points ? run_types<T, T>(call, backward) : run_types<T, Wide<T>>(call, backward);
}

} // namespace

void cuda_on_cpu(const CudaCall& call, int dtype, bool backward) {
  std::mt19937_64 shuffler(call.shuffle);
  emulator::shuffler = call.shuffle ? &shuffler : nullptr;
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
