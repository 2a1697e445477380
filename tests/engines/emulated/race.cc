// Threads that want the same kernels at the same time, for the sanitizer of threads: race THREADS TEXT ...
// Each text is a file. There are two devices. Prints how often NVRTC was called.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include "gpu_kernels.h"

extern "C" void AdamiteGpuNvrtc(const char* path);

int main(int, char** arguments) {
  const int threads = std::atoi(arguments[1]);
  std::vector<std::string> texts;
  for (char** path = arguments + 2; *path; ++path) {
    std::ifstream file(*path);
    texts.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  std::vector<std::string> faults(threads);
  const auto work = [&](int k) {
    AdamiteGpuNvrtc(std::getenv("EMULATED_NVRTC"));
    const adamite::cuda::Driver* driver = adamite::cuda::FindDriver(faults[k]);
    if (driver == nullptr) return;
    adamite::cuda::Handle context, old;
    driver->StreamGetCtx(reinterpret_cast<void*>(uintptr_t{1} + k % 2), &context);
    driver->CtxPushCurrent(context);
    for (int turn = 0; turn < 100; ++turn) {
      adamite::GpuKernel kernel{};
      const std::string fault = FindKernel(*driver, context, texts[(turn + k) % texts.size()], 3, 64, kernel);
      if (!fault.empty() || kernel.function == nullptr || kernel.leaves != 8) faults[k] += fault + "no kernel\n";
    }
    driver->CtxPopCurrent(&old);
  };
  std::vector<std::thread> running;
  for (int k = 0; k < threads; ++k) running.emplace_back(work, k);
  for (std::thread& thread : running) thread.join();
  bool failed = false;
  for (const std::string& fault : faults) {
    failed = failed || !fault.empty();
    std::fputs(fault.c_str(), stderr);
  }
  void* nvrtc = dlopen(std::getenv("EMULATED_NVRTC"), RTLD_NOW);
  std::printf("%d\n", reinterpret_cast<int (*)()>(dlsym(nvrtc, "EmulatedCompilations"))());
  return failed;
}
