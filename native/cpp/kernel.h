// What the generated kernels and the handler know of each other.
#pragma once

#include <cstdint>

namespace adamite {

inline constexpr int kBlock = 256;    // elements
inline constexpr int kMaxArrays = 16;  // that a kernel reads, or writes

enum class Type : uint8_t { f32, bf16, i32, u32, i16, i8, u8 };

inline constexpr int SizeOf(Type type) {
  return type == Type::i8 || type == Type::u8 ? 1 : type == Type::bf16 || type == Type::i16 ? 2 : 4;
}

struct Array {
  Type type;
  bool per_block;  // one number for each block, else one for each element
};

// One call of a kernel: blocks that lie behind each other in memory.
struct Call {
  const uint32_t* scalars;  // the operands, floats by their bits
  uint32_t number;          // of the leaf
  uint32_t base;            // number of the first element in the leaf, modulo 2^32
  int64_t blocks;
  int32_t valid;  // elements of each block that count: fewer than kBlock only if there is one block
  const char* in[kMaxArrays];
  char* out[kMaxArrays];
};

using Function = void (*)(const Call&);

struct Kernel {
  const char* name;
  int scalars;
  int inputs, outputs;
  const Array* in;
  const Array* out;
  bool by_rows;  // blocks end where a row ends
};

extern const int kKernels;
extern const Kernel kernels[];  // sorted by name
const Function* Functions();    // in that order, for this processor

}  // namespace adamite
