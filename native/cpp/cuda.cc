#include "cuda.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <mutex>
#include <vector>

namespace adamite::cuda {
namespace {

// Opens the first of these libraries that there is, and finds functions in it.
class Library {
 public:
  explicit Library(std::initializer_list<std::string> names) {
    for (const std::string& name : names) {
      if (!name.empty() && handle_ == nullptr) handle_ = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    }
  }

  template <class Function>
  void Find(const char* name, Function& function) {
    if (handle_ != nullptr) function = reinterpret_cast<Function>(dlsym(handle_, name));
    if (handle_ != nullptr && function == nullptr && missing_.empty()) missing_ = name;
  }

  bool opened() const { return handle_ != nullptr; }
  const std::string& missing() const { return missing_; }

 private:
  void* handle_ = nullptr;
  std::string missing_;  // the first function that is not there
};

std::string LoadDriver(Driver& driver) {
  Library library({"libcuda.so.1"});
  if (!library.opened()) return "there is no driver of NVIDIA: libcuda.so.1 was not found";
  library.Find("cuDriverGetVersion", driver.DriverGetVersion);
  library.Find("cuGetErrorString", driver.GetErrorString);
  library.Find("cuStreamGetCtx", driver.StreamGetCtx);
  library.Find("cuCtxPushCurrent_v2", driver.CtxPushCurrent);
  library.Find("cuCtxPopCurrent_v2", driver.CtxPopCurrent);
  library.Find("cuCtxGetDevice", driver.CtxGetDevice);
  library.Find("cuDeviceGetAttribute", driver.DeviceGetAttribute);
  library.Find("cuModuleLoadData", driver.ModuleLoadData);
  library.Find("cuModuleGetFunction", driver.ModuleGetFunction);
  library.Find("cuThreadExchangeStreamCaptureMode", driver.ThreadExchangeStreamCaptureMode);
  library.Find("cuLaunchKernel", driver.LaunchKernel);
  if (!library.missing().empty()) return "the driver is too old: it has no " + library.missing();
  if (driver.DriverGetVersion(&driver.version) != 0) return "the driver does not say its version";
  return "";
}

std::string LoadNvrtc(const std::string& path, Nvrtc& nvrtc) {
  Library library({path, "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"});
  if (!library.opened()) {
    return "NVRTC was not found, which compiles its kernels: it comes with jax[cuda13], or in the package "
           "nvidia-cuda-nvrtc";
  }
  library.Find("nvrtcVersion", nvrtc.Version);
  library.Find("nvrtcGetErrorString", nvrtc.GetErrorString);
  library.Find("nvrtcGetNumSupportedArchs", nvrtc.GetNumSupportedArchs);
  library.Find("nvrtcGetSupportedArchs", nvrtc.GetSupportedArchs);
  library.Find("nvrtcCreateProgram", nvrtc.CreateProgram);
  library.Find("nvrtcCompileProgram", nvrtc.CompileProgram);
  library.Find("nvrtcGetProgramLogSize", nvrtc.GetProgramLogSize);
  library.Find("nvrtcGetProgramLog", nvrtc.GetProgramLog);
  library.Find("nvrtcGetCUBINSize", nvrtc.GetCUBINSize);
  library.Find("nvrtcGetCUBIN", nvrtc.GetCUBIN);
  library.Find("nvrtcGetPTXSize", nvrtc.GetPTXSize);
  library.Find("nvrtcGetPTX", nvrtc.GetPTX);
  library.Find("nvrtcDestroyProgram", nvrtc.DestroyProgram);
  if (!library.missing().empty()) return "NVRTC is too old: it has no " + library.missing();
  int major = 0, minor = 0;
  if (nvrtc.Version(&major, &minor) != 0) return "NVRTC does not say its version";
  nvrtc.version = 1000 * major + 10 * minor;
  return "";
}

struct NvrtcPath {
  std::mutex mutex;
  std::string path;
};

NvrtcPath& ThePath() {
  static NvrtcPath* path = new NvrtcPath;
  return *path;
}

// The newest architecture that NVRTC knows and this GPU has; 0: there is none.
int Architecture(const Nvrtc& nvrtc, int wanted) {
  int count = 0, newest = 0;
  if (nvrtc.GetNumSupportedArchs(&count) != 0 || count < 1) return 0;
  std::vector<int> known(count);
  if (nvrtc.GetSupportedArchs(known.data()) != 0) return 0;
  for (int architecture : known) newest = architecture <= wanted ? std::max(newest, architecture) : newest;
  return newest;
}

struct Program {
  const Nvrtc& nvrtc;
  Handle handle = nullptr;
  ~Program() {
    if (handle != nullptr) nvrtc.DestroyProgram(&handle);
  }
};

// What NVRTC writes into a string that is as long as it says.
Result Take(Handle program, Result (*size_of)(Handle, size_t*), Result (*get)(Handle, char*), std::string& to) {
  size_t size = 0;
  if (Result result = size_of(program, &size)) return result;
  to.resize(size);
  return get(program, to.data());
}

}  // namespace

std::string Driver::Message(Result result) const {
  const char* text = nullptr;
  GetErrorString(result, &text);
  return (text ? text : "an unknown error") + std::string(" (") + std::to_string(result) + ")";
}

const Driver* FindDriver(std::string& fault) {
  static Driver driver{};
  static const std::string* why = new std::string(LoadDriver(driver));
  fault = *why;
  return fault.empty() ? &driver : nullptr;
}

// Looked for until it is found: Python may say later where it is.
const Nvrtc* FindNvrtc(std::string& fault) {
  static Nvrtc nvrtc{};
  static bool found = false;
  std::lock_guard lock(ThePath().mutex);
  if (!found) fault = LoadNvrtc(ThePath().path, nvrtc);
  found = found || fault.empty();
  return found ? &nvrtc : nullptr;
}

std::string Compile(const Nvrtc& nvrtc, std::string_view text, int major, int minor, int leaves, std::string& code) {
  const int wanted = 10 * major + minor, known = Architecture(nvrtc, wanted);
  if (known == 0) {
    return "NVRTC knows no GPU of compute capability " + std::to_string(major) + "." + std::to_string(minor) +
           " or older";
  }
  const std::string architecture =
      std::string("--gpu-architecture=") + (known == wanted ? "sm_" : "compute_") + std::to_string(known);
  const std::string table = "-DLEAVES=" + std::to_string(leaves);
  // No product is fused with a sum: a GPU gives the numbers that CPUs give.
  const char* options[] = {architecture.c_str(), table.c_str(), "--fmad=false", "--std=c++17", "-default-device"};
  Program program{nvrtc};
  Result result =
      nvrtc.CreateProgram(&program.handle, std::string(text).c_str(), "adamite_step.cu", 0, nullptr, nullptr);
  if (result != 0) return std::string("NVRTC: ") + nvrtc.GetErrorString(result);
  result = nvrtc.CompileProgram(program.handle, static_cast<int>(std::size(options)), options);
  if (result != 0) {
    std::string log;
    Take(program.handle, nvrtc.GetProgramLogSize, nvrtc.GetProgramLog, log);
    return std::string("NVRTC: ") + nvrtc.GetErrorString(result) + "\n" + log.c_str();
  }
  result = known == wanted ? Take(program.handle, nvrtc.GetCUBINSize, nvrtc.GetCUBIN, code)
                           : Take(program.handle, nvrtc.GetPTXSize, nvrtc.GetPTX, code);
  return result == 0 ? "" : std::string("NVRTC: ") + nvrtc.GetErrorString(result);
}

}  // namespace adamite::cuda

// Where NVRTC is, "" if the loader is to find it. Nothing changes once it is found.
extern "C" __attribute__((visibility("default"))) void AdamiteGpuNvrtc(const char* path) {
  auto& the = adamite::cuda::ThePath();
  std::lock_guard lock(the.mutex);
  the.path = path;
}

// Compiles a kernel where there may be no GPU: the bytes of code that were written to `out`, or -1, and a message there.
extern "C" __attribute__((visibility("default"))) long AdamiteGpuCompile(const char* text, int major, int minor,
                                                                         int leaves, char* out, long room) {
  std::string code, fault;
  if (const auto* nvrtc = adamite::cuda::FindNvrtc(fault)) {
    fault = adamite::cuda::Compile(*nvrtc, text, major, minor, leaves, code);
  }
  if (fault.empty() && static_cast<long>(code.size()) > room) {
    fault = "the code has " + std::to_string(code.size()) + " bytes, and there is room for " + std::to_string(room);
  }
  if (fault.empty()) {
    std::memcpy(out, code.data(), code.size());
    return static_cast<long>(code.size());
  }
  if (room > 0) out[fault.copy(out, room - 1)] = 0;
  return -1;
}
