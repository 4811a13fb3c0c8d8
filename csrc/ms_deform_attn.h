// The arithmetic of one sampling point, shared by the CPU and the CUDA kernels (docs/operator.md has the formulas).
//
// A level of h x w cells spans [0, 1] from edge to edge, so the column of x is x * w - 0.5. A point lies between four
// cells, the corners: 0 = (y0, x0), 1 = (y0, x0 + 1), 2 = (y0 + 1, x0), 3 = (y0 + 1, x0 + 1). A corner outside the
// level counts as zero.
//
// The namespace is unnamed on purpose: this file is compiled for several instruction sets into one library, and a linker
// that merged equal functions could give an old processor the new one's code.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define DN_DETR_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DN_DETR_HOST_DEVICE inline
#endif

namespace dn_detr_d2 {
namespace {

// Where a point falls in its level. Cells are counted in Index.
template <typename T, typename Index>
struct Point {
  Index cell;  // y0 * w + x0 within the level; negative where corner 0 lies above or left of it
  T fx, fy;  // position between the corners, in [0, 1)
  unsigned corners;  // bit i is set if corner i lies in the level

  DN_DETR_HOST_DEVICE bool has(int corner) const {
    return (corners >> corner) & 1u;
  }
};

constexpr unsigned kAllCorners = 15u;

// Fills in `point` and returns true if (x, y) touches the level at all; NaN does not.
template <typename T, typename Index>
DN_DETR_HOST_DEVICE bool locate(T x, T y, Index height, Index width, Point<T, Index>& point) {
  x = x * T(width) - T(0.5);
  y = y * T(height) - T(0.5);
  if (!(x > T(-1) && y > T(-1) && x < T(width) && y < T(height))) {
    return false;
  }
  // Levels have fewer than 2^31 rows and columns, so the casts are defined; they round towards zero.
  int32_t column = static_cast<int32_t>(x), row = static_cast<int32_t>(y);
  column -= x < T(column) ? 1 : 0;
  row -= y < T(row) ? 1 : 0;
  point.fx = x - T(column);
  point.fy = y - T(row);
  point.cell = Index(row) * width + Index(column);
  const unsigned columns = (column >= 0 ? 1u : 0u) | (Index(column) < width - 1 ? 2u : 0u);
  point.corners = (row >= 0 ? columns : 0u) | (Index(row) < height - 1 ? columns << 2 : 0u);
  return true;
}

// What a point that touches nothing adds to every channel: zero, or NaN if its location is infinite or NaN. A failure
// upstream must not look like a point outside the image.
template <typename T>
DN_DETR_HOST_DEVICE T outside(T x, T y) {
  return (x - x) + (y - y);
}

// Share of the four corners, times `scale`.
template <typename T, typename Index>
DN_DETR_HOST_DEVICE void corner_weights(const Point<T, Index>& point, T scale, T (&weights)[4]) {
  const T bottom = scale * point.fy, top = scale - bottom;
  weights[1] = top * point.fx;
  weights[0] = top - weights[1];
  weights[3] = bottom * point.fx;
  weights[2] = bottom - weights[3];
}

// Gradients of one point from the products of the output gradient with the four corners, 0 for corners outside.
template <typename T>
struct PointGradient {
  T x, y, weight;
};

template <typename T, typename Index>
DN_DETR_HOST_DEVICE PointGradient<T>
point_gradient(const Point<T, Index>& point, const T (&dots)[4], T weight, Index height, Index width) {
  const T along_top = dots[1] - dots[0], along_bottom = dots[3] - dots[2];
  const T top = dots[0] + point.fx * along_top, bottom = dots[2] + point.fx * along_bottom;
  return {
      weight * T(width) * (along_top + point.fy * (along_bottom - along_top)),
      weight * T(height) * (bottom - top),
      top + point.fy * (bottom - top)};
}

// Location = reference + offset * step: in cells of the level around a point, in half sizes / K inside a box.
template <typename T>
struct Reference {
  T x, y;
  T step_x, step_y;
};

// (x, y) is the point, or the centre of a box of the given size.
template <typename T, typename Index>
DN_DETR_HOST_DEVICE Reference<T> around_point(T x, T y, Index height, Index width) {
  return {x, y, T(1) / T(width > 0 ? width : 1), T(1) / T(height > 0 ? height : 1)}; // finite in an empty level
}

// An offset of K reaches from the centre of a box to its edge.
template <typename T, typename Index>
DN_DETR_HOST_DEVICE T box_step(Index points) {
  return points > 0 ? T(0.5) / T(points) : T(0);
}

template <typename T, typename Index>
DN_DETR_HOST_DEVICE Reference<T> inside_box(T x, T y, T box_width, T box_height, Index points) {
  const T half = box_step<T>(points);
  return {x, y, box_width * half, box_height * half};
}

} // namespace
} // namespace dn_detr_d2
