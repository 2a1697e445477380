// CUDA C++ as C++ for a CPU: the lanes of a warp are fibers, which wait for each other where the warp meets.
#pragma once
#define EMULATED
#include <ucontext.h>
#include <xmmintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define INLINE static inline __attribute__((unused))
#define PARAMETER(T) const T&
#define SHARED_TABLE(T, n, to, from) const T* to = from;
#define __global__
#define __device__ static
#define __syncthreads()
#define __launch_bounds__(...)

struct alignas(16) U4 { unsigned x, y, z, w; };
struct alignas(8) U2 { unsigned x, y; };
struct U1 { unsigned x; };
struct Dim { unsigned x; };
[[maybe_unused]] static thread_local Dim blockIdx, threadIdx;

template <class To, class From>
INLINE To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To r;
  std::memcpy(&r, &x, sizeof r);
  return r;
}
INLINE float __uint_as_float(unsigned x) { return bits_as<float>(x); }
INLINE float __int_as_float(int x) { return bits_as<float>(x); }
INLINE unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
INLINE int __float_as_int(float x) { return bits_as<int>(x); }
INLINE float __fdiv_rn(float a, float b) { return a / b; }
INLINE float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
INLINE float sqrt_of_normal(float a) { return __builtin_sqrtf(a); }
INLINE int max(int a, int b) { return a > b ? a : b; }
INLINE int min(int a, int b) { return a < b ? a : b; }
INLINE unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
INLINE unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
INLINE unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
INLINE int __popc(unsigned x) { return __builtin_popcount(x); }
INLINE int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }

// Of NaN and anything the larger and the smaller are NaN; 0 is larger than -0.
INLINE float larger(float a, float b) {
  if (a != a || b != b) return bits_as<float>(0x7FFFFFFFu);
  return a == b ? bits_as<float>(bits_as<unsigned>(a) & bits_as<unsigned>(b)) : a > b ? a : b;
}
INLINE float smaller(float a, float b) {
  if (a != a || b != b) return bits_as<float>(0x7FFFFFFFu);
  return a == b ? bits_as<float>(bits_as<unsigned>(a) | bits_as<unsigned>(b)) : a < b ? a : b;
}
INLINE unsigned bf16_bits(float x) {
  const unsigned b = bits_as<unsigned>(x);
  return x != x ? 0x7FFFu : (b + 0x7FFFu + ((b >> 16) & 1)) >> 16;
}
INLINE unsigned f16_bits(float x) {
  if (x != x) return 0x7FFFu;
  const _Float16 h = (_Float16)x;
  return bits_as<uint16_t>(h);
}
INLINE float from_f16(unsigned bits) { return (float)bits_as<_Float16>((uint16_t)bits); }
INLINE unsigned pack_bf16(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
INLINE unsigned pack_f16(float low, float high) { return f16_bits(low) | f16_bits(high) << 16; }
INLINE int to_int(float x) {
  return x != x ? 0 : x >= 2147483648.0f ? INT32_MAX : x < -2147483648.0f ? INT32_MIN : (int)x;
}
INLINE unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t both = (uint64_t)b << 32 | a;
  unsigned r = 0;
  for (int k = 0; k < 4; ++k) r |= (unsigned)((both >> (8 * ((selector >> (4 * k)) & 7))) & 255) << (8 * k);
  return r;
}

// A warp. Where it meets, a lane puts a number down and lets the others come.
struct Warp {
  ucontext_t home, lane[32];
  std::vector<char> stacks;
  unsigned value[32], result;
  bool done[32];
  int now;
  Warp() : stacks(32 << 16) {}
};
static thread_local Warp* the_warp;
INLINE unsigned max_in_warp(unsigned x) {
  Warp& warp = *the_warp;
  const int me = warp.now;
  warp.value[me] = x;
  swapcontext(&warp.lane[me], &warp.home);
  return warp.result;
}
INLINE void meet() { max_in_warp(0); }
