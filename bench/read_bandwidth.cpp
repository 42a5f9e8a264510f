/** Measures how fast all threads together read memory, in bytes a second: the ceiling of a decode step. Built and run by memory.ts. */
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  const size_t count = size_t{64} << 20;  // 512 MiB in all, beyond any cache
  std::vector<uint64_t> data(count, 1);
  double best = 0;
  for (int run = 0; run < 5; run++) {
    std::vector<std::thread> workers;
    std::vector<uint64_t> sums(threads);
    const auto start = std::chrono::steady_clock::now();
    for (int t = 0; t < threads; t++) {
      workers.emplace_back([&, t] {
        uint64_t a = 0, b = 0, c = 0, d = 0;
        const size_t end = count / threads * (t + 1) / 16 * 16;
        for (size_t i = count / threads * t / 16 * 16; i < end; i += 16) {
          for (size_t j = 0; j < 16; j += 4) a += data[i + j], b += data[i + j + 1], c += data[i + j + 2], d += data[i + j + 3];
        }
        sums[t] = a + b + c + d;
      });
    }
    for (auto& worker : workers) worker.join();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    volatile uint64_t keep = sums[0];
    (void)keep;
    if (count * 8 / seconds > best) best = count * 8 / seconds;
  }
  std::printf("%.0f\n", best);
}
