// The CPU kernels, once for each instruction set. Each kernels_*.cpp sets the target and DN_DETR_VECTOR_BYTES, includes
// this file, and fills a table from it. Nothing here includes PyTorch.
//
// Channels are the vector dimension. C is their number if it is known to the compiler, so that sums stay in registers, or
// 0: then they stay in memory, and what is left behind the last whole vector is handled by padding.
#pragma once

#include "../ms_deform_attn.h"
#include "kernels.h"
#include "vectors.h"

namespace dn_detr_d2 {
namespace {

// Calls visit(vector index, first channel, channels) for all channels.
template <int C, typename A, typename Visit>
inline void for_each_vector(int64_t channels, Visit visit) {
  constexpr int64_t lanes = kLanes<A>;
  if constexpr (C > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < C / lanes; ++i) {
      visit(i, i * lanes, lanes);
    }
  } else {
    for (int64_t c = 0; c < channels; c += lanes) {
      visit(c / lanes, c, channels - c < lanes ? channels - c : lanes);
    }
  }
}

template <int C, typename T>
inline Vector<Wide<T>> load_at(const T* p, int64_t count) {
  if (C > 0 || count == kLanes<Wide<T>>) {
    return load(p);
  }
  return load_some(p, count);
}

template <int C, typename T>
inline void store_at(T* p, Vector<Wide<T>> v, int64_t count) {
  if (C > 0 || count == kLanes<Wide<T>>) {
    store(p, v);
  } else {
    store_some(p, v, count);
  }
}

template <typename A>
inline A largest(const A* x, int64_t count) {
  A result = x[0];
  for (int64_t i = 1; i < count; ++i) {
    result = x[i] > result ? x[i] : result;
  }
  return result;
}

// e^x for x <= 0. With x = n ln 2 + r, |r| <= ln 2 / 2, it is 2^n times the Taylor sum of e^r, whose first left-out term
// is below 2^-27; 2^n is made of exponent bits. Below -87 the result is 0; NaN stays NaN.
inline Vector<float> exponential(Vector<float> x) {
  constexpr float kRound = 12582912.0f; // 1.5 * 2^23: what is added to it is rounded to an integer
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const Bits32 vanishes = bit_cast<Bits32>(x < -87.0f);
  const Vector<float> shifted = x * kLog2E + kRound;
  const Vector<float> n = shifted - kRound;
  const Vector<float> r = (x - n * kLn2High) - n * kLn2Low;
  Vector<float> sum = r * (1.0f / 5040) + 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  const Bits32 power = (bit_cast<Bits32>(shifted) - 0x4b400000u + 127u) << 23;
  return bit_cast<Vector<float>>(bit_cast<Bits32>(sum * bit_cast<Vector<float>>(power)) & ~vanishes);
}
inline Vector<double> exponential(Vector<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) {
    x[i] = std::exp(x[i]);
  }
  return x;
}

// Softmax over one row of L * K logits. NaN anywhere makes the whole row NaN.
template <typename A>
void softmax_row(const A* logits, A* weights, int64_t count) {
  if (count == 0) {
    return;
  }
  const A top = largest(logits, count);
  A sum = 0;
  for_each_vector<0, A>(count, [&](int64_t, int64_t i, int64_t lanes) __attribute__((always_inline)) {
    store_at<0>(weights + i, exponential(load_at<0>(logits + i, lanes) - top), lanes);
  });
  for (int64_t i = 0; i < count; ++i) {
    sum += weights[i];
  }
  const A scale = A(1) / sum;
  for (int64_t i = 0; i < count; ++i) {
    weights[i] *= scale;
  }
}

template <typename A>
void softmax_rows(const Problem& p, void* weights, int64_t begin, int64_t end) {
  const int64_t count = p.L * p.K;
  for (int64_t row = begin; row < end; ++row) {
    softmax_row(static_cast<const A*>(p.logits) + row * count, static_cast<A*>(weights) + row * count, count);
  }
}

template <typename A>
void softmax_backward_rows(const Problem& p, int64_t begin, int64_t end) {
  const int64_t count = p.L * p.K;
  for (int64_t row = begin; row < end; ++row) {
    const A* weights = static_cast<const A*>(p.weights) + row * count;
    A* grad = static_cast<A*>(p.grad_weights) + row * count;
    A mean = 0;
    for (int64_t i = 0; i < count; ++i) {
      mean += weights[i] * grad[i];
    }
    for (int64_t i = 0; i < count; ++i) {
      grad[i] = weights[i] * (grad[i] - mean);
    }
  }
}

// Adds one level's points of one query and head to the sums; returns what points outside add to every channel.
template <int C, typename T>
inline Wide<T> sample_level(
    const T* level, int64_t stride, int64_t height, int64_t width, int64_t channels, int64_t points,
    const Wide<T>* locations, const Wide<T>* weights, Vector<Wide<T>>* sums) {
  using A = Wide<T>;
  A everywhere = 0;
  for (int64_t k = 0; k < points; ++k) {
    Point<A, int64_t> point;
    if (!locate(locations[2 * k], locations[2 * k + 1], height, width, point)) {
      everywhere += weights[k] * outside(locations[2 * k], locations[2 * k + 1]);
      continue;
    }
    if (point.corners == 0) { // an empty level has no address to count from
      everywhere += weights[k] * A(0); // NaN, if the weight is not finite
      continue;
    }
    A share[4];
    corner_weights(point, weights[k], share);
    const T* corner0 = level + point.cell * stride;
    const T* const corner[4] = {corner0, corner0 + stride, corner0 + width * stride, corner0 + (width + 1) * stride};
    if (point.corners == kAllCorners) {
      for_each_vector<C, A>(channels, [&](int64_t i, int64_t c, int64_t count) __attribute__((always_inline)) {
        sums[i] += load_at<C>(corner[0] + c, count) * share[0] + load_at<C>(corner[1] + c, count) * share[1] +
            load_at<C>(corner[2] + c, count) * share[2] + load_at<C>(corner[3] + c, count) * share[3];
      });
      continue;
    }
    for (int j = 0; j < 4; ++j) {
      if (point.has(j)) {
        for_each_vector<C, A>(channels, [&](int64_t i, int64_t c, int64_t count) __attribute__((always_inline)) {
          sums[i] += load_at<C>(corner[j] + c, count) * share[j];
        });
      }
    }
  }
  return everywhere;
}

// Locations of one query, head and level in the fused form.
template <typename A>
inline void offsets_to_locations(const Problem& p, const Reference<A>& reference, const A* offsets, A* locations) {
  for (int64_t k = 0; k < p.K; ++k) {
    locations[2 * k] = reference.x + offsets[2 * k] * reference.step_x;
    locations[2 * k + 1] = reference.y + offsets[2 * k + 1] * reference.step_y;
  }
}

template <typename A>
inline Reference<A> reference_of(const Problem& p, int64_t row, int64_t level) {
  const A* r = static_cast<const A*>(p.reference) + (row * p.L + level) * p.reference_dims;
  return p.reference_dims == 2 ? around_point(r[0], r[1], p.shapes[2 * level], p.shapes[2 * level + 1])
                               : inside_box(r[0], r[1], r[2], r[3], p.K);
}

template <int C, typename T>
void forward_rows(const Problem& p, int64_t begin, int64_t end, void* scratch) {
  using A = Wide<T>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t vectors = (p.D + lanes - 1) / lanes, points = p.L * p.K, stride = p.H * p.D;
  A* weights_scratch = static_cast<A*>(scratch);
  A* locations_scratch = weights_scratch + points;
  Vector<A>* sums_scratch = nullptr;
  Vector<A> sums_fixed[C > 0 ? C / lanes : 1];
  if constexpr (C == 0) { // aligned for whole vectors
    const uintptr_t free = reinterpret_cast<uintptr_t>(locations_scratch + 2 * p.K);
    sums_scratch = reinterpret_cast<Vector<A>*>((free + sizeof(Vector<A>) - 1) / sizeof(Vector<A>) * sizeof(Vector<A>));
  }
  Vector<A>* sums = C > 0 ? sums_fixed : sums_scratch;

  for (int64_t row = begin; row < end; ++row) {
    const T* image = static_cast<const T*>(p.value) + row / p.Q * p.S * stride;
    for (int64_t head = 0; head < p.H; ++head) {
      const int64_t slot = row * p.H + head;
      const A* weights = weights_scratch;
      if (p.fused) {
        softmax_row(static_cast<const A*>(p.logits) + slot * points, weights_scratch, points);
      } else {
        weights = static_cast<const A*>(p.weights) + slot * points;
      }
      for (int64_t i = 0; i < vectors; ++i) {
        sums[i] = Vector<A>{};
      }

      A everywhere = 0;
      const T* values = image + head * p.D;
      for (int64_t level = 0; level < p.L; ++level) {
        const int64_t height = p.shapes[2 * level], width = p.shapes[2 * level + 1];
        const int64_t first = (slot * p.L + level) * p.K;
        const A* locations = locations_scratch;
        if (p.fused) {
          const A* offsets = static_cast<const A*>(p.offsets) + 2 * first;
          offsets_to_locations(p, reference_of<A>(p, row, level), offsets, locations_scratch);
        } else {
          locations = static_cast<const A*>(p.locations) + 2 * first;
        }
        everywhere += sample_level<C>(
            values, stride, height, width, p.D, p.K, locations, weights + level * p.K, sums);
        values += height * width * stride;
      }

      T* output = static_cast<T*>(p.output) + slot * p.D;
      for_each_vector<C, A>(p.D, [&](int64_t i, int64_t c, int64_t count) __attribute__((always_inline)) {
        store_at<C>(output + c, sums[i] + everywhere, count);
      });
    }
  }
}

// One level's points of one query and head, backwards: adds to the level's value gradient, sets the gradients of
// locations and weights.
template <int C, typename V, typename T>
inline void sample_level_backward(
    const V* level, int64_t stride, Wide<T>* grad_level, int64_t grad_stride, const T* grad_output, int64_t height,
    int64_t width, int64_t channels, int64_t points, const Wide<T>* locations, const Wide<T>* weights,
    Wide<T>* grad_locations, Wide<T>* grad_weights) {
  using A = Wide<T>;
  for (int64_t k = 0; k < points; ++k) {
    Point<A, int64_t> point;
    if (!locate(locations[2 * k], locations[2 * k + 1], height, width, point)) {
      const A nothing = outside(locations[2 * k], locations[2 * k + 1]);
      grad_locations[2 * k] = grad_locations[2 * k + 1] = grad_weights[k] = nothing;
      continue;
    }
    A share[4];
    corner_weights(point, weights[k], share);
    const int64_t cells[4] = {point.cell, point.cell + 1, point.cell + width, point.cell + width + 1};
    Vector<A> products[4] = {};
    const auto visit_corner = [&](int j) __attribute__((always_inline)) {
      const V* values = level + cells[j] * stride;
      A* grads = grad_level + cells[j] * grad_stride;
      for_each_vector<C, A>(channels, [&](int64_t, int64_t c, int64_t count) __attribute__((always_inline)) {
        const Vector<A> upstream = load_at<C>(grad_output + c, count);
        products[j] += load_at<C>(values + c, count) * upstream;
        store_at<C>(grads + c, load_at<C>(grads + c, count) + upstream * share[j], count);
      });
    };
    if (point.corners == kAllCorners) {
      visit_corner(0);
      visit_corner(1);
      visit_corner(2);
      visit_corner(3);
    } else {
      for (int j = 0; j < 4; ++j) {
        if (point.has(j)) {
          visit_corner(j);
        }
      }
    }
    const A dots[4] = {
        sum_lanes<A>(products[0]), sum_lanes<A>(products[1]), sum_lanes<A>(products[2]), sum_lanes<A>(products[3])};
    const PointGradient<A> gradient = point_gradient(point, dots, weights[k], height, width);
    grad_locations[2 * k] = gradient.x;
    grad_locations[2 * k + 1] = gradient.y;
    grad_weights[k] = gradient.weight;
  }
}

// All queries of one (image, head, level). `values` and `grads` point at the level's first cell of the head.
template <int C, typename V, typename T>
void backward_queries(
    const Problem& p, int64_t image, int64_t head, int64_t level, const V* values, int64_t stride, Wide<T>* grads,
    int64_t grad_stride, Wide<T>* scratch) {
  using A = Wide<T>;
  const int64_t height = p.shapes[2 * level], width = p.shapes[2 * level + 1];
  for (int64_t query = 0; query < p.Q; ++query) {
    const int64_t row = image * p.Q + query, slot = row * p.H + head, first = (slot * p.L + level) * p.K;
    const T* grad_output = static_cast<const T*>(p.grad_output) + slot * p.D;
    const A* locations = scratch;
    A* grad_locations = static_cast<A*>(p.grad_locations) + 2 * first;
    Reference<A> reference{};
    if (p.fused) {
      reference = reference_of<A>(p, row, level);
      offsets_to_locations(p, reference, static_cast<const A*>(p.offsets) + 2 * first, scratch);
    } else {
      locations = static_cast<const A*>(p.locations) + 2 * first;
    }
    sample_level_backward<C, V, T>(
        values, stride, grads, grad_stride, grad_output, height, width, p.D, p.K, locations,
        static_cast<const A*>(p.weights) + first, grad_locations, static_cast<A*>(p.grad_weights) + first);
    if (!p.fused) {
      continue;
    }
    A sums[4] = {};
    const A* offsets = static_cast<const A*>(p.offsets) + 2 * first;
    for (int64_t k = 0; k < p.K; ++k) {
      sums[0] += grad_locations[2 * k];
      sums[1] += grad_locations[2 * k + 1];
      sums[2] += grad_locations[2 * k] * offsets[2 * k];
      sums[3] += grad_locations[2 * k + 1] * offsets[2 * k + 1];
      grad_locations[2 * k] *= reference.step_x; // from here on the gradient of the offset
      grad_locations[2 * k + 1] *= reference.step_y;
    }
    if (p.grad_reference) {
      const A half = box_step<A>(p.K);
      A* grad_reference = static_cast<A*>(p.grad_reference) + (slot * p.L + level) * p.reference_dims;
      for (int i = 0; i < p.reference_dims; ++i) {
        grad_reference[i] = i < 2 ? sums[i] : sums[i] * half;
      }
    }
  }
}

// The value gradient of a slice grows in the result itself if that is wide and few of its cells are touched, else in
// scratch, which lies together in memory and may be wider than the result. There the values are copied to as well if
// most cells are read more than once.
template <int C, typename T>
void backward_slice(const Problem& p, int64_t image, int64_t head, int64_t level, Wide<T>* scratch) {
  using A = Wide<T>;
  int64_t start = 0;
  for (int64_t i = 0; i < level; ++i) {
    start += p.shapes[2 * i] * p.shapes[2 * i + 1];
  }
  const int64_t cells = p.shapes[2 * level] * p.shapes[2 * level + 1], stride = p.H * p.D;
  const int64_t offset = ((image * p.S + start) * p.H + head) * p.D;
  const T* values = static_cast<const T*>(p.value) + offset;
  T* grads = static_cast<T*>(p.grad_value) + offset;
  const bool crowded = is_crowded(p, level);

  A* location_scratch = scratch;
  A* grad_scratch = scratch + 2 * p.K;
  if constexpr (sizeof(T) == sizeof(A)) {
    if (!crowded) {
      backward_queries<C, T, T>(p, image, head, level, values, stride, grads, stride, location_scratch);
      return;
    }
  }
  std::memset(grad_scratch, 0, cells * p.D * sizeof(A));
  if (crowded) {
    A* packed = grad_scratch + cells * p.D;
    for (int64_t cell = 0; cell < cells; ++cell) {
      for_each_vector<C, A>(p.D, [&](int64_t, int64_t c, int64_t count) __attribute__((always_inline)) {
        store_at<C>(packed + cell * p.D + c, load_at<C>(values + cell * stride + c, count), count);
      });
    }
    backward_queries<C, A, T>(p, image, head, level, packed, p.D, grad_scratch, p.D, location_scratch);
  } else {
    backward_queries<C, T, T>(p, image, head, level, values, stride, grad_scratch, p.D, location_scratch);
  }
  for (int64_t cell = 0; cell < cells; ++cell) {
    for_each_vector<C, A>(p.D, [&](int64_t, int64_t c, int64_t count) __attribute__((always_inline)) {
      store_at<C>(grads + cell * stride + c, load_at<C>(grad_scratch + cell * p.D + c, count), count);
    });
  }
}

template <typename T>
void forward(const Problem& p, int64_t begin, int64_t end, void* scratch) {
  switch (p.D) {
    case 16:
      return forward_rows<16, T>(p, begin, end, scratch);
    case 32:
      return forward_rows<32, T>(p, begin, end, scratch);
    default:
      return forward_rows<0, T>(p, begin, end, scratch);
  }
}

template <typename T>
void backward(const Problem& p, int64_t begin, int64_t end, void* scratch) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / (p.H * p.L), head = task / p.L % p.H, level = task % p.L;
    switch (p.D) {
      case 16:
        backward_slice<16, T>(p, image, head, level, static_cast<Wide<T>*>(scratch));
        break;
      case 32:
        backward_slice<32, T>(p, image, head, level, static_cast<Wide<T>*>(scratch));
        break;
      default:
        backward_slice<0, T>(p, image, head, level, static_cast<Wide<T>*>(scratch));
    }
  }
}

constexpr Kernels make_kernels() {
  return {
      {forward<double>, forward<float>, forward<BFloat16>, forward<Half>},
      {backward<double>, backward<float>, backward<BFloat16>, backward<Half>},
      {softmax_rows<double>, softmax_rows<float>, softmax_rows<float>, softmax_rows<float>},
      {softmax_backward_rows<double>, softmax_backward_rows<float>, softmax_backward_rows<float>,
       softmax_backward_rows<float>}};
}

} // namespace
} // namespace dn_detr_d2
