// The operators on the CPU: checks, allocation, threads. The arithmetic is in kernels_body.h.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <tuple>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "../checks.h"
#include "kernels.h"

namespace dn_detr_d2 {
namespace {

bool has_f16c() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && ((c >> 29) & 1u) != 0;
#else
  return false;
#endif
}

// PyTorch has looked at the processor, and at ATEN_CPU_CAPABILITY.
const Kernels* best_kernels() {
#if defined(__x86_64__)
  const std::string capability = at::get_cpu_capability();
  if (has_f16c() && capability == "AVX512") {
    return &kAvx512Kernels;
  }
  if (has_f16c() && capability == "AVX2") {
    return &kAvx2Kernels;
  }
#endif
  return &kDefaultKernels;
}

std::atomic<const Kernels*> current_kernels{nullptr};

const Kernels& kernels() {
  const Kernels* chosen = current_kernels.load(std::memory_order_acquire);
  if (chosen == nullptr) {
    chosen = best_kernels();
    current_kernels.store(chosen, std::memory_order_release);
  }
  return *chosen;
}

// Name of the instruction set in use. Tests and benchmarks pass "default", "avx2", "avx512" or "best" to change it.
std::string cpu_capability(std::optional<c10::string_view> use) {
  if (use.has_value()) {
    const std::string name(use->data(), use->size());
    const Kernels* best = best_kernels();
    const Kernels* wanted = nullptr;
    if (name == "best") {
      wanted = best;
    } else if (name == "default") {
      wanted = &kDefaultKernels;
    }
#if defined(__x86_64__)
    if (name == "avx2" && best != &kDefaultKernels) {
      wanted = &kAvx2Kernels;
    } else if (name == "avx512" && best == &kAvx512Kernels) {
      wanted = &kAvx512Kernels;
    }
#endif
    TORCH_CHECK(
        wanted != nullptr, "cpu_capability must be best, default, avx2 or avx512, and this processor must have it; got ",
        name);
    current_kernels.store(wanted, std::memory_order_release);
  }
#if defined(__x86_64__)
  if (&kernels() == &kAvx512Kernels) {
    return "avx512";
  }
  if (&kernels() == &kAvx2Kernels) {
    return "avx2";
  }
#endif
  return "default";
}

Dtype dtype_of(const at::Tensor& value) {
  switch (value.scalar_type()) {
    case at::kDouble:
      return Dtype::kDouble;
    case at::kFloat:
      return Dtype::kFloat;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    default:
      return Dtype::kHalf;
  }
}

at::ScalarType wide_of(const at::Tensor& value) {
  return value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

Problem make_problem(const Sizes& sizes, at::IntArrayRef shapes, const at::Tensor& value) {
  Problem problem{};
  problem.N = sizes.N, problem.S = sizes.S, problem.H = sizes.H, problem.D = sizes.D;
  problem.Q = sizes.Q, problem.L = sizes.L, problem.K = sizes.K;
  problem.shapes = shapes.data();
  problem.value = value.const_data_ptr();
  return problem;
}

// Runs `kernel` over [0, tasks) on PyTorch's threads. `flops` of one task decide how many a thread takes at least.
template <typename Kernel>
void run(const Problem& problem, int64_t tasks, int64_t flops, int64_t scratch_bytes, Kernel kernel) {
  constexpr int64_t kFlopsPerThread = 1 << 16;
  constexpr int64_t kAlignment = 64;
  const int64_t grain = std::max<int64_t>(1, kFlopsPerThread / std::max<int64_t>(1, flops));
  at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char[]> scratch(new char[scratch_bytes + kAlignment]);
    const auto address = reinterpret_cast<uintptr_t>(scratch.get());
    kernel(problem, begin, end, scratch.get() + (kAlignment - address % kAlignment));
  });
}

at::Tensor run_forward(const Problem& filled, const at::Tensor& value) {
  Problem problem = filled;
  const Dtype dtype = dtype_of(value);
  auto output = at::empty({problem.N, problem.Q, problem.H * problem.D}, value.options());
  problem.output = output.mutable_data_ptr();
  if (output.numel() > 0) {
    run(problem, problem.N * problem.Q, 8 * problem.H * problem.L * problem.K * problem.D,
        forward_scratch(problem, dtype), kernels().forward[static_cast<int>(dtype)]);
  }
  return output;
}

at::Tensor run_backward(const Problem& filled, const at::Tensor& value) {
  Problem problem = filled;
  const Dtype dtype = dtype_of(value);
  auto grad_value = adds_in_place(problem, dtype) ? at::zeros_like(value) : at::empty_like(value);
  problem.grad_value = grad_value.mutable_data_ptr();
  run(problem, problem.N * problem.H * problem.L, 16 * problem.Q * problem.K * problem.D,
      backward_scratch(problem, dtype), kernels().backward[static_cast<int>(dtype)]);
  return grad_value;
}

at::Tensor forward(
    const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& sampling_locations,
    const at::Tensor& attention_weights) {
  const Sizes sizes = check_inputs(
      value, spatial_shapes, sampling_locations, "sampling_locations", attention_weights, "attention_weights");
  const auto values = value.contiguous();
  const auto locations = sampling_locations.to(wide_of(value)).contiguous();
  const auto weights = attention_weights.to(wide_of(value)).contiguous();
  Problem problem = make_problem(sizes, spatial_shapes, values);
  problem.locations = locations.const_data_ptr();
  problem.weights = weights.const_data_ptr();
  return run_forward(problem, values);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad_output, const at::Tensor& value, at::IntArrayRef spatial_shapes,
    const at::Tensor& sampling_locations, const at::Tensor& attention_weights) {
  const Sizes sizes = check_inputs(
      value, spatial_shapes, sampling_locations, "sampling_locations", attention_weights, "attention_weights");
  check_grad_output(grad_output, value, sizes);
  const auto values = value.contiguous(), upstream = grad_output.contiguous();
  const auto locations = sampling_locations.to(wide_of(value)).contiguous();
  const auto weights = attention_weights.to(wide_of(value)).contiguous();
  auto grad_locations = at::empty_like(locations), grad_weights = at::empty_like(weights);
  Problem problem = make_problem(sizes, spatial_shapes, values);
  problem.locations = locations.const_data_ptr();
  problem.weights = weights.const_data_ptr();
  problem.grad_output = upstream.const_data_ptr();
  problem.grad_locations = grad_locations.mutable_data_ptr();
  problem.grad_weights = grad_weights.mutable_data_ptr();
  auto grad_value = run_backward(problem, values);
  return {
      grad_value, grad_locations.to(sampling_locations.scalar_type()),
      grad_weights.to(attention_weights.scalar_type())};
}

at::Tensor fused_forward(
    const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& reference,
    const at::Tensor& sampling_offsets, const at::Tensor& attention_logits) {
  const Sizes sizes = check_inputs(
      value, spatial_shapes, sampling_offsets, "sampling_offsets", attention_logits, "attention_logits");
  check_reference(reference, value, sizes);
  const auto wide = wide_of(value);
  const auto values = value.contiguous(), references = reference.to(wide).contiguous();
  const auto offsets = sampling_offsets.to(wide).contiguous(), logits = attention_logits.to(wide).contiguous();
  Problem problem = make_problem(sizes, spatial_shapes, values);
  problem.fused = true;
  problem.reference = references.const_data_ptr();
  problem.reference_dims = static_cast<int>(reference.size(3));
  problem.offsets = offsets.const_data_ptr();
  problem.logits = logits.const_data_ptr();
  return run_forward(problem, values);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> fused_backward(
    const at::Tensor& grad_output, const at::Tensor& value, at::IntArrayRef spatial_shapes,
    const at::Tensor& reference, const at::Tensor& sampling_offsets, const at::Tensor& attention_logits,
    bool reference_requires_grad) {
  const Sizes sizes = check_inputs(
      value, spatial_shapes, sampling_offsets, "sampling_offsets", attention_logits, "attention_logits");
  check_reference(reference, value, sizes);
  check_grad_output(grad_output, value, sizes);
  const auto wide = wide_of(value);
  const auto values = value.contiguous(), references = reference.to(wide).contiguous();
  const auto offsets = sampling_offsets.to(wide).contiguous(), logits = attention_logits.to(wide).contiguous();
  const auto upstream = grad_output.contiguous();
  auto weights = at::empty_like(logits), grad_offsets = at::empty_like(offsets), grad_logits = at::empty_like(logits);
  at::Tensor grad_reference;

  Problem problem = make_problem(sizes, spatial_shapes, values);
  problem.fused = true;
  problem.reference = references.const_data_ptr();
  problem.reference_dims = static_cast<int>(reference.size(3));
  problem.offsets = offsets.const_data_ptr();
  problem.logits = logits.const_data_ptr();
  problem.weights = weights.const_data_ptr();
  problem.grad_output = upstream.const_data_ptr();
  problem.grad_locations = grad_offsets.mutable_data_ptr();
  problem.grad_weights = grad_logits.mutable_data_ptr();
  if (reference_requires_grad) {
    grad_reference = at::empty({sizes.N, sizes.Q, sizes.H, sizes.L, reference.size(3)}, references.options());
    problem.grad_reference = grad_reference.mutable_data_ptr();
  }

  const int index = static_cast<int>(dtype_of(value));
  const int64_t rows = sizes.N * sizes.Q * sizes.H, flops = 8 * sizes.L * sizes.K;
  run(problem, rows, flops, 0, [&](const Problem& p, int64_t begin, int64_t end, void*) {
    kernels().softmax[index](p, weights.mutable_data_ptr(), begin, end);
  });
  auto grad_value = run_backward(problem, values);
  run(problem, rows, flops, 0, [&](const Problem& p, int64_t begin, int64_t end, void*) {
    kernels().softmax_backward[index](p, begin, end);
  });
  return {
      grad_value,
      reference_requires_grad ? grad_reference.sum(2).to(reference.scalar_type()) : at::empty({0}, reference.options()),
      grad_offsets.to(sampling_offsets.scalar_type()), grad_logits.to(attention_logits.scalar_type())};
}

} // namespace

TORCH_LIBRARY_IMPL(dn_detr_d2, CPU, library) {
  library.impl("ms_deform_attn", forward);
  library.impl("ms_deform_attn_backward", backward);
  library.impl("ms_deform_attn_fused", fused_forward);
  library.impl("ms_deform_attn_fused_backward", fused_backward);
}

TORCH_LIBRARY_IMPL(dn_detr_d2, CatchAll, library) {
  library.impl("cpu_capability", cpu_capability);
}

} // namespace dn_detr_d2
