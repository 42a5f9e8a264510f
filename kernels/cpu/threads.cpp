/** threads.cpp: threads that spin shortly between the loops of a step, and sleep between steps. */
#include "threads.hpp"

#include <system_error>

namespace wkv {

namespace {
// About 50 us: longer than the gap between two ops of a step, shorter than a scheduler's slice.
constexpr int kSpins = 4000;
constexpr uint64_t kOpen = uint64_t{1} << 31;
constexpr uint64_t kJoined = kOpen - 1;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}
}  // namespace

Threads::Threads(int32_t count) {
  workers_.reserve(count);
  try {
    for (int32_t i = 1; i < count; i++) workers_.emplace_back([this, i] { work(i); });
  } catch (const std::system_error&) {  // the system has no more: fewer threads give the same results
  }
}

Threads::~Threads() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_.store(true);
    gate_.fetch_add(uint64_t{1} << 32);
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
  gate_.store(((gate_.load(std::memory_order_relaxed) >> 32) + 1) << 32 | kOpen);
  if (asleep_.load() > 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  take(0);
  gate_.fetch_and(~kOpen);
  for (int spins = 0; (gate_.load(std::memory_order_acquire) & kJoined) > 0; spins++) {
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
  uint64_t seen = 0;
  for (;;) {
    const auto fresh = [&] { return gate_.load() >> 32 != seen; };
    for (int spins = 0; !fresh() && spins < kSpins; spins++) pause();
    if (!fresh()) {
      std::unique_lock<std::mutex> lock(mutex_);
      asleep_.fetch_add(1);
      wake_.wait(lock, fresh);
      asleep_.fetch_sub(1);
    }
    if (stop_.load()) return;
    uint64_t gate = gate_.load();
    seen = gate >> 32;
    while ((gate & kOpen) && gate >> 32 == seen && !gate_.compare_exchange_weak(gate, gate + 1)) {
    }
    if (!(gate & kOpen) || gate >> 32 != seen) continue;
    take(thread);
    gate_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace wkv
