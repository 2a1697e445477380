// Chunks of work on several threads.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace adamite {

// Does chunks until there are none left. Whoever comes late finds none, and touches nothing but this object, which
// every task owns a share of: the caller may be gone.
class Chunks {
 public:
  Chunks(int64_t count, std::function<void(int64_t)> one) : count_(count), one_(std::move(one)) {}

  void Work() {
    for (int64_t chunk; (chunk = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) {
      one_(chunk);
      if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
        std::lock_guard lock(mutex_);
        finished_.notify_all();
      }
    }
  }

  // Returns when every chunk is done; those not begun yet are not waited for but done, by the caller's `Work`.
  void Wait() {
    std::unique_lock lock(mutex_);
    finished_.wait(lock, [this] { return done_.load(std::memory_order_acquire) == count_; });
  }

 private:
  const int64_t count_;
  const std::function<void(int64_t)> one_;
  std::atomic<int64_t> next_{0}, done_{0};
  std::mutex mutex_;
  std::condition_variable finished_;
};

// Calls one(0), ..., one(count - 1) on at most so many threads, this one among them.
inline void OnThreads(xla::ffi::ThreadPool& pool, int64_t threads, int64_t count, std::function<void(int64_t)> one) {
  auto chunks = std::make_shared<Chunks>(count, std::move(one));
  for (int64_t k = 1; k < std::min(threads, count); ++k) pool.Schedule([chunks] { chunks->Work(); });
  chunks->Work();
  chunks->Wait();
}

}  // namespace adamite
