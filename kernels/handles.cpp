/** handles.cpp: the handle table, and the entries of wkv.h that know no device. */
#include "handles.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

namespace wkv {

// ---- handles: 20 bits of place, 11 of generation, so that a closed handle is not taken for a new one ----

namespace {
struct Place {
  std::shared_ptr<Object> object;
  int32_t generation = 1;
};
std::mutex handles_mutex;
std::vector<Place> places;
std::vector<int32_t> free_places;
int32_t live = 0;
std::atomic<int64_t> held{0};
std::string open_text;

constexpr int32_t kPlaceBits = 20;
constexpr int32_t kPlaceMask = (1 << kPlaceBits) - 1;

Place* locate(int32_t handle) {
  const int32_t place = handle & kPlaceMask;
  if (handle <= 0 || place >= static_cast<int32_t>(places.size())) return nullptr;
  Place& p = places[place];
  return p.object && p.generation == handle >> kPlaceBits ? &p : nullptr;
}

void release(Place& place, int32_t handle) {
  place.object.reset();
  place.generation = place.generation % 2047 + 1;
  free_places.push_back(handle & kPlaceMask);
  live--;
}

const char* name(Kind kind) {
  switch (kind) {
    case Kind::Context: return "context";
    case Kind::Tensor: return "tensor";
    case Kind::Rope: return "rotation";
    case Kind::Cache: return "cache";
    default: return "graph";
  }
}
}  // namespace

void count_bytes(int64_t change) { held += change; }

int32_t add_handle(int32_t context, std::shared_ptr<Object> object) {
  std::lock_guard<std::mutex> lock(handles_mutex);
  object->context = context;
  if (free_places.empty()) {
    if (places.size() > static_cast<size_t>(kPlaceMask)) fail(WKV_MEMORY, "Too many open handles");
    free_places.push_back(static_cast<int32_t>(places.size()));
    places.emplace_back();
  }
  const int32_t place = free_places.back();
  free_places.pop_back();
  places[place].object = std::move(object);
  live++;
  return places[place].generation << kPlaceBits | place;
}

std::shared_ptr<Object> find_handle(int32_t context, int32_t handle, Kind kind, const char* what) {
  std::lock_guard<std::mutex> lock(handles_mutex);
  Place* place = locate(handle);
  if (!place) fail(WKV_HANDLE, std::string(what) + ": handle " + std::to_string(handle) + " is closed or was never open");
  if (place->object->kind != kind) fail(WKV_HANDLE, std::string(what) + " is a " + name(place->object->kind) + ", expected a " + name(kind));
  if (kind != Kind::Context && place->object->context != context) fail(WKV_HANDLE, std::string(what) + " belongs to another context");
  return place->object;
}

std::shared_ptr<ContextBase> find_context(int32_t context) {
  return std::static_pointer_cast<ContextBase>(find_handle(0, context, Kind::Context, "Context"));
}

int32_t report(const std::shared_ptr<ContextBase>& context, int32_t status, const std::string& text) {
  std::mutex& mutex = context ? context->text_mutex : handles_mutex;
  std::lock_guard<std::mutex> lock(mutex);
  (context ? context->text : open_text) = text;
  return status;
}

void give_text(const std::string& text, char* out, int32_t out_bytes) {
  const size_t length = std::min(text.size(), static_cast<size_t>(out_bytes) - 1);
  std::memcpy(out, text.data(), length);
  out[length] = 0;
}

}  // namespace wkv

using namespace wkv;

int32_t wkv_abi_version(void) { return WKV_ABI_VERSION; }

int32_t wkv_source_hash(char* out, int32_t out_bytes) {
#ifndef WKV_SOURCE_HASH
#define WKV_SOURCE_HASH "unknown"
#endif
  const std::string text = WKV_SOURCE_HASH;
  if (!out || out_bytes < static_cast<int32_t>(text.size()) + 1) return WKV_INVALID;
  give_text(text, out, out_bytes);
  return WKV_OK;
}

int32_t wkv_live_handles(void) {
  std::lock_guard<std::mutex> lock(handles_mutex);
  return live;
}

int32_t wkv_error(int32_t context, char* out, int32_t out_bytes) {
  if (!out || out_bytes < 1) return WKV_INVALID;
  std::string text;
  try {
    const auto found = find_context(context);
    std::lock_guard<std::mutex> lock(found->text_mutex);
    text = found->text;
  } catch (const std::exception&) {
    std::lock_guard<std::mutex> lock(handles_mutex);
    text = open_text;
  }
  give_text(text, out, out_bytes);
  return WKV_OK;
}

int32_t wkv_close(int32_t context, int32_t handle) {
  std::vector<std::shared_ptr<Object>> gone;  // destroyed outside both locks, the context last
  return entry_of<ContextBase>(context, [&](ContextBase&) {
    std::lock_guard<std::mutex> lock(handles_mutex);
    Place* place = locate(handle);
    if (!place || (handle != context && place->object->context != context)) fail(WKV_HANDLE, "Handle " + std::to_string(handle) + " is closed or was never open in this context");
    if (handle == context) {
      for (size_t i = 0; i < places.size(); i++) {
        if (!places[i].object || places[i].object->context != context) continue;
        gone.push_back(places[i].object);
        release(places[i], static_cast<int32_t>(i));
      }
    }
    gone.push_back(place->object);
    release(*place, handle);
  });
}

int32_t wkv_memory(int32_t context, double* out, int32_t out_bytes) {
  return entry_of<ContextBase>(context, [&](ContextBase&) {
    require_buffer(out, out_bytes, 8, "out");
    *out = static_cast<double>(held.load());
  });
}

int32_t wkv_bytes(int32_t context, int32_t handle, double* out, int32_t out_bytes) {
  return entry_of<ContextBase>(context, [&](ContextBase&) {
    require_buffer(out, out_bytes, 8, "out");
    std::lock_guard<std::mutex> lock(handles_mutex);
    Place* place = locate(handle);
    if (!place || place->object->context != context) fail(WKV_HANDLE, "Handle " + std::to_string(handle) + " is closed or was never open in this context");
    *out = static_cast<double>(place->object->bytes());
  });
}
