// What is used of NVIDIA's driver, and of NVRTC, their compiler at run time. Nothing is linked: both are looked for when
// they are first wanted. The library is therefore built without a CUDA toolkit, and loads where there is no GPU.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace adamite::cuda {

using Result = int;    // a CUresult or an nvrtcResult; 0: all is well
using Handle = void*;  // a CUcontext, CUstream, CUmodule, CUfunction or nvrtcProgram

inline constexpr int kCapabilityMajor = 75, kCapabilityMinor = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_...
inline constexpr int kRelaxed = 2;                                  // CU_STREAM_CAPTURE_MODE_RELAXED
inline constexpr int kLargeTables = 12010;  // the version since when a kernel takes more than 4096 bytes of parameters

struct Driver {
  int version;  // 12010 is 12.1
  Result (*DriverGetVersion)(int* version);
  Result (*GetErrorString)(Result, const char** text);
  Result (*StreamGetCtx)(Handle stream, Handle* context);
  Result (*CtxPushCurrent)(Handle context);
  Result (*CtxPopCurrent)(Handle* context);
  Result (*CtxGetDevice)(int* device);
  Result (*DeviceGetAttribute)(int* value, int attribute, int device);
  Result (*ModuleLoadData)(Handle* module, const void* image);
  Result (*ModuleGetFunction)(Handle* function, Handle module, const char* name);
  Result (*ThreadExchangeStreamCaptureMode)(int* mode);
  Result (*LaunchKernel)(Handle function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                         unsigned block_y, unsigned block_z, unsigned shared_bytes, Handle stream, void** parameters,
                         void** extra);

  std::string Message(Result result) const;
};

struct Nvrtc {
  int version;
  Result (*Version)(int* major, int* minor);
  const char* (*GetErrorString)(Result);
  Result (*GetNumSupportedArchs)(int* count);
  Result (*GetSupportedArchs)(int* architectures);
  Result (*CreateProgram)(Handle* program, const char* text, const char* name, int headers, const char* const* contents,
                          const char* const* names);
  Result (*CompileProgram)(Handle program, int count, const char* const* options);
  Result (*GetProgramLogSize)(Handle program, size_t* size);
  Result (*GetProgramLog)(Handle program, char* log);
  Result (*GetCUBINSize)(Handle program, size_t* size);
  Result (*GetCUBIN)(Handle program, char* code);
  Result (*GetPTXSize)(Handle program, size_t* size);
  Result (*GetPTX)(Handle program, char* code);
  Result (*DestroyProgram)(Handle* program);
};

// What was found, the same each time; else nullptr, and why in `fault`.
const Driver* FindDriver(std::string& fault);
const Nvrtc* FindNvrtc(std::string& fault);

// What is wrong with the text, or with NVRTC; if nothing is, it is empty, and `code` is what the driver loads: machine
// code, or PTX where NVRTC is older than the GPU.
std::string Compile(const Nvrtc& nvrtc, std::string_view text, int major, int minor, int leaves, std::string& code);

}  // namespace adamite::cuda
