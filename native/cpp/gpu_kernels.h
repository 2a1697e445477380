// The kernels of the GPU: compiled once for each text, loaded once for each device.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

#include "cuda.h"

namespace adamite {

// A kernel, and how many leaves its table has.
struct GpuKernel {
  cuda::Handle function;
  size_t leaves;
};

// A call of `leaves` leaves finds the kernel of `text` in the context that is current, or makes it. Returns what is
// wrong, empty if nothing is. May be called while a graph is recorded. A leaf has `bytes` in the table.
std::string FindKernel(const cuda::Driver& driver, cuda::Handle context, std::string_view text, size_t leaves,
                       size_t bytes, GpuKernel& kernel);

}  // namespace adamite
