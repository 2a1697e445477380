// The table of kernels, and which of their versions this processor runs.
#include <cstdlib>
#include <string_view>

#include "kernel.h"

namespace adamite {

#include "table.inc"

#define DECLARE(name, set) void kernel_##name##_##set(const Call&);
#define NAMED(name, set) kernel_##name##_##set,

#define EACH(name) DECLARE(name, base)
#include "table.inc"
#undef EACH
#define EACH(name) NAMED(name, base)
static const Function base[] = {
#include "table.inc"
};
#undef EACH

#if defined(ADAMITE_X86)
#define EACH(name) DECLARE(name, v3) DECLARE(name, v4)
#include "table.inc"
#undef EACH
#define EACH(name) NAMED(name, v3)
static const Function v3[] = {
#include "table.inc"
};
#undef EACH
#define EACH(name) NAMED(name, v4)
static const Function v4[] = {
#include "table.inc"
};
#undef EACH
#endif

// ADAMITE_NATIVE_SET=base or v3 asks for less than the processor can do: for tests.
static const Function* Choose() {
  const char* wish = std::getenv("ADAMITE_NATIVE_SET");
  [[maybe_unused]] const std::string_view most = wish ? wish : "v4";
#if defined(ADAMITE_X86)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512cd");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  if (avx512 && avx2 && most == "v4") return v4;
  if (avx2 && most != "base") return v3;
#endif
  return base;
}

const Function* Functions() {
  static const Function* chosen = Choose();
  return chosen;
}

}  // namespace adamite
