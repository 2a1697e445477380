// What stands before every printed kernel: the table of leaves, loads and stores of vectors, and the operations that
// CUDA C++ has not. The printer writes above it
//   ARRAYS   the arrays of a leaf
//   RUN      consecutive elements of a lane, so that no vector has more than 16 bytes
//   WARPS    the warps of a CTA
//   TURNS    the blocks that a warp steps, one after the other
// A block is 256 elements, 8 in each of 32 lanes: runs of RUN elements, 32 RUN apart.
//
// For tests the same text is C++ for a CPU, behind a header that defines EMULATED.

#ifndef LEAVES
#define LEAVES 48
#endif
#define EACH 8

struct Leaf {
  unsigned long long rows, columns;
  unsigned first, number, own;     // its first CTA; its number in the tree; where `words` says how its rows lie
  unsigned short axes, vectors;    // the axes that lead to a row; whether its arrays are aligned as vectors are
  void* array[ARRAYS];
};
struct Table {
  const unsigned* words;  // the operands; then of each leaf the number of its first element, and (length, stride) of axes
  unsigned leaves, unused;
  Leaf leaf[LEAVES];
};

#ifndef EMULATED
#define PARAMETER(T) const __grid_constant__ T
#define INLINE [[maybe_unused]] static __device__ __forceinline__
#define SHARED_TABLE(T, n, to, from) \
  __shared__ T to[n];                \
  for (unsigned k = threadIdx.x; k < n; k += 32 * WARPS) to[k] = from[k];
struct alignas(16) U4 { unsigned x, y, z, w; };
struct alignas(8) U2 { unsigned x, y; };
struct U1 { unsigned x; };
INLINE float larger(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
INLINE float smaller(float a, float b) {
  float r;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
INLINE unsigned bf16_bits(float x) {
  unsigned short r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(x));
  return r;
}
INLINE unsigned f16_bits(float x) {
  unsigned short r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(x));
  return r;
}
INLINE float from_f16(unsigned bits) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"((unsigned short)bits));
  return r;
}
INLINE unsigned pack_bf16(float low, float high) {
  unsigned r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
INLINE unsigned pack_f16(float low, float high) {
  unsigned r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
INLINE int to_int(float x) { return __float2int_rz(x); }  // what is too large is the largest; NaN is 0
// As __fsqrt_rn, without its test for subnormal and infinite numbers.
INLINE float sqrt_of_normal(float x) {
  float r;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  const float root = x * r, half = 0.5f * r;
  return __fmaf_rn(__fmaf_rn(-root, root, x), half, root);
}
INLINE unsigned max_in_warp(unsigned x) { return __reduce_max_sync(0xFFFFFFFFu, x); }
INLINE void meet() { __syncwarp(); }
#endif

// The largest of 32 numbers >= 0, by their bits; infinity if one is NaN.
INLINE float largest_in_warp(float x) { return __uint_as_float(min(max_in_warp(__float_as_uint(x)), 0x7F800000u)); }
INLINE bool is_finite(float x) { return fabsf(x) < __uint_as_float(0x7F800000u); }
INLINE float sign(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : x; }
INLINE float to_bf16(float x) { return __uint_as_float(bf16_bits(x) << 16); }
INLINE float to_f16(float x) { return from_f16(f16_bits(x)); }
// The inverse of a power of two from 2^-126 to 2^126; of infinity it is 0.
INLINE float inverse_power(float x) { return __int_as_float(max(0x7F000000 - __float_as_int(x), 0)); }

// N words of one lane.
template <int N>
struct Words {
  unsigned w[N];
};

template <int N>
INLINE Words<N> load(const char* p) {
  Words<N> r;
  if constexpr (N % 4 == 0) {
#pragma unroll
    for (int k = 0; k < N / 4; ++k) {
      const U4 v = ((const U4*)p)[k];
      r.w[4 * k] = v.x, r.w[4 * k + 1] = v.y, r.w[4 * k + 2] = v.z, r.w[4 * k + 3] = v.w;
    }
  } else if constexpr (N == 2) {
    const U2 v = *(const U2*)p;
    r.w[0] = v.x, r.w[1] = v.y;
  } else {
    r.w[0] = *(const unsigned*)p;
  }
  return r;
}

template <int N>
INLINE void store(char* p, const unsigned* w) {
  if constexpr (N % 4 == 0) {
#pragma unroll
    for (int k = 0; k < N / 4; ++k) ((U4*)p)[k] = U4{w[4 * k], w[4 * k + 1], w[4 * k + 2], w[4 * k + 3]};
  } else if constexpr (N == 2) {
    *(U2*)p = U2{w[0], w[1]};
  } else {
    *(unsigned*)p = w[0];
  }
}

// The same of elements T, of which only the first `valid` are there. The others are 0.
template <int N, class T>
INLINE Words<N> load_some(const char* p, int valid) {
  constexpr int kInWord = 4 / sizeof(T);
  Words<N> r;
#pragma unroll
  for (int k = 0; k < N; ++k) r.w[k] = 0;
#pragma unroll
  for (int k = 0; k < N * kInWord; ++k) {
    if (k < valid) r.w[k / kInWord] |= (unsigned)((const T*)p)[k] << (k % kInWord * 8 * sizeof(T) % 32);
  }
  return r;
}

template <int N, class T>
INLINE void store_some(char* p, const unsigned* w, int valid) {
  constexpr int kInWord = 4 / sizeof(T);
#pragma unroll
  for (int k = 0; k < N * kInWord; ++k) {
    if (k < valid) ((T*)p)[k] = (T)(w[k / kInWord] >> (k % kInWord * 8 * sizeof(T) % 32));
  }
}

// Words from the lower halves of two numbers, or from the lowest bytes of four.
INLINE unsigned join(unsigned a, unsigned b) { return __byte_perm(a, b, 0x5410); }
INLINE unsigned join(unsigned a, unsigned b, unsigned c, unsigned d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}
INLINE unsigned join_upper(float a, float b) { return __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x7632); }

// The leaf that a CTA steps: the last that does not begin behind it.
INLINE const Leaf& leaf_of(const Table& table, unsigned cta) {
  unsigned low = 0, high = table.leaves;
  while (high - low > 1) {
    const unsigned middle = (low + high) >> 1;
    if (table.leaf[middle].first <= cta) low = middle;
    else high = middle;
  }
  return table.leaf[low];
}

// Where a block lies.
struct Block {
  unsigned long long element;  // its first element, among those of the arrays
  unsigned base;               // the same among those of the whole leaf, modulo 2^32
  int valid;                   // how many elements it has
  bool full;                   // whether it is loaded and stored by vectors
};

INLINE Block locate(const Leaf& leaf, const unsigned* words, unsigned block, unsigned in_row) {
  const unsigned row = leaf.rows > 1 ? block / in_row : 0u;
  const unsigned long long column = (unsigned long long)(block - row * in_row) << 8;
  const unsigned long long rest = leaf.columns - column;
  Block r;
  r.element = row * leaf.columns + column;
  r.valid = rest < 256 ? (int)rest : 256;
  r.full = r.valid == 256 && leaf.vectors && (leaf.columns & (RUN - 1)) == 0;
  r.base = words[leaf.own];
  if (leaf.axes == 0) {
    r.base += (unsigned)r.element;
  } else {
    r.base += (unsigned)column;
    unsigned left = row;
    for (unsigned axis = leaf.axes; axis-- > 0;) {
      const unsigned length = words[leaf.own + 1 + 2 * axis], stride = words[leaf.own + 2 + 2 * axis];
      r.base += left % length * stride;
      left /= length;
    }
  }
  return r;
}
