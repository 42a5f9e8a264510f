/** threads.cpp: threads that spin shortly between the loops of a step, and sleep between steps. */
#include "threads.hpp"

namespace wkv {

namespace {
// About 50 us: longer than the gap between two ops of a step, shorter than a scheduler's slice.
constexpr int kSpins = 4000;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}
}  // namespace

Threads::Threads(int32_t count) {
  for (int32_t i = 1; i < count; i++) workers_.emplace_back([this, i] { work(i); });
}

Threads::~Threads() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    epoch_.fetch_add(1);
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void Threads::run(int64_t total, int64_t grain, Call call, const void* body) {
  total_ = total;
  grain_ = grain;
  call_ = call;
  body_ = body;
  error_ = nullptr;
  next_.store(0, std::memory_order_relaxed);
  busy_.store(static_cast<int32_t>(workers_.size()), std::memory_order_relaxed);
  epoch_.fetch_add(1);
  if (asleep_.load() > 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  take(0);
  for (int spins = 0; busy_.load(std::memory_order_acquire) > 0; spins++) {
    if (spins < kSpins) pause();
    else std::this_thread::yield();
  }
  if (error_) std::rethrow_exception(error_);
}

void Threads::take(int thread) {
  try {
    for (;;) {
      const int64_t begin = next_.fetch_add(grain_, std::memory_order_relaxed);
      if (begin >= total_) return;
      const int64_t end = begin + grain_ < total_ ? begin + grain_ : total_;
      call_(body_, begin, end, thread);
    }
  } catch (...) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) error_ = std::current_exception();
    next_.store(total_, std::memory_order_relaxed);
  }
}

void Threads::work(int thread) {
  uint32_t seen = 0;
  for (;;) {
    int spins = 0;
    while (epoch_.load(std::memory_order_acquire) == seen && ++spins < kSpins) pause();
    if (epoch_.load() == seen) {
      std::unique_lock<std::mutex> lock(mutex_);
      asleep_.fetch_add(1);
      wake_.wait(lock, [&] { return epoch_.load() != seen; });
      asleep_.fetch_sub(1);
    }
    seen = epoch_.load(std::memory_order_acquire);
    if (stop_) return;
    take(thread);
    busy_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace wkv
