/** threads.hpp: the CPU library's parallel loop, used by every op. */
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace wkv {

/** A fixed set of threads that run one loop at a time; the caller takes part. */
class Threads {
 public:
  explicit Threads(int32_t count);
  ~Threads();
  int32_t count() const { return static_cast<int32_t>(workers_.size()) + 1; }

  /** Calls body(begin, end, thread) over [0, total) in pieces of `grain`, each once, on any thread; rethrows the first exception. */
  template <typename Body>
  void loop(int64_t total, int64_t grain, const Body& body) {
    if (total <= 0) return;
    if (grain < 1) grain = 1;
    if (workers_.empty() || total <= grain) {
      body(int64_t{0}, total, 0);
      return;
    }
    run(total, grain, [](const void* b, int64_t begin, int64_t end, int thread) { (*static_cast<const Body*>(b))(begin, end, thread); }, &body);
  }

 private:
  using Call = void (*)(const void*, int64_t, int64_t, int);
  void run(int64_t total, int64_t grain, Call call, const void* body);
  void take(int thread);
  void work(int thread);

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  // The loop's number (high half), whether it may be joined (kOpen), and how many workers have joined it. A worker that comes too
  // late, because another process had its core, is not waited for.
  std::atomic<uint64_t> gate_{0};
  std::atomic<int32_t> asleep_{0};
  std::atomic<bool> stop_{false};
  std::atomic<int64_t> next_{0};
  int64_t total_ = 0, grain_ = 1;
  Call call_ = nullptr;
  const void* body_ = nullptr;
  std::exception_ptr error_;
};

}  // namespace wkv
