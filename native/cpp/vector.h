// The operations of programs on vectors of as many lanes as the processor has, with XLA's results for NaN, infinities,
// ties and zeros. Included by generated files that are compiled once for each instruction set: everything is in an
// unnamed namespace, and no function of the standard library is used, so that the linker cannot take code for another
// processor.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernel.h"

namespace adamite {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float F __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef I M;  // all bits of a lane, or none

typedef F LooseF __attribute__((aligned(1), may_alias));
typedef I LooseI __attribute__((aligned(1), may_alias));
typedef U LooseU __attribute__((aligned(1), may_alias));
typedef int16_t Shorts __attribute__((vector_size(2 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));
typedef uint8_t UBytes __attribute__((vector_size(kLanes)));
typedef Shorts LooseShorts __attribute__((aligned(1), may_alias));
typedef Halves LooseHalves __attribute__((aligned(1), may_alias));
typedef Bytes LooseBytes __attribute__((aligned(1), may_alias));
typedef UBytes LooseUBytes __attribute__((aligned(1), may_alias));

#define INLINE static inline __attribute__((always_inline, unused))

INLINE F splat(float x) { return x - F{}; }  // -0 - 0 is -0
INLINE I splat(int32_t x) { return x + I{}; }
INLINE U splat(uint32_t x) { return x + U{}; }

template <class T>
INLINE I asI(T x) { return (I)x; }
template <class T>
INLINE U asU(T x) { return (U)x; }
template <class T>
INLINE F asF(T x) { return (F)x; }

INLINE F loadF(const char* p) { return *(const LooseF*)p; }
INLINE I loadI(const char* p) { return *(const LooseI*)p; }
INLINE U loadU(const char* p) { return *(const LooseU*)p; }
INLINE void storeF(char* p, F x) { *(LooseF*)p = x; }
INLINE void storeI(char* p, I x) { *(LooseI*)p = x; }
INLINE void storeU(char* p, U x) { *(LooseU*)p = x; }

// What compilers make of conversions between lanes of different widths can be slow: these are the instructions.
#if defined(__AVX512F__)
INLINE U loadU16(const char* p) { return (U)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
INLINE I loadI16(const char* p) { return (I)_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
INLINE I loadI8(const char* p) { return (I)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
INLINE I loadU8(const char* p) { return (I)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
INLINE void store16(char* p, I x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)x)); }
#elif defined(__AVX2__)
INLINE U loadU16(const char* p) { return (U)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
INLINE I loadI16(const char* p) { return (I)_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)p)); }
INLINE I loadI8(const char* p) { return (I)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
INLINE I loadU8(const char* p) { return (I)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
INLINE void store16(char* p, I x) {
  const __m256i bytes = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                         0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_shuffle_epi8((__m256i)x, bytes), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(halves));
}
#else
INLINE U loadU16(const char* p) { return __builtin_convertvector(*(const LooseHalves*)p, U); }
INLINE I loadI16(const char* p) { return __builtin_convertvector(*(const LooseShorts*)p, I); }
INLINE I loadI8(const char* p) { return __builtin_convertvector(*(const LooseBytes*)p, I); }
INLINE I loadU8(const char* p) { return __builtin_convertvector(*(const LooseUBytes*)p, I); }
INLINE void store16(char* p, I x) { *(LooseShorts*)p = __builtin_convertvector(x, Shorts); }
#endif
INLINE F loadBf16(const char* p) { return asF(loadU16(p) << 16); }
INLINE void storeBf16(char* p, F x) { store16(p, asI(asU(x) >> 16)); }
INLINE void storeI16(char* p, I x) { store16(p, x); }

// The lowest bytes of the lanes of kTurns vectors.
#if defined(__AVX512F__)
constexpr int kTurns = 1;
INLINE void storeBytes(char* p, const I* x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)x[0])); }
#else
constexpr int kTurns = 4;
INLINE void storeBytes(char* p, const I* x) {
  const I a = x[0] & 255, b = x[1] & 255, c = x[2] & 255, d = x[3] & 255;
#if defined(__AVX2__)
  const __m256i ab = _mm256_packs_epi32((__m256i)a, (__m256i)b), cd = _mm256_packs_epi32((__m256i)c, (__m256i)d);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing takes from both halves of each
  _mm256_storeu_si256((__m256i*)p, _mm256_permutevar8x32_epi32(_mm256_packus_epi16(ab, cd), order));
#elif defined(__x86_64__)
  const __m128i ab = _mm_packs_epi32((__m128i)a, (__m128i)b), cd = _mm_packs_epi32((__m128i)c, (__m128i)d);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi16(ab, cd));
#else
  const I all[4] = {a, b, c, d};
  for (int k = 0; k < 4; ++k) *(LooseBytes*)(p + k * kLanes) = __builtin_convertvector(all[k], Bytes);
#endif
}
#endif
#if defined(__clang__)
#define TURNS _Pragma("clang loop unroll(full)")
#else
#define TURNS _Pragma("GCC unroll 4")
#endif

// i, i + 1, i + 2, ... for an element of a block, from memory: to spread i over the lanes would take longer.
struct Numbers {
  alignas(64) int32_t of[kBlock];
  constexpr Numbers() : of() {
    for (int i = 0; i < kBlock; ++i) of[i] = i;
  }
};
constexpr Numbers numbers;
INLINE I from(int i) { return loadI((const char*)(numbers.of + i)); }

INLINE I lanes() {
  I x{};
  for (int i = 0; i < kLanes; ++i) x[i] = i;
  return x;
}

template <class T>
INLINE T choose(M m, T no, T yes) { return m ? yes : no; }

INLINE M is_nan(F x) { return x != x; }
INLINE M is_finite(F x) { return asI((asU(x) & 0x7FFFFFFFu) < 0x7F800000u); }
INLINE F absolute(F x) { return asF(asU(x) & 0x7FFFFFFFu); }
INLINE F sign(F x) {
  F one = asF((asU(x) & 0x80000000u) | 0x3F800000u);
  return choose((x == 0.0f) | is_nan(x), one, x);
}

// Of NaN and anything the larger and the smaller are NaN; 0 is larger than -0.
INLINE F larger(F a, F b) {
  F c = choose(a > b, b, a);
  c = choose(a == b, c, asF(asU(a) & asU(b)));
  return choose(is_nan(a), c, a);
}
INLINE F smaller(F a, F b) {
  F c = choose(a < b, b, a);
  c = choose(a == b, c, asF(asU(a) | asU(b)));
  return choose(is_nan(a), c, a);
}
// The same for a number k that is neither NaN nor 0; the smaller one, but k for NaN; and for integers.
#if defined(__AVX512F__)
INLINE F larger_than(F k, F x) { return (F)_mm512_max_ps((__m512)k, (__m512)x); }
INLINE F smaller_than(F k, F x) { return (F)_mm512_min_ps((__m512)k, (__m512)x); }
INLINE F smaller_or(F x, F k) { return (F)_mm512_min_ps((__m512)x, (__m512)k); }
INLINE I larger(I a, I b) { return (I)_mm512_max_epi32((__m512i)a, (__m512i)b); }
INLINE I smaller(I a, I b) { return (I)_mm512_min_epi32((__m512i)a, (__m512i)b); }
INLINE U larger(U a, U b) { return (U)_mm512_max_epu32((__m512i)a, (__m512i)b); }
INLINE U smaller(U a, U b) { return (U)_mm512_min_epu32((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
INLINE F larger_than(F k, F x) { return (F)_mm256_max_ps((__m256)k, (__m256)x); }
INLINE F smaller_than(F k, F x) { return (F)_mm256_min_ps((__m256)k, (__m256)x); }
INLINE F smaller_or(F x, F k) { return (F)_mm256_min_ps((__m256)x, (__m256)k); }
INLINE I larger(I a, I b) { return (I)_mm256_max_epi32((__m256i)a, (__m256i)b); }
INLINE I smaller(I a, I b) { return (I)_mm256_min_epi32((__m256i)a, (__m256i)b); }
INLINE U larger(U a, U b) { return (U)_mm256_max_epu32((__m256i)a, (__m256i)b); }
INLINE U smaller(U a, U b) { return (U)_mm256_min_epu32((__m256i)a, (__m256i)b); }
#else
INLINE F larger_than(F k, F x) { return choose(k > x, x, k); }
INLINE F smaller_than(F k, F x) { return choose(k < x, x, k); }
INLINE F smaller_or(F x, F k) { return choose(x < k, k, x); }
INLINE I larger(I a, I b) { return choose(a > b, b, a); }
INLINE I smaller(I a, I b) { return choose(a < b, b, a); }
INLINE U larger(U a, U b) { return choose(asI(a > b), b, a); }
INLINE U smaller(U a, U b) { return choose(asI(a < b), b, a); }
#endif

// The inverse of a power of two from 2^-126 to 2^126; of infinity it is 0.
INLINE F inverse_power(F x) { return asF(larger(splat(0x7F000000) - asI(x), I{})); }

#if defined(__AVX512F__)
INLINE F root(F x) { return (F)_mm512_sqrt_ps((__m512)x); }
INLINE F down(F x) { return (F)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
INLINE F up(F x) { return (F)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC); }
INLINE F even(F x) { return (F)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE I truncated(F x) { return (I)_mm512_cvttps_epi32((__m512)x); }
#elif defined(__AVX2__)
INLINE F root(F x) { return (F)_mm256_sqrt_ps((__m256)x); }
INLINE F down(F x) { return (F)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
INLINE F up(F x) { return (F)_mm256_round_ps((__m256)x, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC); }
INLINE F even(F x) { return (F)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE I truncated(F x) { return (I)_mm256_cvttps_epi32((__m256)x); }
#elif defined(__aarch64__)
INLINE F root(F x) { return (F)vsqrtq_f32((float32x4_t)x); }
INLINE F down(F x) { return (F)vrndmq_f32((float32x4_t)x); }
INLINE F up(F x) { return (F)vrndpq_f32((float32x4_t)x); }
INLINE F even(F x) { return (F)vrndnq_f32((float32x4_t)x); }
INLINE I truncated(F x) {  // as on x86
  return choose(x >= 2147483648.0f, (I)vcvtq_s32_f32((float32x4_t)x), splat(INT32_MIN));
}
#elif defined(__x86_64__)
INLINE F root(F x) { return (F)_mm_sqrt_ps((__m128)x); }
INLINE I truncated(F x) { return (I)_mm_cvttps_epi32((__m128)x); }
// From 2^23 on every float is whole, and so are infinities; adding and taking away 2^23 makes smaller ones whole.
INLINE F even(F x) {
  F size = absolute(x), whole = (size + 8388608.0f) - 8388608.0f;
  F rounded = asF(asU(whole) | (asU(x) & 0x80000000u));
  return choose(size < 8388608.0f, x, rounded);
}
INLINE F down(F x) {
  F near = even(x);
  return choose(near > x, near, near - 1.0f);
}
INLINE F up(F x) { return -down(-x); }
#else
INLINE F root(F x) { for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]); return x; }
INLINE F down(F x) { for (int i = 0; i < kLanes; ++i) x[i] = __builtin_floorf(x[i]); return x; }
INLINE F up(F x) { for (int i = 0; i < kLanes; ++i) x[i] = __builtin_ceilf(x[i]); return x; }
INLINE F even(F x) { for (int i = 0; i < kLanes; ++i) x[i] = __builtin_rintf(x[i]); return x; }
INLINE I truncated(F x) {
  I r{};
  for (int i = 0; i < kLanes; ++i) r[i] = x[i] >= -2147483648.0f && x[i] < 2147483648.0f ? (int32_t)x[i] : INT32_MIN;
  return r;
}
#endif

// NaN is 0, and what no int32 is becomes the nearest.
INLINE I to_int(F x) {
  return (truncated(x) ^ asI(x >= 2147483648.0f)) & asI(x == x);  // what is too large was truncated to the lowest
}
INLINE I to_int(F x, int32_t low, int32_t high) { return smaller(larger(to_int(x), splat(low)), splat(high)); }
INLINE F to_float(I x) { return __builtin_convertvector(x, F); }
INLINE F to_float(U x) { return __builtin_convertvector(x, F); }

// To the nearest bfloat16, ties to even; a NaN stays one.
INLINE F to_bf16(F x) {
  U bits = asU(x);
  U rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  return asF(choose(is_nan(x), rounded, bits | 0x00400000u) & 0xFFFF0000u);
}

INLINE I wrap_i8(I x) { return (x << 24) >> 24; }
INLINE I wrap_i16(I x) { return (x << 16) >> 16; }
INLINE I wrap_u8(I x) { return x & 255; }

// One of eight numbers.
#if defined(__AVX512F__)
INLINE F look_up(I e, const float* table) { return (F)_mm512_permutexvar_ps((__m512i)e, _mm512_loadu_ps(table)); }
INLINE I look_up(I e, const int32_t* table) {
  return (I)_mm512_permutexvar_epi32((__m512i)e, _mm512_loadu_si512(table));
}
#elif defined(__AVX2__)
INLINE F look_up(I e, const float* table) { return (F)_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)e); }
INLINE I look_up(I e, const int32_t* table) {
  return (I)_mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i*)table), (__m256i)e);
}
#else
INLINE F look_up(I e, const float* table) {
  F r = splat(table[0]);
  for (int k = 1; k < 8; ++k) r = choose(e >= k, r, splat(table[k]));
  return r;
}
INLINE I look_up(I e, const int32_t* table) {
  I r = splat(table[0]);
  for (int k = 1; k < 8; ++k) r = choose(e >= k, r, splat(table[k]));
  return r;
}
#endif

// The upper half of a product, of whole numbers below 2^16.
INLINE I half_product(I x, I y) {
#if defined(__AVX512BW__)
  return (I)_mm512_mulhi_epu16((__m512i)x, (__m512i)y);
#elif defined(__AVX2__)
  return (I)_mm256_mulhi_epu16((__m256i)x, (__m256i)y);
#elif defined(__x86_64__)
  return (I)_mm_mulhi_epu16((__m128i)x, (__m128i)y);
#else
  return (I)((U)(x * y) >> 16);
#endif
}

}  // namespace
}  // namespace adamite
