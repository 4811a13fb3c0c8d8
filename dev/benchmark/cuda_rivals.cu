// What the CUDA kernels are measured against: the plain form of the operator, with one thread for one channel, and what the
// memory of the GPU can do at best. Compiled to a library with a C interface, without PyTorch; only float32.
#include <cuda_runtime.h>

#include "../../csrc/ms_deform_attn.h"

namespace {

constexpr int kThreads = 256;
constexpr int kMaxLevels = 8;

struct Call {
  int S, H, D, Q, L, K;
  int height[kMaxLevels], width[kMaxLevels];
};

using dn_detr_d2::Point;

__device__ bool read_point(const Call& c, const float* locations, int64_t element, int level, Point<float, int>& point) {
  return dn_detr_d2::locate(
      locations[2 * element], locations[2 * element + 1], c.height[level], c.width[level], point);
}

// One thread a channel of the output; every thread computes every coordinate.
__global__ void scalar_forward(
    Call c, int64_t count, const float* value, const float* locations, const float* weights, float* output) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) {
    return;
  }
  const int channel = i % c.D;
  const int64_t slot = i / c.D; // (image, query, head)
  const int head = slot % c.H;
  const int64_t image = slot / c.H / c.Q;
  const float* map = value + (image * c.S * c.H + head) * c.D + channel;
  const int64_t stride = int64_t(c.H) * c.D;
  float sum = 0;
  for (int l = 0; l < c.L; ++l) {
    for (int k = 0; k < c.K; ++k) {
      const int64_t element = (slot * c.L + l) * c.K + k;
      Point<float, int> point;
      if (!read_point(c, locations, element, l, point)) {
        continue;
      }
      float share[4];
      dn_detr_d2::corner_weights(point, weights[element], share);
      const int steps[4] = {0, 1, c.width[l], c.width[l] + 1};
      for (int j = 0; j < 4; ++j) {
        if (point.has(j)) {
          sum += share[j] * map[(point.cell + steps[j]) * stride];
        }
      }
    }
    map += int64_t(c.height[l]) * c.width[l] * stride;
  }
  output[i] = sum;
}

// One block a (image, query, head), one thread a channel; the first thread sums up the gradients of each point.
__global__ void scalar_backward(
    Call c, const float* grad_output, const float* value, const float* locations, const float* weights,
    float* grad_value, float* grad_locations, float* grad_weights) {
  extern __shared__ float parts[]; // three sums a channel
  const int64_t slot = blockIdx.x;
  const int channel = threadIdx.x;
  const int head = slot % c.H;
  const int64_t image = slot / c.H / c.Q;
  int64_t base = (image * c.S * c.H + head) * c.D + channel;
  const int64_t stride = int64_t(c.H) * c.D;
  const float upstream = grad_output[slot * c.D + channel];
  for (int l = 0; l < c.L; ++l) {
    for (int k = 0; k < c.K; ++k) {
      const int64_t element = (slot * c.L + l) * c.K + k;
      Point<float, int> point;
      dn_detr_d2::PointGradient<float> gradient{};
      if (read_point(c, locations, element, l, point)) {
        float share[4], dots[4] = {};
        dn_detr_d2::corner_weights(point, weights[element], share);
        const int steps[4] = {0, 1, c.width[l], c.width[l] + 1};
        for (int j = 0; j < 4; ++j) {
          if (point.has(j)) {
            const int64_t at = base + (point.cell + steps[j]) * stride;
            dots[j] = upstream * value[at];
            atomicAdd(grad_value + at, upstream * share[j]);
          }
        }
        gradient = dn_detr_d2::point_gradient(point, dots, weights[element], c.height[l], c.width[l]);
      }
      parts[3 * channel] = gradient.x, parts[3 * channel + 1] = gradient.y, parts[3 * channel + 2] = gradient.weight;
      __syncthreads();
      if (channel == 0) {
        float x = 0, y = 0, weight = 0;
        for (int i = 0; i < c.D; ++i) {
          x += parts[3 * i], y += parts[3 * i + 1], weight += parts[3 * i + 2];
        }
        grad_locations[2 * element] = x, grad_locations[2 * element + 1] = y, grad_weights[element] = weight;
      }
      __syncthreads();
    }
    base += int64_t(c.height[l]) * c.width[l] * stride;
  }
}

__global__ void copy_kernel(int64_t count, const float4* from, float4* to) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads) {
    to[i] = from[i];
  }
}

__device__ uint32_t scramble(uint32_t x) {
  x ^= x >> 16, x *= 0x7feb352du, x ^= x >> 15, x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// Eight lanes read 128 bytes of a random row, `reads` times; `rows` decides which cache they come from.
__global__ void gather_kernel(int rows, int reads, const float4* from, float4* to) {
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  float4 sum{};
  for (int i = 0; i < reads; ++i) {
    const uint32_t row = scramble(thread / 8 * 2654435761u + i) % rows;
    const float4 x = from[row * 8 + thread % 8];
    sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
  }
  to[thread] = sum;
}

// The same rows, added to: four reductions of one float, or one of four.
template <bool kVector>
__global__ void reduce_kernel(int rows, int adds, float4* to) {
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  for (int i = 0; i < adds; ++i) {
    const uint32_t row = scramble(thread / 8 * 2654435761u + i) % rows;
    float4* target = to + row * 8 + thread % 8;
#if __CUDA_ARCH__ >= 900
    if constexpr (kVector) {
      atomicAdd(target, make_float4(1, 1, 1, 1));
      continue;
    }
#endif
    float* p = reinterpret_cast<float*>(target);
    atomicAdd(p, 1.0f), atomicAdd(p + 1, 1.0f), atomicAdd(p + 2, 1.0f), atomicAdd(p + 3, 1.0f);
  }
}

Call make_call(const int* sizes, const int* shapes) {
  Call c{sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], {}, {}};
  for (int l = 0; l < c.L; ++l) {
    c.height[l] = shapes[2 * l], c.width[l] = shapes[2 * l + 1];
  }
  return c;
}

} // namespace

// sizes: N, S, H, D, Q, L, K; tensors contiguous; every function returns a cudaError_t.
extern "C" int forward(
    const int* sizes, const int* shapes, const float* value, const float* locations, const float* weights, float* output,
    cudaStream_t stream) {
  const Call c = make_call(sizes, shapes);
  const int64_t count = int64_t(sizes[0]) * c.Q * c.H * c.D;
  scalar_forward<<<(count + kThreads - 1) / kThreads, kThreads, 0, stream>>>(c, count, value, locations, weights, output);
  return cudaGetLastError();
}

extern "C" int backward(
    const int* sizes, const int* shapes, const float* grad_output, const float* value, const float* locations,
    const float* weights, float* grad_value, float* grad_locations, float* grad_weights, cudaStream_t stream) {
  const Call c = make_call(sizes, shapes);
  scalar_backward<<<int64_t(sizes[0]) * c.Q * c.H, c.D, 3 * c.D * sizeof(float), stream>>>(
      c, grad_output, value, locations, weights, grad_value, grad_locations, grad_weights);
  return cudaGetLastError();
}

extern "C" int copy(int64_t float4s, const float4* from, float4* to, cudaStream_t stream) {
  copy_kernel<<<4096, kThreads, 0, stream>>>(float4s, from, to);
  return cudaGetLastError();
}

extern "C" int gather(int rows, int reads, int blocks, const float4* from, float4* to, cudaStream_t stream) {
  gather_kernel<<<blocks, kThreads, 0, stream>>>(rows, reads, from, to);
  return cudaGetLastError();
}

extern "C" int reduce(int vector, int rows, int adds, int blocks, float4* to, cudaStream_t stream) {
  if (vector) {
    reduce_kernel<true><<<blocks, kThreads, 0, stream>>>(rows, adds, to);
  } else {
    reduce_kernel<false><<<blocks, kThreads, 0, stream>>>(rows, adds, to);
  }
  return cudaGetLastError();
}
