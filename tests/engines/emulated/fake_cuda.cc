// NVIDIA's driver without a GPU, libcuda.so.1 for tests: a kernel runs on the CPU when it is launched.
//
// A module's machine code is its text (see fake_nvrtc.cc). The kernel is the library that is named by the text's hash in
// the folder EMULATED_FOLDER. EMULATED_DRIVER is the version, EMULATED_CAPABILITY the compute capability. Each stream,
// 1, 2 ..., has a context of its own. What a real driver would not let pass is an error here.
#include <dlfcn.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "text_hash.h"

namespace {

using Run = int (*)(const void* table, unsigned ctas, int flush);

enum { kSuccess = 0, kInvalidValue = 1, kInvalidContext = 201, kNoBinary = 209, kNotFound = 500, kCapture = 900 };

struct Module {
  uintptr_t context;
  void* library;
};
struct Function {
  uintptr_t context;
  Run run;
};

constexpr uintptr_t kContexts = 0x1000;  // the context of stream k is that and k
thread_local std::vector<uintptr_t> contexts;
thread_local int capture_mode = 0;  // global, as after the start of a thread
std::atomic<int> loads{0}, launches{0}, left{0};

int Setting(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value ? std::atoi(value) : otherwise;
}

}  // namespace

extern "C" {

int EmulatedLoads() { return loads; }
int EmulatedLaunches() { return launches; }
int EmulatedContextsLeft() { return left; }

int cuDriverGetVersion(int* version) {
  *version = Setting("EMULATED_DRIVER", 13000);
  return kSuccess;
}

int cuGetErrorString(int result, const char** text) {
  *text = result == kInvalidContext ? "invalid context" : result == kNoBinary ? "no kernel image" : "emulated error";
  return kSuccess;
}

int cuStreamGetCtx(void* stream, void** context) {
  if (stream == nullptr) return kInvalidValue;
  *context = reinterpret_cast<void*>(kContexts + reinterpret_cast<uintptr_t>(stream));
  return kSuccess;
}

int cuCtxPushCurrent_v2(void* context) {
  contexts.push_back(reinterpret_cast<uintptr_t>(context));
  ++left;
  return kSuccess;
}

int cuCtxPopCurrent_v2(void** context) {
  if (contexts.empty()) return kInvalidContext;
  *context = reinterpret_cast<void*>(contexts.back());
  contexts.pop_back();
  --left;
  return kSuccess;
}

int cuCtxGetDevice(int* device) {
  if (contexts.empty()) return kInvalidContext;
  *device = static_cast<int>(contexts.back() - kContexts) - 1;
  return kSuccess;
}

int cuDeviceGetAttribute(int* value, int attribute, int) {
  const int capability = Setting("EMULATED_CAPABILITY", 90);
  if (attribute != 75 && attribute != 76) return kInvalidValue;
  *value = attribute == 75 ? capability / 10 : capability % 10;
  return kSuccess;
}

int cuThreadExchangeStreamCaptureMode(int* mode) {
  const int old = capture_mode;
  capture_mode = *mode;
  *mode = old;
  return kSuccess;
}

int cuModuleLoadData(void** module, const void* image) {
  if (contexts.empty()) return kInvalidContext;
  if (capture_mode != 2) return kCapture;  // as while a graph is recorded
  ++loads;
  void* library = dlopen(KernelOf(static_cast<const char*>(image), ".so").c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return kNoBinary;
  }
  *module = new Module{contexts.back(), library};
  return kSuccess;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
  if (name != std::string("adamite_step")) return kNotFound;
  const Module& its = *static_cast<Module*>(module);
  *function = new Function{its.context, reinterpret_cast<Run>(dlsym(its.library, "run"))};
  return kSuccess;
}

int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                   unsigned block_z, unsigned, void* stream, void** parameters, void**) {
  const Function& its = *static_cast<Function*>(function);
  const uintptr_t context = kContexts + reinterpret_cast<uintptr_t>(stream);
  if (contexts.empty() || contexts.back() != context || its.context != context) return kInvalidContext;
  if (capture_mode != 0) return kCapture;
  if (grid_x < 1 || grid_y != 1 || grid_z != 1 || block_x % 32 != 0 || block_y != 1 || block_z != 1) return kInvalidValue;
  ++launches;
  return its.run(parameters[0], grid_x, 1);  // subnormals are 0, as in XLA's steps on CPUs
}

}  // extern "C"
