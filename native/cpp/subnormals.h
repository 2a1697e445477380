// XLA's threads take subnormal numbers for 0 and give 0 for them. So does every thread that works here, whoever made
// it: results must not depend on which thread came first.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace adamite {

class SubnormalsAreZero {
 public:
#if defined(__x86_64__)
  SubnormalsAreZero() : before_(_mm_getcsr()) { _mm_setcsr((before_ & ~0x6000u) | 0x8040u); }  // and nearest, even
  ~SubnormalsAreZero() { _mm_setcsr(before_); }

 private:
  const uint32_t before_;
#elif defined(__aarch64__)
  SubnormalsAreZero() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" ::"r"((before_ & ~(uint64_t{3} << 22)) | (uint64_t{1} << 24)));
  }
  ~SubnormalsAreZero() { asm volatile("msr fpcr, %0" ::"r"(before_)); }

 private:
  uint64_t before_;
#endif
};

}  // namespace adamite
