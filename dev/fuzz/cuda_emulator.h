// Runs CUDA kernels on a CPU, to test them where no GPU is: csrc/cuda/kernels.cuh compiles against this header instead of
// CUDA's. A block's threads are fibers on one CPU thread. A shuffle writes the lane's value, gives way once to all other
// fibers, and then reads the value of the source lane; it stops with a message if the lanes of a warp have not come to the
// same shuffle, which on a GPU would be undefined. Blocks run one after the other, so atomic additions are additions; in
// which order blocks and threads run can be shuffled, to show what depends on it.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct Dim3 {
  unsigned x = 0;
};
inline Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 * 1024;

// Where a fiber goes on. Sanitizers must see it change stacks, by swapcontext(); without them _longjmp() does, which saves
// two system calls.
struct Place {
  ucontext_t context; // of a start, and under sanitizers of every place
#ifndef DN_DETR_SANITIZED
  jmp_buf jump;
  bool started = false;
#endif

  void change_to(Place& other) {
#ifdef DN_DETR_SANITIZED
    swapcontext(&context, &other.context);
#else
    started = true;
    if (_setjmp(jump) == 0) {
      other.started ? _longjmp(other.jump, 1) : (void)setcontext(&other.context);
    }
#endif
  }
};

struct Fiber {
  Place place;
  bool finished = false;
  int meetings = 0; // shuffles and barriers it has come to
};

struct Block {
  std::vector<Fiber> fibers;
  Place scheduler;
  unsigned running = 0;
  std::function<void()> kernel;
  // What lanes hand over, by parity of the meeting, so that a fast lane does not overwrite what a slow one must read.
  std::vector<uint64_t> exchange[2];
};
inline Block* block = nullptr;
inline std::vector<std::unique_ptr<char[]>> stacks; // one a thread, used again by the next block
inline std::mt19937_64* shuffler = nullptr; // of blocks and threads; null: in the order of their numbers

inline std::vector<unsigned> order_of(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (shuffler != nullptr) {
    std::shuffle(order.begin(), order.end(), *shuffler);
  }
  return order;
}

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

inline void enter() {
  block->kernel();
  block->fibers[block->running].finished = true;
  block->fibers[block->running].place.change_to(block->scheduler);
}

// Lets all other fibers run to their next meeting. Afterwards those of `first` to `last` must have come to this one.
inline void meet(unsigned first, unsigned last) {
  Fiber& me = block->fibers[block->running];
  const int meeting = ++me.meetings;
  me.place.change_to(block->scheduler);
  for (unsigned i = first; i < last; ++i) {
    const Fiber& other = block->fibers[i];
    if (other.meetings != meeting && other.meetings != meeting + 1) {
      fail("threads that must meet have taken different ways");
    }
  }
}

// Runs `kernel` as `blocks` blocks of `threads` threads.
inline void launch(unsigned blocks, unsigned threads, std::function<void()> kernel) {
  blockDim.x = threads;
  gridDim.x = blocks;
  for (const unsigned b : order_of(blocks)) {
    Block state;
    block = &state;
    state.kernel = kernel;
    state.fibers.resize(threads);
    state.exchange[0].resize(threads);
    state.exchange[1].resize(threads);
    while (stacks.size() < threads) {
      stacks.emplace_back(new char[kStack]);
    }
    for (unsigned t = 0; t < threads; ++t) {
      ucontext_t& context = state.fibers[t].place.context;
      getcontext(&context);
      context.uc_stack.ss_sp = stacks[t].get();
      context.uc_stack.ss_size = kStack;
      context.uc_link = nullptr;
      makecontext(&context, enter, 0);
    }
    const auto order = order_of(threads);
    for (bool left = true; left;) {
      left = false;
      for (const unsigned t : order) {
        if (!state.fibers[t].finished) {
          left = true;
          state.running = t;
          blockIdx.x = b;
          threadIdx.x = t;
          state.scheduler.change_to(state.fibers[t].place);
        }
      }
    }
    block = nullptr;
  }
}

// What the lanes of this warp hand over here, the first lane's first.
template <typename T>
const uint64_t* exchange(T value) {
  static_assert(sizeof(T) <= 8, "lanes hand over up to eight bytes");
  const unsigned me = block->running, first = me / kWarp * kWarp;
  auto& values = block->exchange[block->fibers[me].meetings % 2];
  values[me] = 0;
  std::memcpy(&values[me], &value, sizeof(T));
  meet(first, first + kWarp);
  return &values[first];
}

template <typename T>
T shuffle(T value, unsigned source_lane) {
  T result;
  std::memcpy(&result, exchange(value) + source_lane, sizeof(T));
  return result;
}

} // namespace emulator

inline void __syncthreads() {
  emulator::meet(0, static_cast<unsigned>(emulator::block->fibers.size()));
}

template <typename T>
T __shfl_sync(unsigned, T value, int source, int width) {
  const int lane = emulator::block->running % emulator::kWarp;
  return emulator::shuffle(value, lane / width * width + source % width);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask, int width) {
  const int lane = emulator::block->running % emulator::kWarp;
  const int source = lane ^ mask;
  return emulator::shuffle(value, source / width == lane / width ? source : lane);
}

inline bool __any_sync(unsigned, bool value) {
  const uint64_t* values = emulator::exchange(value);
  return std::any_of(values, values + emulator::kWarp, [](uint64_t x) { return x != 0; });
}

template <typename T>
T atomicAdd(T* p, T value) {
  const T old = *p;
  *p += value;
  return old;
}

// The 16-bit types, by the formulas of IEEE 754; slow and obvious.
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float sign = x.bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) {
    return fraction ? NAN : sign * INFINITY;
  }
  return sign * (exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(float(fraction), -24));
}

// Nearest value of a table search: both formats have only 65536 values.
template <typename T, typename Widen>
T nearest(float x, Widen widen, uint16_t infinity) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (x != x) {
    return T{uint16_t(infinity | 1)};
  }
  const float magnitude = std::fabs(x);
  uint16_t low = 0, high = infinity; // the values rise with the bits
  while (high - low > 1) {
    const uint16_t middle = uint16_t((low + high) / 2);
    (widen(T{middle}) <= magnitude ? low : high) = middle;
  }
  const double below = widen(T{low}), step = widen(T{low}) - (low ? widen(T{uint16_t(low - 1)}) : 0.0);
  const double above = high == infinity ? below + step : widen(T{high});
  const double to_low = magnitude - below, to_high = above - magnitude;
  const bool up = to_high < to_low || (to_high == to_low && (low & 1));
  return T{uint16_t((up ? high : low) | sign)};
}

inline __nv_bfloat16 __float2bfloat16(float x) {
  return nearest<__nv_bfloat16>(x, __bfloat162float, 0x7f80);
}
inline __half __float2half(float x) {
  return nearest<__half>(x, __half2float, 0x7c00);
}
