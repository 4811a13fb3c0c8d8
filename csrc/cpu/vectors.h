// Short vectors of the instruction set this file is compiled for, and loads and stores that convert to and from the
// stored types. Include only from kernels_*.cpp, which say how wide a vector is (DN_DETR_VECTOR_BYTES).
#pragma once

#include <cstring>

namespace dn_detr_d2 {
namespace {

// Stored 16-bit types, by their bits.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

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

template <typename T>
constexpr int kLanes = DN_DETR_VECTOR_BYTES / static_cast<int>(sizeof(T));

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(DN_DETR_VECTOR_BYTES)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
using Bits32 = Vector<uint32_t>;
typedef uint16_t Bits16 __attribute__((vector_size(DN_DETR_VECTOR_BYTES / 2)));

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename To>
inline To load_bits(const void* from) {
  To to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

// Loads kLanes values and widens them.
inline Vector<double> load(const double* p) {
  return load_bits<Vector<double>>(p);
}
inline Vector<float> load(const float* p) {
  return load_bits<Vector<float>>(p);
}
inline Vector<float> load(const BFloat16* p) {
  return bit_cast<Vector<float>>(__builtin_convertvector(load_bits<Bits16>(p), Bits32) << 16);
}
inline Vector<float> load(const Half* p) {
#if defined(DN_DETR_AVX512)
  return _mm512_maskz_cvtph_ps(0xffff, load_bits<__m256i>(p));
#elif defined(DN_DETR_AVX2)
  return _mm256_cvtph_ps(load_bits<__m128i>(p));
#else
  // Exponent and fraction move to their new place, and the exponent gets its new bias. Subnormals become the fraction of a
  // number in [1/2, 1), from which 1/2 is taken: a subnormal float32 on the way would be lost where these are flushed to 0.
  const Bits32 half = __builtin_convertvector(load_bits<Bits16>(p), Bits32);
  const Bits32 magnitude = half & 0x7fffu, sign = (half & 0x8000u) << 16;
  const Bits32 normal = (magnitude << 13) + 0x38000000u;
  const Bits32 subnormal = bit_cast<Bits32>((bit_cast<Vector<float>>(magnitude | 0x3f000000u) - 0.5f));
  const Bits32 scaled = bit_cast<Bits32>(magnitude < 0x0400u);
  const Bits32 special = bit_cast<Bits32>(magnitude >= 0x7c00u);
  const Bits32 finite = (scaled & subnormal) | (~scaled & normal);
  return bit_cast<Vector<float>>(((special & ((magnitude << 13) | 0x7f800000u)) | (~special & finite)) | sign);
#endif
}

// Rounds to nearest, ties to even.
inline void store(double* p, Vector<double> v) {
  std::memcpy(p, &v, sizeof(v));
}
inline void store(float* p, Vector<float> v) {
  std::memcpy(p, &v, sizeof(v));
}
inline void store(BFloat16* p, Vector<float> v) {
  const Bits32 bits = bit_cast<Bits32>(v);
  const Bits32 nan = bit_cast<Bits32>((bits & 0x7fffffffu) > 0x7f800000u);
  const Bits32 rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Bits16 result = __builtin_convertvector(((nan & 0x7fc00000u) | (~nan & rounded)) >> 16, Bits16);
  std::memcpy(p, &result, sizeof(result));
}
inline void store(Half* p, Vector<float> v) {
#if defined(DN_DETR_AVX512)
  const __m256i result = _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &result, sizeof(result));
#elif defined(DN_DETR_AVX2)
  const __m128i result = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &result, sizeof(result));
#else
  // A sum with a power of two rounds at the right bit: for normal results the power that lies 13 bits above the last
  // kept one, for subnormal results the constant one half.
  const Bits32 bits = bit_cast<Bits32>(v), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const Bits32 subnormal = bit_cast<Bits32>(magnitude < 0x38800000u); // below 2^-14
  const Bits32 overflow = bit_cast<Bits32>(magnitude >= 0x477ff000u); // 65520 and above round to infinity
  const Bits32 nan = bit_cast<Bits32>(magnitude > 0x7f800000u);
  const Bits32 normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Bits32 small = bit_cast<Bits32>(bit_cast<Vector<float>>(magnitude) + 0.5f) - 0x3f000000u;
  Bits32 half = (subnormal & small) | (~subnormal & normal);
  half = (overflow & 0x7c00u) | (~overflow & half);
  half = (nan & 0x7e00u) | (~nan & half);
  const Bits16 result = __builtin_convertvector(half | sign, Bits16);
  std::memcpy(p, &result, sizeof(result));
#endif
}

// The first `count` < kLanes values, zeros behind them.
template <typename T>
inline Vector<Wide<T>> load_some(const T* p, int64_t count) {
  T padded[kLanes<Wide<T>>] = {};
  std::memcpy(padded, p, count * sizeof(T));
  return load(padded);
}
template <typename T>
inline void store_some(T* p, Vector<Wide<T>> v, int64_t count) {
  T padded[kLanes<Wide<T>>];
  store(padded, v);
  std::memcpy(p, padded, count * sizeof(T));
}

template <typename T>
inline T sum_lanes(Vector<T> v) {
  T sum = 0;
  for (int i = 0; i < kLanes<T>; ++i) {
    sum += v[i];
  }
  return sum;
}

} // namespace
} // namespace dn_detr_d2
