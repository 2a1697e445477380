// What a block is reduced to. In an unnamed namespace, as all in vector.h.
#pragma once

#include "vector.h"

namespace adamite {
namespace {

// The largest or smallest of many numbers; NaN if one is, where one may be. Of 0 and -0 either one.
template <bool largest, bool nan>
class Extreme {
 public:
  void add(F x) {
    best_ = pick(best_, x);
    if (nan) nan_ |= is_nan(x);
  }

  F result() const {
    F x = best_;
    M any_nan = nan_;
    for (int step = 1; step < kLanes; step *= 2) {
      x = pick(x, shuffled(x, lanes() ^ step));
      if (nan) any_nan |= shuffled(any_nan, lanes() ^ step);
    }
    return choose(any_nan, x, splat(__builtin_nanf("")));
  }

 private:
  static F pick(F a, F b) { return largest ? larger_than(a, b) : smaller_than(a, b); }

#if defined(__clang__)
  template <class T>
  static T shuffled(T x, I order) {
    T r{};
    for (int i = 0; i < kLanes; ++i) r[i] = x[order[i]];
    return r;
  }
#else
  template <class T>
  static T shuffled(T x, I order) { return __builtin_shuffle(x, order); }
#endif

  F best_ = splat(largest ? -__builtin_inff() : __builtin_inff());
  M nan_{};
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
