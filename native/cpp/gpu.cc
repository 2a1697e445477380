// The XLA custom call that steps a group of leaves on a GPU of NVIDIA by one kernel, in place or into other buffers.
//
// Arguments: `words`, uint32, from `begin` on: the operands of the kernel, then of each leaf the number of its first
// element in the whole leaf, and (length, stride) of each of the axes that lead to a row, outermost first; then for each
// leaf the arrays that the kernel reads. Results: for each leaf the arrays that the kernel writes.
// Attributes: `text`, the kernel in CUDA C++; `grid`, the threads of a CTA and the blocks that a CTA steps; `begin` and
// `operands`, where the kernel's words begin and how many of them are operands; `sizes`, of each array of a leaf in the
// kernel's table the bytes of an element, negative where there is one for each block; `reads` and `writes`, which of
// these arrays are a leaf's arguments and results (an array that is both is stepped in place); and of each leaf `number`
// (for random bits), `rows`, `columns` (elements along its last axis) and `axes` (how many axes `words` describes; with
// none, rows lie behind one another).
//
// A call does nothing but launch kernels on XLA's stream: it waits for nothing, allocates nothing on the device, and may
// be recorded in a graph.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "gpu_kernels.h"
#include "kernel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace adamite {

struct GpuCall {
  std::string_view text;
  ffi::Span<const int64_t> grid;
  int64_t begin, operands;
  ffi::Span<const int64_t> reads, writes, sizes, number, rows, columns, axes;
};

namespace {

constexpr int64_t kMostElements = int64_t{1} << 48;  // of a leaf
constexpr int64_t kMostBlocks = int64_t{1} << 32;    // of a leaf, and of what its CTAs could step
constexpr uint64_t kMostCtas = 0x7FFFFFFF;           // of a launch
constexpr int64_t kMostAxes = 64;                    // that lead to a row
constexpr int64_t kMostWords = int64_t{1} << 31;
constexpr size_t kMostSlots = 2 * kMaxArrays;
constexpr uintptr_t kVector = 16;  // bytes

// What a kernel knows of a leaf; its arrays follow. And of a table; its leaves follow.
struct LeafHead {
  uint64_t rows, columns;
  uint32_t first, number, own;  // the first CTA in this launch; the leaf's number; where `words` tells of it
  uint16_t axes, vectors;       // vectors: whether all arrays of elements are aligned for loads of 16 bytes
};
struct TableHead {
  const void* words;
  uint32_t leaves, unused;
};
static_assert(sizeof(LeafHead) == 32 && sizeof(TableHead) == 16);

struct Leaf {
  LeafHead head;
  uint64_t blocks, ctas;
  void* array[kMostSlots];
};

size_t BytesOf(const GpuCall& call) { return sizeof(LeafHead) + call.sizes.size() * sizeof(void*); }

ffi::Error Invalid(std::string what) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "adamite_gpu_step: " + std::move(what));
}

ffi::Error Failed(std::string what) {
  return ffi::Error(ffi::ErrorCode::kInternal, "adamite_gpu_step: " + std::move(what));
}

// What is wrong with what all leaves share; empty if nothing is.
std::string Fault(const GpuCall& call) {
  const size_t count = call.number.size(), slots = call.sizes.size();
  if (call.rows.size() != count || call.columns.size() != count || call.axes.size() != count) {
    return "number, rows, columns and axes must be as long as there are leaves";
  }
  if (call.grid.size() != 2 || call.grid[0] < 32 || call.grid[0] > 1024 || call.grid[0] % 32 != 0 ||
      call.grid[1] < 1 || call.grid[1] > 1024) {
    return "grid must be the threads of a CTA, whole warps and at most 1024, and its blocks, 1 to 1024";
  }
  if (call.operands < 0 || call.operands > kMostWords) return "operands must be 0 to 2^31";
  if (call.begin < 0 || call.begin > kMostWords) return "begin must be 0 to 2^31";
  if (slots < 1 || slots > kMostSlots) return "a leaf must have 1 to " + std::to_string(kMostSlots) + " arrays";
  bool read[kMostSlots] = {}, written[kMostSlots] = {};
  for (int64_t slot : call.reads) {
    if (slot < 0 || slot >= static_cast<int64_t>(slots)) return "there is no array " + std::to_string(slot) + " to read";
    if (std::exchange(read[slot], true)) return "array " + std::to_string(slot) + " is read twice";
  }
  for (int64_t slot : call.writes) {
    if (slot < 0 || slot >= static_cast<int64_t>(slots)) return "there is no array " + std::to_string(slot) + " to write";
    if (std::exchange(written[slot], true)) return "array " + std::to_string(slot) + " is written twice";
  }
  for (size_t slot = 0; slot < slots; ++slot) {
    if (!read[slot] && !written[slot]) return "array " + std::to_string(slot) + " is neither read nor written";
    const int64_t size = call.sizes[slot];
    if (size == 0 || size < -8 || size > 8) return "array " + std::to_string(slot) + " has elements of no size";
  }
  return "";
}

// What is wrong with the shape of a leaf, else the leaf without its arrays.
std::string Shape(const GpuCall& call, size_t k, uint32_t own, Leaf& leaf) {
  const int64_t rows = call.rows[k], columns = call.columns[k], in_cta = call.grid[1];
  if (call.axes[k] < 0 || call.axes[k] > kMostAxes) return "it cannot have " + std::to_string(call.axes[k]) + " axes";
  if (rows < 1 || columns < 1 || columns > kMostElements || rows > kMostElements / columns) {
    return "rows and columns must be positive, and their product at most 2^48";
  }
  const int64_t in_row = (columns + kBlock - 1) / kBlock;
  // The kernel counts in 32 bits, and its last CTA may count past the last block.
  if (rows > (kMostBlocks - in_cta) / in_row) return "it has too many blocks, of which there may be 2^32";
  leaf.blocks = static_cast<uint64_t>(rows) * in_row;
  leaf.ctas = (leaf.blocks + in_cta - 1) / in_cta;
  if (leaf.ctas > kMostCtas) return "it has too many CTAs, of which there may be 2^31";
  leaf.head = {static_cast<uint64_t>(rows), static_cast<uint64_t>(columns), 0, static_cast<uint32_t>(call.number[k]),
               own, static_cast<uint16_t>(call.axes[k]), 1};
  return "";
}

// What is wrong with a buffer of a leaf that has elements of this size; else it is put into the leaf.
std::string Put(const ffi::AnyBuffer& buffer, int64_t size, Leaf& leaf, void*& slot) {
  const uint64_t width = std::abs(size), there = ffi::ByteWidth(buffer.element_type());
  if (there != width) return "has elements of " + std::to_string(there) + " bytes instead of " + std::to_string(width);
  const uint64_t wanted = size < 0 ? leaf.blocks : leaf.head.rows * leaf.head.columns;
  if (buffer.element_count() != wanted) {
    return "has " + std::to_string(buffer.element_count()) + " elements instead of " + std::to_string(wanted);
  }
  void* data = buffer.untyped_data();
  if (data == nullptr) return "has no data";
  if (slot != nullptr && slot != data) return "is not where its argument is";
  if (size > 0 && reinterpret_cast<uintptr_t>(data) % kVector != 0) leaf.head.vectors = 0;
  slot = data;
  return "";
}

// The leaves that a call describes, or what is wrong with it.
ffi::Error Read(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets, const GpuCall& call,
                const void*& words, std::vector<Leaf>& leaves) {
  if (std::string fault = Fault(call); !fault.empty()) return Invalid(fault);
  auto given = args.get<ffi::AnyBuffer>(0);
  if (args.size() == 0 || given.has_error()) return Invalid("too few arguments");
  size_t arg = 1, ret = 0;
  int64_t own = call.operands;  // the word of the next leaf
  leaves.resize(call.number.size());
  for (size_t k = 0; k < leaves.size(); ++k) {
    Leaf& leaf = leaves[k];
    const auto at = [k](const char* what, size_t j) {
      return "leaf " + std::to_string(k) + ": " + what + " " + std::to_string(j) + " ";
    };
    if (std::string fault = Shape(call, k, static_cast<uint32_t>(own), leaf); !fault.empty()) {
      return Invalid("leaf " + std::to_string(k) + ": " + fault);
    }
    own += 1 + 2 * call.axes[k];
    for (size_t j = 0; j < call.reads.size(); ++j, ++arg) {
      if (arg >= args.size()) return Invalid(at("argument", j) + "is missing: too few arguments");
      auto buffer = args.get<ffi::AnyBuffer>(arg);
      if (buffer.has_error()) return buffer.error();
      const int64_t slot = call.reads[j];
      const std::string fault = Put(*buffer, call.sizes[slot], leaf, leaf.array[slot]);
      if (!fault.empty()) return Invalid(at("argument", j) + fault);
    }
    for (size_t j = 0; j < call.writes.size(); ++j, ++ret) {
      if (ret >= rets.size()) return Invalid(at("result", j) + "is missing: too few results");
      auto buffer = rets.get<ffi::AnyBuffer>(ret);
      if (buffer.has_error()) return buffer.error();
      const int64_t slot = call.writes[j];
      const std::string fault = Put(**buffer, call.sizes[slot], leaf, leaf.array[slot]);
      if (!fault.empty()) return Invalid(at("result", j) + fault);
    }
  }
  if (arg != args.size()) return Invalid("too many arguments");
  if (ret != rets.size()) return Invalid("too many results");
  const int64_t wanted = call.begin + own;
  if (given->element_type() != ffi::DataType::U32 || static_cast<int64_t>(given->element_count()) < wanted) {
    return Invalid("the first argument must be " + std::to_string(wanted) + " uint32 or more: operands, origins, axes");
  }
  words = static_cast<const uint32_t*>(given->untyped_data()) + call.begin;
  return ffi::Error::Success();
}

// The context of XLA's stream, for as long as this lives.
class Context {
 public:
  Context(const cuda::Driver& driver, cuda::Handle stream) : driver_(driver) {
    result_ = driver_.StreamGetCtx(stream, &handle_);
    if (result_ == 0) result_ = driver_.CtxPushCurrent(handle_);
  }
  ~Context() {
    if (cuda::Handle old; result_ == 0) driver_.CtxPopCurrent(&old);
  }
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  cuda::Handle handle() const { return handle_; }
  std::string fault() const {
    return result_ == 0 ? "" : "the stream has no context: " + driver_.Message(result_);
  }

 private:
  const cuda::Driver& driver_;
  cuda::Handle handle_ = nullptr;
  cuda::Result result_;
};

std::string Launch(const cuda::Driver& driver, const GpuKernel& kernel, cuda::Handle stream, const GpuCall& call,
                   const void* words, std::vector<Leaf>& leaves) {
  const size_t bytes = BytesOf(call);
  std::vector<char> table(sizeof(TableHead) + kernel.leaves * bytes);
  for (size_t next = 0; next < leaves.size();) {
    TableHead head{words, 0, 0};
    uint64_t ctas = 0;
    char* to = table.data() + sizeof head;
    while (next < leaves.size() && head.leaves < kernel.leaves && ctas + leaves[next].ctas <= kMostCtas) {
      Leaf& leaf = leaves[next++];
      leaf.head.first = static_cast<uint32_t>(ctas);
      std::memcpy(to, &leaf.head, sizeof leaf.head);
      std::memcpy(to + sizeof leaf.head, leaf.array, bytes - sizeof leaf.head);
      to += bytes;
      ctas += leaf.ctas;
      ++head.leaves;
    }
    std::memcpy(table.data(), &head, sizeof head);
    void* parameters[] = {table.data()};  // the driver copies the table
    const cuda::Result result =
        driver.LaunchKernel(kernel.function, static_cast<unsigned>(ctas), 1, 1, static_cast<unsigned>(call.grid[0]), 1,
                            1, 0, stream, parameters, nullptr);
    if (result != 0) return "the kernel was not launched: " + driver.Message(result);
  }
  return "";
}

// Calls `use(driver, kernel)` in the context of the stream.
template <class Use>
ffi::Error WithKernel(cuda::Handle stream, const GpuCall& call, Use use) {
  std::string fault;
  const cuda::Driver* driver = cuda::FindDriver(fault);
  if (driver == nullptr) return Failed(fault);
  Context context(*driver, stream);
  GpuKernel kernel;
  fault = context.fault();
  if (fault.empty()) {
    fault = FindKernel(*driver, context.handle(), call.text, call.number.size(), BytesOf(call), kernel);
  }
  if (fault.empty()) fault = use(*driver, kernel);
  return fault.empty() ? ffi::Error::Success() : Failed(fault);
}

// Before a program runs for the first time, outside of graphs: compiles what it needs.
ffi::Error Initialize(cuda::Handle stream, GpuCall call) {
  if (std::string fault = Fault(call); !fault.empty()) return Invalid(fault);
  return WithKernel(stream, call, [](const cuda::Driver&, const GpuKernel&) { return std::string(); });
}

ffi::Error Step(cuda::Handle stream, ffi::RemainingArgs args, ffi::RemainingRets rets, GpuCall call) {
  const void* words = nullptr;
  std::vector<Leaf> leaves;
  if (ffi::Error error = Read(args, rets, call, words, leaves); error.failure()) return error;
  return WithKernel(stream, call, [&](const cuda::Driver& driver, const GpuKernel& kernel) {
    return Launch(driver, kernel, stream, call, words, leaves);
  });
}

}  // namespace
}  // namespace adamite

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    adamite::GpuCall, StructMember<std::string_view>("text"), StructMember<Span<const int64_t>>("grid"),
    StructMember<int64_t>("begin"), StructMember<int64_t>("operands"), StructMember<Span<const int64_t>>("reads"),
    StructMember<Span<const int64_t>>("writes"), StructMember<Span<const int64_t>>("sizes"),
    StructMember<Span<const int64_t>>("number"), StructMember<Span<const int64_t>>("rows"),
    StructMember<Span<const int64_t>>("columns"), StructMember<Span<const int64_t>>("axes"));

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* AdamiteGpuInitialize(XLA_FFI_CallFrame*);
extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* AdamiteGpuStep(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(AdamiteGpuInitialize, adamite::Initialize,
                              ffi::Ffi::BindInitialize()
                                  .Ctx<ffi::PlatformStream<adamite::cuda::Handle>>()
                                  .Attrs<adamite::GpuCall>(),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(AdamiteGpuStep, adamite::Step,
                              ffi::Ffi::BindExecute()
                                  .Ctx<ffi::PlatformStream<adamite::cuda::Handle>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attrs<adamite::GpuCall>(),
                              {ffi::Traits::kCmdBufferCompatible});
