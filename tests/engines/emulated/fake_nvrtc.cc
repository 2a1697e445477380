// NVRTC without CUDA, for tests: g++ compiles the text for this CPU (see emulate.cc), unless the folder EMULATED_FOLDER
// has its library already. The machine code is the text itself, by which the driver that emulates finds the library.
// SOURCES is the folder of emulate.cc. NVRTC knows the architectures 75, 80, 90 and 100.
#include <cstdio>
#include <cstring>
#include <fstream>
#include <mutex>
#include <string>

#include "text_hash.h"

namespace {

struct Program {
  std::string text, log;
  bool ptx = false, compiled = false;
};

std::mutex mutex;
std::string options_now;  // those of the last text
int compilations = 0;

constexpr int kArchitectures[] = {75, 80, 90, 100};
enum { kSuccess = 0, kInvalidProgram = 4, kInvalidOption = 5, kCompilation = 6 };

bool Build(Program& program) {
  const std::string text = KernelOf(program.text.c_str(), ".cu"), library = KernelOf(program.text.c_str(), ".so");
  if (std::ifstream(library).good()) return true;
  std::ofstream(text) << program.text;
  const std::string command = "env -u LD_PRELOAD -u LD_LIBRARY_PATH g++ -O0 -std=c++17 -shared -fPIC -ffp-contract=off "
                              "-Wno-unknown-pragmas -DKERNEL='\"" + text + "\"' " SOURCES "/emulate.cc -o " + library +
                              " 2>&1";
  std::FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return false;
  for (int c; (c = std::fgetc(pipe)) != EOF;) program.log += static_cast<char>(c);
  return pclose(pipe) == 0;
}

int Put(const std::string& from, char* to) {
  std::memcpy(to, from.c_str(), from.size() + 1);
  return kSuccess;
}

Program& Of(void* program) { return *static_cast<Program*>(program); }

}  // namespace

extern "C" {

int EmulatedCompilations() {
  std::lock_guard lock(mutex);
  return compilations;
}
void EmulatedOptions(char* to) {
  std::lock_guard lock(mutex);
  std::strcpy(to, options_now.c_str());
}

int nvrtcVersion(int* major, int* minor) {
  *major = 13, *minor = 0;
  return kSuccess;
}
const char* nvrtcGetErrorString(int result) { return result == kCompilation ? "NVRTC_ERROR_COMPILATION" : "NVRTC_ERROR"; }
int nvrtcGetNumSupportedArchs(int* count) {
  *count = sizeof kArchitectures / sizeof *kArchitectures;
  return kSuccess;
}
int nvrtcGetSupportedArchs(int* architectures) {
  std::memcpy(architectures, kArchitectures, sizeof kArchitectures);
  return kSuccess;
}
int nvrtcCreateProgram(void** program, const char* text, const char*, int, const char* const*, const char* const*) {
  *program = new Program{text, ""};
  return kSuccess;
}
int nvrtcDestroyProgram(void** program) {
  delete static_cast<Program*>(*program);
  *program = nullptr;
  return kSuccess;
}

int nvrtcCompileProgram(void* program, int count, const char* const* options) {
  std::string all;
  for (int k = 0; k < count; ++k) all += std::string(k ? " " : "") + options[k];
  {
    std::lock_guard lock(mutex);
    options_now = all;
    ++compilations;
  }
  Of(program).ptx = all.find("=compute_") != std::string::npos;
  bool known = false;
  for (int k : kArchitectures) known = known || all.find("_" + std::to_string(k) + " ") != std::string::npos;
  if (!known) return kInvalidOption;
  Of(program).compiled = Build(Of(program));
  return Of(program).compiled ? kSuccess : kCompilation;
}

int nvrtcGetProgramLogSize(void* program, size_t* size) {
  *size = Of(program).log.size() + 1;
  return kSuccess;
}
int nvrtcGetProgramLog(void* program, char* log) { return Put(Of(program).log, log); }
int nvrtcGetCUBINSize(void* program, size_t* size) {
  *size = Of(program).text.size() + 1;
  return Of(program).compiled && !Of(program).ptx ? kSuccess : kInvalidProgram;
}
int nvrtcGetCUBIN(void* program, char* code) { return Put(Of(program).text, code); }
int nvrtcGetPTXSize(void* program, size_t* size) {
  *size = Of(program).text.size() + 1;
  return Of(program).compiled ? kSuccess : kInvalidProgram;
}
int nvrtcGetPTX(void* program, char* code) { return Put(Of(program).text, code); }

}  // extern "C"
