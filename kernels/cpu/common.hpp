/** common.hpp: what every file of the CPU library shares: the context with its threads, tensors, recorded ops. */
#pragma once
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "../handles.hpp"
#include "loops.hpp"
#include "threads.hpp"

namespace wkv {

void* zeroed(size_t bytes);
void release(void* memory, size_t bytes);

/** Zeroed memory on a cache line's boundary; large blocks take up room only where they are written. */
template <typename T>
class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t count) { resize(count); }
  /** Replaces the memory by `count` zeros; what it held is gone. */
  void resize(size_t count);
  /** Makes room for at least `count`; what it held is gone when it grows. */
  void reserve(size_t count) {
    if (count > count_) resize(count);
  }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  size_t count() const { return count_; }
  size_t bytes() const { return count_ * sizeof(T); }

 private:
  struct Free {
    size_t bytes = 0;
    void operator()(T* p) const { release(p, bytes); }
  };
  std::unique_ptr<T, Free> data_;
  size_t count_ = 0;
};

template <typename T>
void Memory<T>::resize(size_t count) {
  data_.reset();
  count_ = 0;
  if (count > SIZE_MAX / sizeof(T)) throw std::bad_alloc();
  const size_t bytes = count * sizeof(T);
  data_ = std::unique_ptr<T, Free>(static_cast<T*>(zeroed(bytes)), Free{bytes});
  count_ = count;
}

/** Rows of numbers; weights lie in groups of 8 rows (see loops.hpp), activations and I32 row by row. */
struct Tensor : Object {
  int32_t dtype, rows, columns;
  Memory<uint8_t> memory;
  Tensor(int32_t dtype, int32_t rows, int32_t columns);
  size_t bytes() const override { return memory.bytes(); }
  float* f32() { return reinterpret_cast<float*>(memory.data()); }
  int32_t* i32() { return reinterpret_cast<int32_t*>(memory.data()); }
  float* row(int64_t r) { return f32() + r * columns; }
};
using TensorRef = std::shared_ptr<Tensor>;

/** Frequencies of a rotation and its tables [positions, count]. */
struct Rope : Object {
  int32_t head_dim, pairs, count, positions;
  std::vector<double> frequencies;
  Memory<float> cosines, sines;
  Rope() : Object(Kind::Rope) {}
  size_t bytes() const override { return cosines.bytes() + sines.bytes(); }
  /** Puts a head into the library's own order, in which the rotated pairs are (i, i + count). */
  void to_half(float* head) const;
  /** Puts a head back into the model's order. */
  void from_half(float* head) const;
  /** The rotation of one position, from the tables or, beyond them, computed into `own` [2 * count]. */
  Rotation at(int64_t position, float* own) const;
};
using RopeRef = std::shared_ptr<Rope>;

/** A recorded op. */
using Op = std::function<void()>;

struct Graph : Object {
  std::vector<Op> ops;
  Graph() : Object(Kind::Graph) {}
};

/** A device with its threads and its scratch memory. */
struct Context : ContextBase {
  const Loops* loops;
  Threads threads;
  std::shared_ptr<Graph> recording;
  Memory<float> normed;     // [rows, columns] of a linear op's input after its norm
  Memory<int8_t> rounded;   // the same in 8 bits
  Memory<float> rounding;   // its scales, then its sums, a block each
  Memory<uint8_t> scratch;  // attention
  Context(int32_t threads);
  /** Runs an op now, or keeps it while a graph is recorded. */
  void submit(Op op) {
    if (recording) recording->ops.push_back(std::move(op));
    else op();
  }
};

inline TensorRef find_tensor(int32_t context, int32_t handle, const char* what) {
  return find<Tensor>(context, handle, Kind::Tensor, what);
}
/** A tensor of this dtype with at least these rows and exactly these columns (-1: any). */
TensorRef find_tensor(int32_t context, int32_t handle, const char* what, int32_t dtype, int32_t rows, int32_t columns);

/** Wraps the body of a C entry; see handles.hpp. */
template <typename Body>
int32_t entry(int32_t handle, Body body) {
  return entry_of<Context>(handle, body);
}

}  // namespace wkv
