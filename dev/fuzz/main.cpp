// Random calls of the kernels, compared with slow loops in double; built with sanitizers by dev/fuzz_ms_deform_attn.py.
//
//   fuzz SEED FIRST COUNT CUDA_EVERY [PLANT]
//
// Case i of a seed is always the same call: FIRST = i, COUNT = 1 repeats it. Every CUDA_EVERY-th case (0: none) also runs
// the CUDA kernels on the emulator. PLANT makes a known mistake, to show that this program finds it: "shapes" tells the
// kernels of one more row than there is, "formula" breaks the reference, "alignment" loads points in pairs from wherever
// they lie, "order" expects equal bits of atomic additions.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "cuda_on_cpu.h"

using dn_detr_d2::CudaCall;
using dn_detr_d2::Dtype;
using dn_detr_d2::Kernels;
using dn_detr_d2::Problem;

namespace {

using Numbers = std::vector<double>;

// An array of one dtype in memory that ends where it ends; like those of PyTorch, null if it is empty. One that is late
// starts one element after the memory, as a view may.
class Array {
 public:
  Array(Dtype dtype, size_t size, bool late = false)
      : dtype_(dtype), size_(size), start_(late ? width() : 0),
        bytes_(size ? new char[start_ + size * width()] : nullptr) {
    std::fill_n(bytes_.get(), size ? start_ + size * width() : 0, char(0x7b)); // what is not written shows
  }
  Array(Dtype dtype, const Numbers& numbers, bool late = false) : Array(dtype, numbers.size(), late) {
    for (size_t i = 0; i < size_; ++i) {
      set(i, numbers[i]);
    }
  }

  void* data() {
    return size_ ? bytes_.get() + start_ : nullptr;
  }
  void zero() {
    if (size_) {
      std::fill_n(bytes_.get() + start_, size_ * width(), char(0));
    }
  }

  double get(size_t i) const {
    const char* p = bytes_.get() + start_ + i * width();
    switch (dtype_) {
      case Dtype::kDouble:
        return as<double>(p);
      case Dtype::kFloat:
        return as<float>(p);
      case Dtype::kBFloat16: {
        const uint32_t bits = uint32_t(as<uint16_t>(p)) << 16;
        return as<float>(reinterpret_cast<const char*>(&bits));
      }
      default: {
        const uint16_t bits = as<uint16_t>(p);
        const int exponent = bits >> 10 & 31, fraction = bits & 1023;
        const double sign = bits >> 15 ? -1 : 1;
        if (exponent == 31) {
          return fraction ? NAN : sign * INFINITY;
        }
        return sign * (exponent ? std::ldexp(1024.0 + fraction, exponent - 25) : std::ldexp(fraction, -24));
      }
    }
  }

  // Cuts off what a 16-bit type cannot hold: inputs need not be rounded well.
  void set(size_t i, double x) {
    char* p = bytes_.get() + start_ + i * width();
    const float f = static_cast<float>(x);
    switch (dtype_) {
      case Dtype::kDouble:
        std::memcpy(p, &x, 8);
        return;
      case Dtype::kFloat:
        std::memcpy(p, &f, 4);
        return;
      case Dtype::kBFloat16: {
        std::memcpy(p, reinterpret_cast<const char*>(&f) + 2, 2);
        return;
      }
      default: {
        int exponent;
        const double fraction = std::frexp(std::fabs(x), &exponent); // [0.5, 1) * 2^exponent
        uint16_t bits = 0;
        if (!std::isfinite(x) || exponent > 16) {
          bits = std::isnan(x) ? 0x7e00 : 0x7c00;
        } else if (x != 0 && exponent > -13) {
          bits = uint16_t((exponent + 14) << 10 | (int(std::ldexp(fraction, 11)) - 1024));
        }
        bits = uint16_t(bits | (std::signbit(x) ? 0x8000 : 0));
        std::memcpy(p, &bits, 2);
      }
    }
  }

  Numbers numbers() const {
    Numbers result(size_);
    for (size_t i = 0; i < size_; ++i) {
      result[i] = get(i);
    }
    return result;
  }

 private:
  template <typename T>
  static T as(const char* p) {
    T x;
    std::memcpy(&x, p, sizeof(T));
    return x;
  }
  size_t width() const {
    return dtype_ == Dtype::kDouble ? 8 : dtype_ == Dtype::kFloat ? 4 : 2;
  }

  Dtype dtype_;
  size_t size_, start_;
  std::unique_ptr<char[]> bytes_;
};

struct Result {
  Numbers output, grad_value, grad_points, grad_weights, grad_reference;
};

struct Case {
  int64_t N, S, H, D, Q, L, K;
  std::vector<int64_t> shapes;
  Dtype dtype, wide;
  Dtype by_point; // of points and weights on CUDA: wide, or dtype
  bool late_value, late_points, late_weights, late_upstream; // one element after the start of their memory
  bool fused;
  int dims; // of the reference
  bool compares_gradients; // no point lies where the gradient jumps
  Numbers value, points, weights, reference, upstream;
};

int64_t pick(std::mt19937_64& random, std::initializer_list<int64_t> choices) {
  return choices.begin()[random() % choices.size()];
}

Case make_case(uint64_t seed, uint64_t number) {
  std::mt19937_64 random(seed * 0x9e3779b97f4a7c15u + number);
  std::normal_distribution<double> normal;
  const auto uniform = [&](double low, double high) {
    return low + (high - low) * double(random() >> 11) * 0x1p-53;
  };
  Case c;
  c.N = pick(random, {0, 1, 1, 1, 2, 3});
  c.H = pick(random, {0, 1, 1, 2, 2, 3, 4});
  c.D = pick(random, {0, 1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 24, 30, 32, 32, 32, 33, 48, 64, 71});
  c.L = pick(random, {0, 1, 1, 2, 2, 3, 4});
  c.K = pick(random, {0, 1, 2, 3, 4, 4, 5});
  if (random() % 8 == 0) {
    c.L = c.K = 4; // what the CUDA kernels have code of its own for
  }
  c.Q = pick(random, {0, 1, 1, 2, 3, 5, 7, 40});
  if (random() % 64 == 0) {
    c.L = 35; // more than the CUDA kernels take by value
  }
  const bool small = c.L > 4 || random() % 4 == 0;
  c.S = 0;
  for (int64_t l = 0; l < c.L; ++l) {
    for (int i = 0; i < 2; ++i) {
      c.shapes.push_back(random() % 32 == 0 ? 0 : 1 + int64_t(random() % (small ? 2 : 9)));
    }
    c.S += c.shapes[2 * l] * c.shapes[2 * l + 1];
  }
  if (random() % 8 == 0 && c.S <= 200) {
    c.Q = c.S; // as in an encoder; the CUDA kernels take tiles of queries then
    c.N = std::min<int64_t>(c.N, 2), c.H = std::min<int64_t>(c.H, 2), c.D = std::min<int64_t>(c.D, 33);
  }
  c.dtype = static_cast<Dtype>(random() % 4);
  c.wide = c.dtype == Dtype::kDouble ? Dtype::kDouble : Dtype::kFloat;
  c.fused = random() % 2;
  c.by_point = random() % 2 ? c.dtype : c.wide;
  c.late_value = random() % 8 == 0, c.late_points = random() % 2 == 0;
  c.late_weights = random() % 2 == 0, c.late_upstream = random() % 8 == 0;
  c.dims = random() % 2 ? 2 : 4;
  c.compares_gradients = random() % 8 != 0;

  const auto fill = [&](Numbers& numbers, int64_t size) {
    numbers.resize(size);
    for (double& x : numbers) {
      x = normal(random);
    }
  };
  fill(c.value, c.N * c.S * c.H * c.D);
  fill(c.upstream, c.N * c.Q * c.H * c.D);
  fill(c.weights, c.N * c.Q * c.H * c.L * c.K);
  c.reference.resize(c.N * c.Q * c.L * c.dims);
  for (double& x : c.reference) {
    x = double(float(uniform(0.1, 0.9)));
  }
  c.points.resize(2 * c.weights.size());
  for (size_t i = 0; i < c.points.size(); ++i) {
    const int64_t level = i / (2 * c.K) % c.L;
    const int64_t size = std::max<int64_t>(1, c.shapes[2 * level + (i % 2 ? 0 : 1)]);
    double x = uniform(-1, 2);
    if (c.compares_gradients) { // a hundredth of a cell away from the next jump
      const double cell = x * double(size) - 0.5, low = std::floor(cell);
      x = (low + std::clamp(cell - low, 0.01, 0.99) + 0.5) / double(size);
    } else if (random() % 4 == 0) {
      const double odd[] = {0,          1,     0.5 / double(size), -0.5 / double(size), (double(size) + 0.5) / double(size), 1e30, -1e30,
                            INFINITY, -INFINITY, NAN,                3e38,                -3e38};
      x = odd[random() % 12];
    }
    if (c.fused) { // the offset that leads there
      const int64_t row = i / 2 / (c.K * c.L * c.H);
      const double* r = &c.reference[(row * c.L + level) * c.dims];
      const double step = c.dims == 2 ? 1.0 / double(size) : r[2 + i % 2] * 0.5 / double(c.K);
      x = (x - r[i % 2]) / step;
    }
    c.points[i] = c.wide == Dtype::kDouble ? x : double(float(x));
  }
  return c;
}

// The case as the CUDA kernels get it: points and weights rounded to by_point. Points that the rounding has brought to where
// the gradient jumps are moved on.
Case by_point(Case c) {
  if (c.by_point == c.wide) {
    return c;
  }
  const auto rounded = [&](double x) {
    return Array(c.dtype, Numbers{x}).get(0);
  };
  for (double& x : c.weights) {
    x = rounded(x);
  }
  for (size_t i = 0; i < c.points.size(); ++i) {
    const int64_t level = i / (2 * c.K) % c.L, row = i / 2 / (c.K * c.L * c.H);
    const double size = double(std::max<int64_t>(1, c.shapes[2 * level + (i % 2 ? 0 : 1)]));
    const auto near_jump = [&](double x) {
      if (c.fused) {
        const double* r = &c.reference[(row * c.L + level) * c.dims];
        x = r[i % 2] + x * (c.dims == 2 ? 1 / size : r[2 + i % 2] * 0.5 / double(c.K));
      }
      const double cell = x * size - 0.5;
      return std::fabs(cell - std::round(cell)) < 1e-3;
    };
    const double wanted = c.points[i];
    c.points[i] = rounded(wanted);
    for (int step = 1; c.compares_gradients && near_jump(c.points[i]); ++step) {
      c.points[i] = rounded(wanted + 0.013 * step);
    }
  }
  return c;
}

// The definition, term by term: hat functions around each cell.
Result expected(const Case& c, const Numbers& value, const Numbers& upstream, bool wrong) {
  Result r;
  r.output.assign(c.N * c.Q * c.H * c.D, 0);
  r.grad_value.assign(value.size(), 0);
  r.grad_points.assign(c.points.size(), 0);
  r.grad_weights.assign(c.weights.size(), 0);
  r.grad_reference.assign(c.reference.size(), 0);
  for (int64_t slot = 0; slot < c.N * c.Q * c.H; ++slot) {
    const int64_t row = slot / c.H, head = slot % c.H, image = row / c.Q, count = c.L * c.K;
    Numbers weights(c.weights.begin() + slot * count, c.weights.begin() + (slot + 1) * count);
    if (c.fused && count) {
      const double top = *std::max_element(weights.begin(), weights.end());
      double sum = 0;
      for (double& w : weights) {
        sum += w = std::exp(w - top);
      }
      for (double& w : weights) {
        w /= sum;
      }
    }
    double mean = 0;
    int64_t start = 0;
    for (int64_t l = 0; l < c.L; ++l) {
      const int64_t height = c.shapes[2 * l], width = c.shapes[2 * l + 1];
      for (int64_t k = 0; k < c.K; ++k) {
        const int64_t i = slot * count + l * c.K + k;
        double at[2], step[2] = {1, 1};
        for (int d = 0; d < 2; ++d) {
          at[d] = c.points[2 * i + d];
          if (c.fused) {
            const double* reference = &c.reference[(row * c.L + l) * c.dims];
            step[d] = c.dims == 2 ? 1.0 / double(std::max<int64_t>(1, d ? height : width)) : reference[2 + d] * 0.5 / double(c.K);
            at[d] = reference[d] + c.points[2 * i + d] * step[d];
          }
        }
        const double weight = weights[l * c.K + k], x = at[0] * double(width) - 0.5, y = at[1] * double(height) - 0.5;
        double grad_x = 0, grad_y = 0, grad_weight = 0;
        if (!std::isfinite(at[0]) || !std::isfinite(at[1])) {
          for (int64_t d = 0; d < c.D; ++d) {
            r.output[slot * c.D + d] = NAN;
          }
          grad_x = grad_y = grad_weight = NAN;
        }
        for (int64_t cy = 0; cy < height; ++cy) {
          for (int64_t cx = 0; cx < width; ++cx) {
            const double hat_x = 1 - std::fabs(x - double(cx)), hat_y = 1 - std::fabs(y - double(cy));
            if (!(hat_x > 0 && hat_y > 0)) {
              continue;
            }
            const double slope_x = x < double(cx) ? 1 : -1, slope_y = y < double(cy) ? 1 : -1;
            const int64_t first = ((image * c.S + start + cy * width + cx) * c.H + head) * c.D;
            double dot = 0;
            for (int64_t d = 0; d < c.D; ++d) {
              r.output[slot * c.D + d] += weight * hat_x * hat_y * value[first + d];
              r.grad_value[first + d] += weight * hat_x * hat_y * upstream[slot * c.D + d];
              dot += upstream[slot * c.D + d] * value[first + d];
            }
            grad_weight += hat_x * hat_y * dot;
            grad_x += weight * slope_x * hat_y * dot * double(width);
            grad_y += weight * hat_x * slope_y * dot * double(wrong ? width + 1 : height);
          }
        }
        mean += weight * grad_weight;
        r.grad_weights[i] = grad_weight;
        r.grad_points[2 * i] = grad_x * step[0];
        r.grad_points[2 * i + 1] = grad_y * step[1];
        double* grad_reference = c.fused ? &r.grad_reference[(row * c.L + l) * c.dims] : nullptr;
        if (grad_reference) {
          grad_reference[0] += grad_x;
          grad_reference[1] += grad_y;
        }
        if (grad_reference && c.dims == 4) {
          grad_reference[2] += grad_x * c.points[2 * i] * 0.5 / double(c.K);
          grad_reference[3] += grad_y * c.points[2 * i + 1] * 0.5 / double(c.K);
        }
      }
      start += height * width;
    }
    for (int64_t i = 0; c.fused && i < count; ++i) {
      r.grad_weights[slot * count + i] = weights[i] * (r.grad_weights[slot * count + i] - mean);
    }
  }
  return r;
}

// Inputs as arrays, and the outputs' places. Only the CUDA kernels take points of other types and places.
struct Buffers {
  explicit Buffers(const Case& c, bool cuda = false)
      : by_point(cuda ? c.by_point : c.wide), value(c.dtype, c.value, cuda && c.late_value),
        upstream(c.dtype, c.upstream, cuda && c.late_upstream), points(by_point, c.points, cuda && c.late_points),
        weights(by_point, c.weights, cuda && c.late_weights), reference(c.wide, c.reference),
        output(c.dtype, c.N * c.Q * c.H * c.D), grad_value(c.dtype, c.value.size()),
        grad_value_wide(c.wide, c.value.size()), grad_points(by_point, c.points.size()),
        grad_weights(by_point, c.weights.size()), grad_reference(c.wide, c.N * c.Q * c.H * c.L * c.dims),
        grad_reference_sum(c.wide, c.reference.size()), softmax(c.wide, c.weights.size()) {}
  Dtype by_point;
  Array value, upstream, points, weights, reference, output, grad_value, grad_value_wide, grad_points, grad_weights,
      grad_reference, grad_reference_sum, softmax;
};

Result run_cpu(const Case& c, const Kernels& kernels, const std::vector<int64_t>& shapes) {
  Buffers b(c);
  Problem p{};
  p.N = c.N, p.S = c.S, p.H = c.H, p.D = c.D, p.Q = c.Q, p.L = c.L, p.K = c.K;
  p.shapes = shapes.data();
  p.value = b.value.data();
  p.output = b.output.data();
  p.grad_output = b.upstream.data();
  p.grad_value = b.grad_value.data();
  p.grad_locations = b.grad_points.data();
  p.grad_weights = b.grad_weights.data();
  p.fused = c.fused;
  if (c.fused) {
    p.offsets = b.points.data();
    p.logits = b.weights.data();
    p.reference = b.reference.data();
    p.reference_dims = c.dims;
    p.grad_reference = b.grad_reference.data();
  } else {
    p.locations = b.points.data();
    p.weights = b.weights.data();
  }
  const int dtype = static_cast<int>(c.dtype);
  const auto scratch = [](int64_t bytes) {
    return std::unique_ptr<void, decltype(&std::free)>(std::aligned_alloc(64, (bytes + 63) / 64 * 64), std::free);
  };
  if (c.N * c.Q * c.H * c.D > 0) {
    const auto memory = scratch(forward_scratch(p, c.dtype));
    kernels.forward[dtype](p, 0, c.N * c.Q, memory.get());
  }
  if (c.fused) {
    p.weights = b.softmax.data();
    kernels.softmax[dtype](p, b.softmax.data(), 0, c.N * c.Q * c.H);
  }
  if (adds_in_place(p, c.dtype)) {
    b.grad_value.zero();
  }
  const auto memory = scratch(backward_scratch(p, c.dtype));
  kernels.backward[dtype](p, 0, c.N * c.H * c.L, memory.get());
  if (c.fused) {
    kernels.softmax_backward[dtype](p, 0, c.N * c.Q * c.H);
  }

  Result r{b.output.numbers(), b.grad_value.numbers(), b.grad_points.numbers(), b.grad_weights.numbers(), {}};
  r.grad_reference.assign(c.reference.size(), 0);
  for (size_t i = 0; c.fused && i < size_t(c.N * c.Q * c.H * c.L * c.dims); ++i) {
    const int64_t within = c.L * c.dims, row = int64_t(i) / within / c.H;
    r.grad_reference[row * within + int64_t(i) % within] += b.grad_reference.get(i);
  }
  return r;
}

// c: of by_point(); shuffle: as in CudaCall.
Result run_cuda(const Case& c, bool copies_points, bool sorts = false, uint64_t shuffle = 0) {
  Buffers b(c, true);
  const bool sums_in_order = sorts && !c.value.empty() && !c.weights.empty(); // else nothing is to be summed
  b.grad_value_wide.zero();
  b.grad_reference_sum.zero();
  CudaCall call{};
  call.N = int(c.N), call.S = int(c.S), call.H = int(c.H), call.D = int(c.D);
  call.Q = int(c.Q), call.L = int(c.L), call.K = int(c.K);
  call.shapes = c.shapes.data();
  call.value = b.value.data();
  call.points = b.points.data();
  call.weights = b.weights.data();
  call.reference = c.fused ? b.reference.data() : nullptr;
  call.reference_dims = c.dims;
  call.output = b.output.data();
  call.grad_output = b.upstream.data();
  call.grad_value = sums_in_order ? b.grad_value.data() : b.grad_value_wide.data();
  call.grad_points = b.grad_points.data();
  call.grad_weights = b.grad_weights.data();
  call.grad_reference = b.grad_reference_sum.data();
  call.narrow_points = c.by_point != c.wide;
  call.copies_points = copies_points;
  call.sorts = sorts;
  call.shuffle = shuffle;
  if (c.N * c.Q * c.H * c.D > 0) {
    cuda_on_cpu(call, static_cast<int>(c.dtype), false);
  }
  if (c.N * c.Q * c.H > 0) {
    cuda_on_cpu(call, static_cast<int>(c.dtype), true);
  }
  return {
      b.output.numbers(), (sums_in_order ? b.grad_value : b.grad_value_wide).numbers(), b.grad_points.numbers(),
      b.grad_weights.numbers(),
      c.fused ? b.grad_reference_sum.numbers() : Numbers(c.reference.size(), 0.0)};
}

// Largest excess of the difference over the tolerance, and where.
bool agree(const Numbers& ours, const Numbers& theirs, double relative, double absolute, const char* what) {
  for (size_t i = 0; i < theirs.size(); ++i) {
    const bool both_nan = std::isnan(ours[i]) && std::isnan(theirs[i]);
    const double most = absolute + relative * std::fabs(theirs[i]);
    if (!both_nan && ours[i] != theirs[i] && !(std::fabs(ours[i] - theirs[i]) <= most)) {
      std::printf("  %s[%zu] is %.9g, should be %.9g\n", what, i, ours[i], theirs[i]);
      return false;
    }
  }
  return true;
}

bool check(const Case& c, const Result& ours, const Result& theirs, bool cuda, bool sorted) {
  const double wide = c.wide == Dtype::kDouble ? 1e-9 : 2e-4;
  const double stored = c.dtype == Dtype::kBFloat16 ? 0x1p-8 : c.dtype == Dtype::kHalf ? 0x1p-11 : 0;
  bool good = agree(ours.output, theirs.output, wide + stored, wide, "output");
  if (c.compares_gradients) {
    const double value = cuda && !sorted ? wide : wide + stored;
    const double points = 10 * wide + (cuda && c.by_point != c.wide ? stored : 0);
    good = agree(ours.grad_value, theirs.grad_value, value, wide, "grad_value") && good;
    good = agree(ours.grad_points, theirs.grad_points, points, 10 * wide, "grad_points") && good;
    good = agree(ours.grad_weights, theirs.grad_weights, points, 10 * wide, "grad_weights") && good;
    good = agree(ours.grad_reference, theirs.grad_reference, 100 * wide, 100 * wide, "grad_reference") && good;
  }
  return good;
}

bool same_bits(const Result& a, const Result& b) {
  bool same = agree(a.grad_value, b.grad_value, 0, 0, "grad_value");
  same = agree(a.grad_points, b.grad_points, 0, 0, "grad_points") && same;
  same = agree(a.grad_weights, b.grad_weights, 0, 0, "grad_weights") && same;
  return agree(a.grad_reference, b.grad_reference, 0, 0, "grad_reference") && same;
}

} // namespace

int main(int count_arguments, char** arguments) {
  if (count_arguments < 5) {
    std::fprintf(stderr, "usage: fuzz SEED FIRST COUNT CUDA_EVERY [PLANT]\n");
    return 2;
  }
  const uint64_t seed = std::strtoull(arguments[1], nullptr, 10), first = std::strtoull(arguments[2], nullptr, 10);
  const uint64_t count = std::strtoull(arguments[3], nullptr, 10), every = std::strtoull(arguments[4], nullptr, 10);
  const std::string plant = count_arguments > 5 ? arguments[5] : "";

  std::vector<std::pair<const char*, const Kernels*>> all = {{"default", &dn_detr_d2::kDefaultKernels}};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    all.emplace_back("avx2", &dn_detr_d2::kAvx2Kernels);
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    all.emplace_back("avx512", &dn_detr_d2::kAvx512Kernels);
  }
#endif
  uint64_t mismatches = 0, cuda = 0;
  for (uint64_t number = first; number < first + count; ++number) {
    const Case c = make_case(seed, number);
    const auto define = [&](const Case& given) {
      const Numbers value = Array(c.dtype, c.value).numbers(), upstream = Array(c.dtype, c.upstream).numbers();
      return expected(given, value, upstream, plant == "formula");
    };
    const Result reference = define(c);
    const auto judge = [&](const char* name, bool good, bool on_cuda) {
      if (!good) {
        ++mismatches;
        std::printf(
            "MISMATCH seed %llu case %llu, %s: N %lld S %lld H %lld D %lld Q %lld L %lld K %lld dtype %d/%d %s R %d\n",
            (unsigned long long)seed, (unsigned long long)number, name, (long long)c.N, (long long)c.S, (long long)c.H,
            (long long)c.D, (long long)c.Q, (long long)c.L, (long long)c.K, int(c.dtype),
            int(on_cuda ? c.by_point : c.wide), c.fused ? "fused" : "plain", c.dims);
      }
    };
    std::vector<int64_t> shapes = c.shapes;
    if (plant == "shapes" && c.L > 0) {
      ++shapes[2 * c.L - 2];
    }
    for (const auto& [name, kernels] : all) {
      judge(name, check(c, run_cpu(c, *kernels, shapes), reference, false, false), false);
    }
    if (every > 0 && number % every == 0) {
      ++cuda;
      const Case given = by_point(c);
      const Result exact = define(given);
      judge("cuda", check(c, run_cuda(given, plant != "alignment"), exact, true, false), true);
      const Result once = run_cuda(given, true, plant != "order", 2 * number + 1);
      judge("cuda, sorted", check(c, once, exact, true, plant != "order"), true);
      judge("cuda, sorted again", same_bits(run_cuda(given, true, plant != "order", 2 * number + 2), once), true);
    }
  }
  std::printf(
      "%llu cases, %zu CPU instruction sets, %llu on the CUDA emulator: %llu mismatches\n", (unsigned long long)count,
      all.size(), (unsigned long long)cuda, (unsigned long long)mismatches);
  return mismatches ? 1 : 0;
}
