// The operators on CUDA: checks, allocation, launches. The kernels are in kernels.cuh.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "kernels.cuh"
#include "launch.cuh"

namespace dn_detr_d2 {
namespace {

// The five tensors of either form; in the plain form there is no reference.
struct Inputs {
  at::Tensor value, points, weights, reference;
  at::IntArrayRef spatial_shapes;
  Sizes sizes;
};

at::ScalarType wide_of(const at::Tensor& value) {
  return value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check_range(const Sizes& sizes, at::IntArrayRef spatial_shapes) {
  constexpr int64_t kMax = std::numeric_limits<int>::max();
  TORCH_CHECK(
      sizes.S <= kMax && sizes.H <= kMax && sizes.D <= kMax / 8 / std::max<int64_t>(1, sizes.H) && sizes.Q <= kMax / 2 &&
          sizes.L <= kMax / 4 / std::max<int64_t>(1, sizes.K) && sizes.K <= kMax / 4,
      "value or sampling_locations is too large for the CUDA kernel: S, 8 * H * D, 2 * Q and 4 * L * K must be below 2^31");
  for (const auto size : spatial_shapes) {
    TORCH_CHECK(
        size < (int64_t(1) << 27), "spatial_shapes must be below 2^27 for the CUDA kernel, got ", spatial_shapes);
  }
}

// The kernels read locations and weights in the type of the values if both have it, else in the wide one.
at::ScalarType points_dtype(const at::Tensor& value, const at::Tensor& points, const at::Tensor& weights) {
  const auto dtype = value.scalar_type();
  return points.scalar_type() == dtype && weights.scalar_type() == dtype ? dtype : wide_of(value);
}

// Contiguous in `dtype`, where the kernels can load two numbers at once: .contiguous() keeps a contiguous tensor that starts
// at an odd element of its storage, and a misaligned load ends the CUDA context of the process.
at::Tensor in_pairs(const at::Tensor& tensor, at::ScalarType dtype) {
  const auto result = tensor.to(dtype).contiguous();
  return is_aligned_for_pairs(result.const_data_ptr(), result.element_size()) ? result : result.clone();
}

Inputs make_inputs(
    const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& sampling_locations,
    const at::Tensor& attention_weights) {
  const Sizes sizes = check_inputs(
      value, spatial_shapes, sampling_locations, "sampling_locations", attention_weights, "attention_weights");
  check_range(sizes, spatial_shapes);
  const auto dtype = points_dtype(value, sampling_locations, attention_weights);
  return {
      value.contiguous(), in_pairs(sampling_locations, dtype), attention_weights.to(dtype).contiguous(), {},
      spatial_shapes, sizes};
}

Inputs make_fused_inputs(
    const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& reference,
    const at::Tensor& sampling_offsets, const at::Tensor& attention_logits) {
  const Sizes sizes = check_inputs(
      value, spatial_shapes, sampling_offsets, "sampling_offsets", attention_logits, "attention_logits");
  check_reference(reference, value, sizes);
  check_range(sizes, spatial_shapes);
  const auto dtype = points_dtype(value, sampling_offsets, attention_logits);
  return {
      value.contiguous(), in_pairs(sampling_offsets, dtype), attention_logits.to(dtype).contiguous(),
      reference.to(wide_of(value)).contiguous(), spatial_shapes, sizes};
}

bool aligned(const at::Tensor& tensor) {
  return is_aligned(tensor.const_data_ptr());
}

// Calls visit(T(), P()) with the types of value and of locations and weights, in CUDA's words.
template <typename Visit>
void with_types(const Inputs& in, Visit visit) {
  const bool same = in.points.scalar_type() == in.value.scalar_type();
  switch (in.value.scalar_type()) {
    case at::kDouble:
      return visit(double(), double());
    case at::kFloat:
      return visit(float(), float());
    case at::kBFloat16:
      return same ? visit(__nv_bfloat16(), __nv_bfloat16()) : visit(__nv_bfloat16(), float());
    default:
      return same ? visit(__half(), __half()) : visit(__half(), float());
  }
}

template <typename T, typename P>
Arguments<T, P> make_arguments(const Inputs& in, at::Tensor& more_levels) {
  Arguments<T, P> a{};
  a.S = in.sizes.S, a.H = in.sizes.H, a.D = in.sizes.D, a.Q = in.sizes.Q, a.L = in.sizes.L, a.K = in.sizes.K;
  a.value = static_cast<const T*>(in.value.const_data_ptr());
  a.points = static_cast<const P*>(in.points.const_data_ptr());
  a.weights = static_cast<const P*>(in.weights.const_data_ptr());
  if (in.reference.defined()) {
    a.reference = static_cast<const Wide<T>*>(in.reference.const_data_ptr());
    a.reference_dims = static_cast<int>(in.reference.size(3));
  }
  std::vector<Level> levels(in.sizes.L);
  int start = 0;
  for (int l = 0; l < a.L; ++l) {
    levels[l] = {static_cast<int>(in.spatial_shapes[2 * l]), static_cast<int>(in.spatial_shapes[2 * l + 1]), start, 0, 0};
    start += levels[l].height * levels[l].width;
  }
  a.places = static_cast<int>(count_places(levels.data(), a.L));
  if (a.L <= kInlineLevels) {
    std::copy(levels.begin(), levels.end(), a.levels);
  } else {
    more_levels = at::empty({a.L, static_cast<int64_t>(sizeof(Level) / sizeof(int))}, at::kInt);
    std::copy(levels.begin(), levels.end(), static_cast<Level*>(more_levels.mutable_data_ptr()));
    more_levels = more_levels.to(in.value.device());
    a.more_levels = static_cast<const Level*>(more_levels.const_data_ptr());
  }
  return a;
}

struct Grid {
  unsigned blocks;
  int threads;
};

// One slot for each group of lanes.
template <typename T, typename P>
Grid make_grid(Arguments<T, P>& a, const Sizes& sizes, int lanes, bool backward) {
  const int threads = plan_blocks(a, lanes, backward);
  const int64_t blocks = sizes.N * sizes.H * a.tiles;
  TORCH_CHECK(
      blocks <= std::numeric_limits<int>::max(), "value or sampling_locations is too large for the CUDA kernel: ", blocks,
      " blocks of queries");
  return {static_cast<unsigned>(blocks), threads};
}

template <bool kFused>
at::Tensor run_forward(const Inputs& in) {
  const c10::cuda::CUDAGuard guard(in.value.device());
  auto output = at::empty({in.sizes.N, in.sizes.Q, in.sizes.H * in.sizes.D}, in.value.options());
  if (output.numel() == 0) {
    return output;
  }
  with_types(in, [&](auto stored, auto by_point) {
    using T = decltype(stored);
    using P = decltype(by_point);
    at::Tensor more_levels;
    auto a = make_arguments<T, P>(in, more_levels);
    a.output = static_cast<T*>(output.mutable_data_ptr());
    with_geometry<T>(in.sizes.D, aligned(in.value), [&](auto lanes, auto channels) {
      constexpr int G = lanes(), V = channels();
      const auto grid = make_grid(a, in.sizes, G, false);
      with_counts<T, kFused, G>(a.L, a.K, [&](auto usual) {
        forward_kernel<kFused, usual(), G, V, T, P>
            <<<grid.blocks, grid.threads, 0, c10::cuda::getCurrentCUDAStream()>>>(a);
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      });
    });
  });
  return output;
}

struct Gradients {
  at::Tensor value, points, weights, reference;
};

// Numbers of the points and places of a call that sorts them must fit into an int.
void check_sortable(const Inputs& in) {
  std::vector<Level> levels;
  for (size_t i = 0; i < in.spatial_shapes.size(); i += 2) {
    levels.push_back({static_cast<int>(in.spatial_shapes[i]), static_cast<int>(in.spatial_shapes[i + 1]), 0, 0, 0});
  }
  const int64_t slices = in.sizes.N * in.sizes.H, places = count_places(levels.data(), static_cast<int>(levels.size()));
  constexpr int64_t kMax = std::numeric_limits<int>::max();
  TORCH_CHECK(
      in.weights.numel() < kMax && places < kMax / slices,
      "value or sampling_locations is too large for the deterministic backward pass on CUDA: N * Q * H * L * K and N * H * "
      "(sum over levels of (h + 1) * (w + 1)) must be below 2^31; smaller batches, or "
      "torch.use_deterministic_algorithms(False)");
}

// The gradient of the value, each cell summed up in the order of the points.
template <typename T, typename P>
void sum_in_order(const Arguments<T, P>& a, const Inputs& in, const at::Tensor& point_places, at::Tensor& grad_value) {
  const int64_t slices = in.sizes.N * in.sizes.H;
  const auto [sorted, order] = at::sort(point_places, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const auto starts = at::searchsorted(sorted, at::arange(slices * a.places + 1, sorted.options()), /*out_int32=*/true);
  auto gather = make_gather(a);
  gather.order = static_cast<const int64_t*>(order.const_data_ptr());
  gather.starts = static_cast<const int*>(starts.const_data_ptr());
  gather.grad_value = static_cast<T*>(grad_value.mutable_data_ptr());
  const int64_t blocks = slices * gather.blocks;
  TORCH_CHECK(
      blocks <= std::numeric_limits<int>::max(), "value is too large for the CUDA kernel: ", blocks, " blocks of cells");
  with_geometry<T>(in.sizes.D, is_aligned(a.grad_output) && aligned(grad_value), [&](auto lanes, auto channels) {
    gather_kernel<lanes(), channels(), T>
        <<<static_cast<unsigned>(blocks), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(gather);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

template <bool kFused, bool kSorts>
Gradients run_backward_as(const Inputs& in, const at::Tensor& grad_output, bool reference_requires_grad) {
  check_grad_output(grad_output, in.value, in.sizes);
  const c10::cuda::CUDAGuard guard(in.value.device());
  const auto upstream = grad_output.contiguous();
  const auto options = in.value.options().dtype(wide_of(in.value));
  Gradients grads;
  grads.value = kSorts ? at::empty(in.value.sizes(), in.value.options()) : at::zeros(in.value.sizes(), options);
  grads.points = at::empty(in.points.sizes(), in.points.options());
  grads.weights = at::empty(in.weights.sizes(), in.weights.options());
  at::Tensor point_places, shares;
  if (kSorts) {
    check_sortable(in);
    point_places = at::empty({in.weights.numel()}, options.dtype(at::kInt));
    shares = at::empty({in.weights.numel(), 4}, options);
  }
  if (kFused && reference_requires_grad) {
    auto sizes = kSorts ? in.points.sizes().vec() : in.reference.sizes().vec();
    sizes.back() = in.reference.size(3);
    grads.reference = at::zeros(sizes, options);
  }
  if (in.sizes.N * in.sizes.Q * in.sizes.H > 0) {
    with_types(in, [&](auto stored, auto by_point) {
      using T = decltype(stored);
      using P = decltype(by_point);
      using A = Wide<T>;
      at::Tensor more_levels;
      auto a = make_arguments<T, P>(in, more_levels);
      a.grad_output = static_cast<const T*>(upstream.const_data_ptr());
      if constexpr (kSorts) {
        a.point_places = static_cast<int*>(point_places.mutable_data_ptr());
        a.shares = static_cast<A*>(shares.mutable_data_ptr());
      } else {
        a.grad_value = static_cast<A*>(grads.value.mutable_data_ptr());
      }
      a.grad_points = static_cast<P*>(grads.points.mutable_data_ptr());
      a.grad_weights = static_cast<P*>(grads.weights.mutable_data_ptr());
      a.grad_reference = grads.reference.defined() ? static_cast<A*>(grads.reference.mutable_data_ptr()) : nullptr;
      with_geometry<A>(in.sizes.D, aligned(in.value) && aligned(upstream), [&](auto lanes, auto channels) {
        constexpr int G = lanes(), V = channels();
        const auto grid = make_grid(a, in.sizes, G, true);
        at::Tensor wide_grad_weights;
        if (needs_memory<kFused, G, T, P>(in.sizes.L * in.sizes.K)) {
          wide_grad_weights = at::empty(in.weights.sizes(), options);
          a.wide_grad_weights = static_cast<A*>(wide_grad_weights.mutable_data_ptr());
        }
        with_counts<T, kFused && !kSorts, G>(a.L, a.K, [&](auto usual) {
          backward_kernel<kFused, usual(), kSorts, G, V, T, P>
              <<<grid.blocks, grid.threads, 0, c10::cuda::getCurrentCUDAStream()>>>(a);
          C10_CUDA_KERNEL_LAUNCH_CHECK();
        });
      });
      if constexpr (kSorts) {
        sum_in_order(a, in, point_places, grads.value);
      }
    });
  }
  if (kSorts && grads.reference.defined()) {
    grads.reference = grads.reference.sum({2, 4});
  }
  return grads;
}

// Sums over queries are made by atomic additions, whose order changes from run to run, or else by sorting.
template <bool kFused>
Gradients run_backward(const Inputs& in, const at::Tensor& grad_output, bool reference_requires_grad) {
  const bool any = in.weights.numel() > 0 && in.value.numel() > 0;
  return any && at::globalContext().deterministicAlgorithms()
      ? run_backward_as<kFused, true>(in, grad_output, reference_requires_grad)
      : run_backward_as<kFused, false>(in, grad_output, reference_requires_grad);
}

at::Tensor forward(
    const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& sampling_locations,
    const at::Tensor& attention_weights) {
  return run_forward<false>(make_inputs(value, spatial_shapes, sampling_locations, attention_weights));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad_output, const at::Tensor& value, at::IntArrayRef spatial_shapes,
    const at::Tensor& sampling_locations, const at::Tensor& attention_weights) {
  const auto in = make_inputs(value, spatial_shapes, sampling_locations, attention_weights);
  auto grads = run_backward<false>(in, grad_output, false);
  return {
      grads.value.to(value.scalar_type()), grads.points.to(sampling_locations.scalar_type()),
      grads.weights.to(attention_weights.scalar_type())};
}

at::Tensor fused_forward(
    const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& reference,
    const at::Tensor& sampling_offsets, const at::Tensor& attention_logits) {
  return run_forward<true>(make_fused_inputs(value, spatial_shapes, reference, sampling_offsets, attention_logits));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> fused_backward(
    const at::Tensor& grad_output, const at::Tensor& value, at::IntArrayRef spatial_shapes,
    const at::Tensor& reference, const at::Tensor& sampling_offsets, const at::Tensor& attention_logits,
    bool reference_requires_grad) {
  const auto in = make_fused_inputs(value, spatial_shapes, reference, sampling_offsets, attention_logits);
  auto grads = run_backward<true>(in, grad_output, reference_requires_grad);
  auto grad_reference = reference_requires_grad ? grads.reference.to(reference.scalar_type())
                                                : at::empty({0}, reference.options());
  return {
      grads.value.to(value.scalar_type()), grad_reference, grads.points.to(sampling_offsets.scalar_type()),
      grads.weights.to(attention_logits.scalar_type())};
}

} // namespace

TORCH_LIBRARY_IMPL(dn_detr_d2, CUDA, library) {
  library.impl("ms_deform_attn", forward);
  library.impl("ms_deform_attn_backward", backward);
  library.impl("ms_deform_attn_fused", fused_forward);
  library.impl("ms_deform_attn_fused_backward", fused_backward);
}

} // namespace dn_detr_d2
