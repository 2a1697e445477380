// The XLA custom call that steps a group of leaves, each in place or into other buffers.
//
// Arguments: the number of each leaf's first element, uint32; for each kernel its operands, uint32, and any number more;
// then for each leaf the arrays that its kernel reads. Results: for each leaf the arrays that its kernel writes.
// Attributes: `kernels`, names with commas between them; and of each leaf `kernel` (an index into these), `number` (for
// random bits), `columns` (the elements along its last axis) and `axes` (how many axes lead to a row). Of each of these
// axes `lengths` and `strides`: how many rows there are along it, and how many elements they are apart in the whole leaf,
// of which this may be one device's part.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "chunks.h"
#include "kernel.h"
#include "subnormals.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace adamite {
namespace {

constexpr int64_t kMostElements = int64_t{1} << 48;  // of a leaf
constexpr int64_t kMaxAxes = 64;                     // that lead to a row
constexpr int64_t kChunk = 128;  // blocks, 32768 elements: enough to be worth a thread, and every thread gets some

struct Leaf {
  const Kernel* kernel;
  Function function;
  const uint32_t* scalars;
  uint32_t number, origin;
  int64_t rows, columns;
  ffi::Span<const int64_t> lengths, strides;
  const char* in[kMaxArrays];
  char* out[kMaxArrays];

  int64_t blocks_in_row() const { return (columns + kBlock - 1) / kBlock; }
  int64_t blocks() const { return rows * blocks_in_row(); }

  // The number of a row's first element in the whole leaf, modulo 2^32.
  uint32_t first_of(int64_t row) const {
    uint32_t first = origin;
    for (size_t axis = lengths.size(); axis-- > 0; row /= lengths[axis]) {
      first += static_cast<uint32_t>(row % lengths[axis]) * static_cast<uint32_t>(strides[axis]);
    }
    return first;
  }
};

// Blocks of a leaf.
struct Range {
  const Leaf* leaf;
  int64_t first, last;
};

int64_t Offset(const Array& array, int64_t element, int64_t block) {
  return array.per_block ? block * SizeOf(array.type) : element * SizeOf(array.type);
}

// A block that is not full: a copy of it is filled up with zeros, so that kernels know full ones only.
void StepRagged(const Leaf& leaf, Call call, int32_t valid) {
  alignas(64) char in[kMaxArrays][4 * kBlock], out[kMaxArrays][4 * kBlock];
  const char* from[kMaxArrays];
  char* to[kMaxArrays];
  const Kernel& kernel = *leaf.kernel;
  auto bytes = [&](const Array& array) { return SizeOf(array.type) * (array.per_block ? 1 : valid); };
  for (int k = 0; k < kernel.inputs; ++k) {
    from[k] = call.in[k];
    std::memset(in[k], 0, sizeof in[k]);
    std::memcpy(in[k], from[k], bytes(kernel.in[k]));
    call.in[k] = in[k];
  }
  for (int k = 0; k < kernel.outputs; ++k) {
    to[k] = call.out[k];
    call.out[k] = out[k];
  }
  call.blocks = 1;
  call.valid = valid;
  leaf.function(call);
  for (int k = 0; k < kernel.outputs; ++k) std::memcpy(to[k], out[k], bytes(kernel.out[k]));
}

void Step(const Range& range) {
  const Leaf& leaf = *range.leaf;
  const Kernel& kernel = *leaf.kernel;
  const int64_t in_row = leaf.blocks_in_row(), full = leaf.columns / kBlock;
  for (int64_t block = range.first; block < range.last;) {
    const int64_t row = block / in_row, column = block % in_row;
    const int64_t element = row * leaf.columns + column * kBlock;
    Call call;
    call.scalars = leaf.scalars;
    call.number = leaf.number;
    call.base = leaf.first_of(row) + static_cast<uint32_t>(column * kBlock);
    call.valid = kBlock;
    for (int k = 0; k < kernel.inputs; ++k) call.in[k] = leaf.in[k] + Offset(kernel.in[k], element, block);
    for (int k = 0; k < kernel.outputs; ++k) call.out[k] = leaf.out[k] + Offset(kernel.out[k], element, block);
    call.blocks = std::min(range.last - block, full - column);
    if (call.blocks > 0) {
      leaf.function(call);
      block += call.blocks;
    } else {
      StepRagged(leaf, call, static_cast<int32_t>(leaf.columns % kBlock));
      ++block;
    }
  }
}

ffi::Error Invalid(std::string what) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "adamite_step: " + std::move(what));
}

const Kernel* Find(std::string_view name) {
  const Kernel* end = kernels + kKernels;
  const Kernel* found =
      std::lower_bound(kernels, end, name, [](const Kernel& kernel, std::string_view x) { return kernel.name < x; });
  return found != end && found->name == name ? found : nullptr;
}

ffi::DataType DataTypeOf(Type type) {
  switch (type) {
    case Type::f32: return ffi::DataType::F32;
    case Type::bf16: return ffi::DataType::BF16;
    case Type::i32: return ffi::DataType::S32;
    case Type::u32: return ffi::DataType::U32;
    case Type::i16: return ffi::DataType::S16;
    case Type::i8: return ffi::DataType::S8;
    case Type::u8: return ffi::DataType::U8;
  }
  return ffi::DataType::INVALID;
}

// What is wrong with a buffer for that array; empty if nothing is.
std::string Fault(const ffi::AnyBuffer& buffer, const Array& array, const Leaf& leaf) {
  if (buffer.element_type() != DataTypeOf(array.type)) return "has another dtype than its kernel";
  const int64_t wanted = array.per_block ? leaf.blocks() : leaf.rows * leaf.columns;
  const int64_t count = static_cast<int64_t>(buffer.element_count());
  if (count != wanted) return "has " + std::to_string(count) + " elements instead of " + std::to_string(wanted);
  if (buffer.untyped_data() == nullptr) return "has no data";
  return "";
}

// The leaves that a call describes, or what is wrong with it.
ffi::Error Read(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets, std::string_view names,
                ffi::Span<const int64_t> kernel, ffi::Span<const int64_t> number, ffi::Span<const int64_t> columns,
                ffi::Span<const int64_t> axes, ffi::Span<const int64_t> lengths, ffi::Span<const int64_t> strides,
                std::vector<Leaf>& leaves) {
  const size_t count = kernel.size();
  if (number.size() != count || columns.size() != count || axes.size() != count) {
    return Invalid("kernel, number, columns and axes must be as long as there are leaves");
  }
  std::vector<const Kernel*> known;
  std::vector<const uint32_t*> scalars;
  size_t arg = 0, ret = 0, axis = 0;
  auto origins = args.get<ffi::AnyBuffer>(arg);
  if (arg++ >= args.size() || origins.has_error()) return Invalid("too few arguments");
  if (origins->element_type() != ffi::DataType::U32 || origins->element_count() != count) {
    return Invalid("the first argument must be a uint32 for each of " + std::to_string(count) + " leaves");
  }
  while (!names.empty()) {
    const std::string_view name = names.substr(0, names.find(','));
    names.remove_prefix(std::min(names.size(), name.size() + 1));
    const Kernel* found = Find(name);
    if (found == nullptr) return Invalid("there is no kernel " + std::string(name));
    auto operands = args.get<ffi::AnyBuffer>(arg);
    if (arg++ >= args.size() || operands.has_error()) return Invalid("too few arguments");
    if (operands->element_type() != ffi::DataType::U32 ||
        operands->element_count() < static_cast<size_t>(found->scalars)) {
      return Invalid("kernel " + std::string(name) + " needs " + std::to_string(found->scalars) + " operands, uint32");
    }
    known.push_back(found);
    scalars.push_back(static_cast<const uint32_t*>(operands->untyped_data()));
  }
  leaves.reserve(count);
  for (size_t k = 0; k < count; ++k) {
    const std::string which = "leaf " + std::to_string(k) + ": ";
    if (kernel[k] < 0 || kernel[k] >= static_cast<int64_t>(known.size())) {
      return Invalid(which + "there is no kernel number " + std::to_string(kernel[k]));
    }
    if (axes[k] < 0 || axes[k] > kMaxAxes || axis + axes[k] > std::min(lengths.size(), strides.size())) {
      return Invalid(which + "there are no lengths and strides of " + std::to_string(axes[k]) + " axes");
    }
    const ffi::Span<const int64_t> its_lengths(lengths.begin() + axis, axes[k]);
    const ffi::Span<const int64_t> its_strides(strides.begin() + axis, axes[k]);
    axis += axes[k];
    int64_t rows = 1;
    if (columns[k] < 1 || columns[k] > kMostElements) rows = 0;
    for (int64_t length : its_lengths) {
      rows = length < 1 || rows == 0 || length > kMostElements / rows / columns[k] ? 0 : rows * length;
    }
    if (rows == 0) return Invalid(which + "lengths and columns must be positive, and their product at most 2^48");
    const Kernel* its = known[kernel[k]];
    Leaf leaf{its,         Functions()[its - kernels], scalars[kernel[k]], static_cast<uint32_t>(number[k]),
              static_cast<const uint32_t*>(origins->untyped_data())[k], rows, columns[k], its_lengths, its_strides,
              {},          {}};
    for (int j = 0; j < its->inputs; ++j, ++arg) {
      if (arg >= args.size()) return Invalid(which + "too few arguments");
      auto buffer = args.get<ffi::AnyBuffer>(arg);
      if (buffer.has_error()) return buffer.error();
      const std::string fault = Fault(*buffer, its->in[j], leaf);
      if (!fault.empty()) return Invalid(which + "argument " + std::to_string(j) + " " + fault);
      leaf.in[j] = static_cast<const char*>(buffer->untyped_data());
    }
    for (int j = 0; j < its->outputs; ++j, ++ret) {
      if (ret >= rets.size()) return Invalid(which + "too few results");
      auto buffer = rets.get<ffi::AnyBuffer>(ret);
      if (buffer.has_error()) return buffer.error();
      const std::string fault = Fault(**buffer, its->out[j], leaf);
      if (!fault.empty()) return Invalid(which + "result " + std::to_string(j) + " " + fault);
      leaf.out[j] = static_cast<char*>((*buffer)->untyped_data());
    }
    // Where no block ends before its row does, rows only cost time, if they lie behind one another in the whole leaf.
    const bool in_order = axes[k] == 0 || (axes[k] == 1 && its_strides[0] == leaf.columns);
    if (in_order && (leaf.columns % kBlock == 0 || !its->by_rows)) {
      leaf.columns *= leaf.rows;
      leaf.rows = 1;
    }
    leaves.push_back(leaf);
  }
  if (axis != lengths.size() || axis != strides.size()) return Invalid("too many lengths or strides");
  if (arg != args.size()) return Invalid("too many arguments");
  if (ret != rets.size()) return Invalid("too many results");
  return ffi::Error::Success();
}

// ADAMITE_NATIVE_THREADS limits the threads: for tests.
int64_t Threads(const ffi::ThreadPool& pool) {
  static const char* wish = std::getenv("ADAMITE_NATIVE_THREADS");
  return wish ? std::max(1, std::atoi(wish)) : std::max<int64_t>(1, pool.num_threads());
}

ffi::Error StepLeaves(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, std::string_view names,
                      ffi::Span<const int64_t> kernel, ffi::Span<const int64_t> number,
                      ffi::Span<const int64_t> columns, ffi::Span<const int64_t> axes,
                      ffi::Span<const int64_t> lengths, ffi::Span<const int64_t> strides) {
  std::vector<Leaf> leaves;
  auto error = Read(args, rets, names, kernel, number, columns, axes, lengths, strides, leaves);
  if (error.failure()) return error;

  std::vector<Range> ranges;
  std::vector<size_t> starts;  // of each chunk, among the ranges
  int64_t room = 0;
  for (const Leaf& leaf : leaves) {
    for (int64_t block = 0; block < leaf.blocks();) {
      if (room == 0) {
        starts.push_back(ranges.size());
        room = kChunk;
      }
      const int64_t taken = std::min(room, leaf.blocks() - block);
      ranges.push_back({&leaf, block, block + taken});
      block += taken;
      room -= taken;
    }
  }
  const int64_t chunks = static_cast<int64_t>(starts.size());
  starts.push_back(ranges.size());
  OnThreads(pool, Threads(pool), chunks, [&ranges, &starts](int64_t chunk) {
    SubnormalsAreZero guard;
    for (size_t k = starts[chunk]; k < starts[chunk + 1]; ++k) Step(ranges[k]);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace adamite

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* AdamiteStep(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(AdamiteStep, adamite::StepLeaves,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<std::string_view>("kernels")
                                  .Attr<ffi::Span<const int64_t>>("kernel")
                                  .Attr<ffi::Span<const int64_t>>("number")
                                  .Attr<ffi::Span<const int64_t>>("columns")
                                  .Attr<ffi::Span<const int64_t>>("axes")
                                  .Attr<ffi::Span<const int64_t>>("lengths")
                                  .Attr<ffi::Span<const int64_t>>("strides"));
