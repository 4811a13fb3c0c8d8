// What the operators accept. Both devices call these checks, so a violation reads the same on each.
#pragma once

#include <ATen/ATen.h>

#include <vector>

namespace dn_detr_d2 {

// Letters of docs/operator.md.
struct Sizes {
  int64_t N, S, H, D, Q, L, K;
};

// `locations` is (N, Q, H, L, K, 2) and called `locations_name` in messages, as `weights` (N, Q, H, L, K) is.
inline Sizes check_inputs(
    const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& locations, const char* locations_name,
    const at::Tensor& weights, const char* weights_name) {
  const auto check_tensor = [&](const at::Tensor& tensor, const char* name) {
    const auto dtype = tensor.scalar_type();
    TORCH_CHECK(
        dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16, name,
        " must be float64, float32, float16 or bfloat16, got ", dtype);
    TORCH_CHECK(tensor.layout() == at::kStrided, name, " must be dense, got layout ", tensor.layout());
    TORCH_CHECK(
        tensor.device() == value.device(), name, " must be on the device of value, ", value.device(), ", got ",
        tensor.device());
  };
  check_tensor(value, "value");
  check_tensor(locations, locations_name);
  check_tensor(weights, weights_name);

  TORCH_CHECK(value.dim() == 4, "value must be (N, S, H, D), got ", value.sizes());
  TORCH_CHECK(
      locations.dim() == 6 && locations.size(5) == 2, locations_name, " must be (N, Q, H, L, K, 2), got ",
      locations.sizes());
  TORCH_CHECK(
      weights.sizes() == locations.sizes().slice(0, 5), weights_name, " must be (N, Q, H, L, K) = ",
      locations.sizes().slice(0, 5), " like ", locations_name, ", got ", weights.sizes());
  const Sizes sizes{value.size(0), value.size(1),     value.size(2),    value.size(3),
                    locations.size(1), locations.size(3), locations.size(4)};
  TORCH_CHECK(
      locations.size(0) == sizes.N, locations_name, " has N = ", locations.size(0), ", but value has N = ", sizes.N);
  TORCH_CHECK(
      locations.size(2) == sizes.H, locations_name, " has H = ", locations.size(2), ", but value has H = ", sizes.H);

  TORCH_CHECK(
      static_cast<int64_t>(spatial_shapes.size()) == 2 * sizes.L, "spatial_shapes must hold (h, w) of L = ", sizes.L,
      " levels of ", locations_name, ", got ", spatial_shapes);
  int64_t cells = 0;
  for (const auto size : spatial_shapes) {
    TORCH_CHECK(
        size >= 0 && size < (int64_t(1) << 31), "spatial_shapes must be in [0, 2^31), got ", spatial_shapes);
  }
  for (int64_t level = 0; level < sizes.L; ++level) {
    cells += spatial_shapes[2 * level] * spatial_shapes[2 * level + 1];
    TORCH_CHECK(
        cells <= sizes.S, "spatial_shapes ", spatial_shapes, " hold more cells than value has, S = ", sizes.S);
  }
  TORCH_CHECK(
      cells == sizes.S, "spatial_shapes ", spatial_shapes, " hold ", cells, " cells, but value has S = ", sizes.S);
  return sizes;
}

inline void check_grad_output(const at::Tensor& grad_output, const at::Tensor& value, const Sizes& sizes) {
  TORCH_CHECK(
      grad_output.sizes() == at::IntArrayRef({sizes.N, sizes.Q, sizes.H * sizes.D}),
      "grad_output must be (N, Q, H * D) = (", sizes.N, ", ", sizes.Q, ", ", sizes.H * sizes.D, "), got ",
      grad_output.sizes());
  TORCH_CHECK(
      grad_output.scalar_type() == value.scalar_type(), "grad_output must have the dtype of value, ",
      value.scalar_type(), ", got ", grad_output.scalar_type());
  TORCH_CHECK(
      grad_output.device() == value.device(), "grad_output must be on the device of value, ", value.device(),
      ", got ", grad_output.device());
}

inline void check_reference(const at::Tensor& reference, const at::Tensor& value, const Sizes& sizes) {
  TORCH_CHECK(
      reference.dim() == 4 && (reference.size(3) == 2 || reference.size(3) == 4),
      "reference must be (N, Q, L, 2) points or (N, Q, L, 4) boxes, got ", reference.sizes());
  TORCH_CHECK(
      reference.size(0) == sizes.N && reference.size(1) == sizes.Q && reference.size(2) == sizes.L,
      "reference must have N = ", sizes.N, ", Q = ", sizes.Q, ", L = ", sizes.L, ", got ", reference.sizes());
  TORCH_CHECK(
      at::isFloatingType(reference.scalar_type()) && reference.layout() == at::kStrided,
      "reference must be a dense floating-point tensor, got ", reference.scalar_type(), ", ", reference.layout());
  TORCH_CHECK(
      reference.device() == value.device(), "reference must be on the device of value, ", value.device(), ", got ",
      reference.device());
}

} // namespace dn_detr_d2
