// What a block is reduced to. In an unnamed namespace, as all in vector.h.
#pragma once

#include "vector.h"

namespace adamite {
namespace {

// The largest magnitude of many numbers; a NaN counts as infinite. Bits of magnitudes are ordered as these are.
class LargestMagnitude {
 public:
  void add(F x) { best_ = larger(best_, asU(absolute(x))); }

  F result() const {
    U x = best_;
    for (int step = 1; step < kLanes; step *= 2) x = larger(x, shuffled(x, lanes() ^ step));
    return asF(smaller(x, splat(0x7F800000u)));
  }

 private:
#if defined(__clang__)
  static U shuffled(U x, I order) {
    U r{};
    for (int i = 0; i < kLanes; ++i) r[i] = x[order[i]];
    return r;
  }
#else
  static U shuffled(U x, I order) { return __builtin_shuffle(x, asU(order)); }
#endif

  U best_{};
};

// Of the first elements of a block, and of zeros, which the others stand for.
template <class T>
INLINE T ragged(const char* x, int32_t valid) {
  T found;
  for (int i = 0; i < kBlock; i += kLanes) found.add(choose(lanes() + i < valid, F{}, loadF(x + 4 * i)));
  return found;
}

}  // namespace
}  // namespace adamite
