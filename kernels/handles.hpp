/** handles.hpp: errors, handles and the wrapper of every C entry; shared by both libraries (handles.cpp). */
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>

#include "wkv.h"

namespace wkv {

/** A failure on its way to the C boundary: a status and what wkv_error will say. */
struct Failure : std::runtime_error {
  int32_t status;
  Failure(int32_t status, const std::string& text) : std::runtime_error(text), status(status) {}
};

[[noreturn]] inline void fail(int32_t status, const std::string& text) { throw Failure(status, text); }

inline void require(bool holds, const std::string& text) {
  if (!holds) fail(WKV_INVALID, text);
}

enum class Kind { Context, Tensor, Rope, Cache, Graph };

/** What a handle stands for. */
struct Object {
  Kind kind;
  int32_t context = 0;
  explicit Object(Kind kind) : kind(kind) {}
  virtual ~Object() = default;
  virtual size_t bytes() const { return 0; }
};

/** What a context of either library has: its lock and the text of its last failure. Every entry holds `mutex`. */
struct ContextBase : Object {
  std::mutex mutex, text_mutex;
  std::string text;
  bool recording_failed = false;  // since wkv_graph_begin
  bool running = false;           // in a function that runs graphs, whose failures leave a recording alone
  ContextBase() : Object(Kind::Context) {}
};

int32_t add_handle(int32_t context, std::shared_ptr<Object> object);
std::shared_ptr<Object> find_handle(int32_t context, int32_t handle, Kind kind, const char* what);
std::shared_ptr<ContextBase> find_context(int32_t context);

template <typename T>
std::shared_ptr<T> find(int32_t context, int32_t handle, Kind kind, const char* what) {
  return std::static_pointer_cast<T>(find_handle(context, handle, kind, what));
}

/** Keeps the text of a failure for wkv_error (null: that of wkv_context_open), and gives its status. */
int32_t report(const std::shared_ptr<ContextBase>& context, int32_t status, const std::string& text);

/** Runs body() and turns every exception into a status. */
template <typename Body>
int32_t guarded(const std::shared_ptr<ContextBase>& context, Body body) {
  try {
    body();
    return WKV_OK;
  } catch (const Failure& failure) {
    return report(context, failure.status, failure.what());
  } catch (const std::bad_alloc&) {
    return report(context, WKV_MEMORY, "Out of memory");
  } catch (const std::exception& error) {
    return report(context, WKV_INTERNAL, error.what());
  } catch (...) {
    return report(context, WKV_INTERNAL, "Unknown failure");
  }
}

/** Wraps the body of a C entry: looks the context up and takes its lock. */
template <typename ContextType, typename Body>
int32_t entry_of(int32_t handle, Body body) {
  std::shared_ptr<ContextBase> context;
  const int32_t found = guarded(nullptr, [&] { context = find_context(handle); });
  if (found != WKV_OK) return found;
  std::lock_guard<std::mutex> lock(context->mutex);
  const int32_t status = guarded(context, [&] { body(static_cast<ContextType&>(*context)); });
  if (status != WKV_OK && !context->running) context->recording_failed = true;
  context->running = false;
  return status;
}

inline void require_buffer(const void* data, int64_t have, int64_t want, const char* what) {
  require(data != nullptr, std::string(what) + " is null");
  require(have == want, std::string(what) + " has " + std::to_string(have) + " bytes, expected " + std::to_string(want));
}

/** What wkv_qk_norm asks of its numbers and its weights' columns. */
inline void check_qk_norm(int32_t heads, int32_t kv_heads, int32_t head_dim, int32_t q_columns, int32_t k_columns) {
  require(heads >= 1 && heads <= 4096 && kv_heads >= 1 && kv_heads <= 4096 && head_dim >= 1 && head_dim <= 4096, "heads, kv_heads and head_dim must be between 1 and 4096: " + std::to_string(heads) + ", " + std::to_string(kv_heads) + ", " + std::to_string(head_dim));
  require(q_columns == head_dim || q_columns == heads * head_dim, "q_weight has " + std::to_string(q_columns) + " columns, expected " + std::to_string(head_dim) + " or " + std::to_string(heads * head_dim));
  require(k_columns == head_dim || k_columns == kv_heads * head_dim, "k_weight has " + std::to_string(k_columns) + " columns, expected " + std::to_string(head_dim) + " or " + std::to_string(kv_heads * head_dim));
}

inline void check_softcap(float softcap) { require(softcap >= 0.0f && softcap <= 3.0e38f, "softcap must be 0 or a number above it: " + std::to_string(softcap)); }

/** Adds to what wkv_memory gives. */
void count_bytes(int64_t change);

/** Copies a text out, cut to out_bytes and ended by a zero. */
void give_text(const std::string& text, char* out, int32_t out_bytes);

}  // namespace wkv
