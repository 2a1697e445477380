#include "gpu_kernels.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

namespace adamite {
namespace {

using cuda::Driver;
using cuda::Handle;
using cuda::Result;

constexpr char kName[] = "adamite_step";  // of every kernel
constexpr size_t kFew = 8;                // leaves: those of a small model need no more parameters
constexpr size_t kMany = 128;             // leaves of a call of adamite
constexpr size_t kTableHead = 16, kSmallTable = 4096, kLargeTable = 32764;  // bytes
constexpr int kOldestCapability = 8;  // warps of older GPUs have no reductions

// How many leaves the table of a launch has. There are two numbers, lest a text is compiled more often than twice.
size_t LeavesOfTable(size_t leaves, size_t bytes, bool large) {
  const size_t room = ((large ? kLargeTable : kSmallTable) - kTableHead) / bytes;
  return std::min(room, leaves <= kFew ? kFew : kMany);
}

// A text that is compiled for tables of so many leaves.
struct Key {
  size_t leaves;
  std::string text;
};
struct Lookup {
  size_t leaves;
  std::string_view text;
};
// Different texts have different lengths as a rule: a search compares few, and copies and hashes none.
struct Less {
  using is_transparent = void;
  template <class A, class B>
  bool operator()(const A& a, const B& b) const {
    const std::string_view x(a.text), y(b.text);
    return std::forward_as_tuple(a.leaves, x.size(), x) < std::forward_as_tuple(b.leaves, y.size(), y);
  }
};

struct Compiled {
  std::mutex compiling;             // held while NVRTC works, which takes seconds: who wants the same text waits
  std::map<int, std::string> code;  // by compute capability
  std::map<Handle, Handle> functions;  // by context; under the cache's mutex
};

struct Cache {
  std::mutex mutex;  // held for searches alone
  std::map<Key, Compiled, Less> compiled;
};

Cache& TheCache() {
  static Cache* cache = new Cache;  // kernels may run until the process ends
  return *cache;
}

// This thread may be recording a graph, into which a module's loading does not go.
class NotRecorded {
 public:
  explicit NotRecorded(const Driver& driver) : driver_(driver) { driver_.ThreadExchangeStreamCaptureMode(&mode_); }
  ~NotRecorded() { driver_.ThreadExchangeStreamCaptureMode(&mode_); }
  NotRecorded(const NotRecorded&) = delete;
  NotRecorded& operator=(const NotRecorded&) = delete;

 private:
  const Driver& driver_;
  int mode_ = cuda::kRelaxed;  // then what it was before
};

// The code of a text for the current device.
std::string CodeOf(const Driver& driver, const cuda::Nvrtc& nvrtc, std::string_view text, size_t leaves,
                   Compiled& compiled, const std::string*& code) {
  int device = 0, major = 0, minor = 0;
  Result result = driver.CtxGetDevice(&device);
  if (result == 0) result = driver.DeviceGetAttribute(&major, cuda::kCapabilityMajor, device);
  if (result == 0) result = driver.DeviceGetAttribute(&minor, cuda::kCapabilityMinor, device);
  if (result != 0) return "the GPU does not say what it can do: " + driver.Message(result);
  if (major < kOldestCapability) {
    return "its kernels need compute capability 8.0, and this GPU has " + std::to_string(major) + "." +
           std::to_string(minor);
  }
  std::lock_guard lock(compiled.compiling);
  const auto found = compiled.code.find(10 * major + minor);
  if (found != compiled.code.end()) {
    code = &found->second;
    return "";
  }
  std::string made;
  std::string fault = cuda::Compile(nvrtc, text, major, minor, static_cast<int>(leaves), made);
  if (fault.empty()) code = &(compiled.code[10 * major + minor] = std::move(made));
  return fault;
}

}  // namespace

std::string FindKernel(const Driver& driver, Handle context, std::string_view text, size_t leaves, size_t bytes,
                       GpuKernel& kernel) {
  std::string fault;
  const cuda::Nvrtc* nvrtc = cuda::FindNvrtc(fault);
  if (nvrtc == nullptr) return fault;
  const bool large = std::min(driver.version, nvrtc->version) >= cuda::kLargeTables;
  kernel.leaves = LeavesOfTable(leaves, bytes, large);

  Cache& cache = TheCache();
  Compiled* compiled;
  {
    std::lock_guard lock(cache.mutex);
    auto found = cache.compiled.find(Lookup{kernel.leaves, text});
    if (found == cache.compiled.end()) {
      found = cache.compiled.try_emplace(Key{kernel.leaves, std::string(text)}).first;
    }
    compiled = &found->second;
    const auto function = compiled->functions.find(context);
    if (function != compiled->functions.end()) {
      kernel.function = function->second;
      return "";
    }
  }

  const std::string* code = nullptr;
  fault = CodeOf(driver, *nvrtc, text, kernel.leaves, *compiled, code);
  if (!fault.empty()) return fault;
  // No mutex is held: loading may wait for what the device does, and that for another thread that comes here. Two
  // threads may load the same code into one context then, and the first function is used.
  Handle module = nullptr, loaded = nullptr;
  {
    NotRecorded guard(driver);
    Result result = driver.ModuleLoadData(&module, code->data());
    if (result == 0) result = driver.ModuleGetFunction(&loaded, module, kName);
    if (result != 0) return "the kernel was not loaded: " + driver.Message(result);
  }
  std::lock_guard lock(cache.mutex);
  kernel.function = compiled->functions.try_emplace(context, loaded).first->second;
  return "";
}

}  // namespace adamite
