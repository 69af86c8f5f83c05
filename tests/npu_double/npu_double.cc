// A stand-in for an Ascend NPU, as a plugin of PaddlePaddle's CustomDevice C ABI.
//
// It answers to device type "npu", keeps "device memory" on the host heap and
// runs everything synchronously.  It counts what is copied, so that tests see
// when a program waits for the device or moves data it should not.
//
// What it does not prove: speed, the order of asynchronous work, the numerics,
// private memory formats and missing kernels of a real board.
// It registers none of the real plugin's flags (FLAGS_npu_*).
//
// Environment: NPU_DOUBLE_DEVICES (1), NPU_DOUBLE_MEM_MB (4096 per device), ASCEND_RT_VISIBLE_DEVICES.
#include <array>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "paddle/phi/backends/device_ext.h"

namespace {

constexpr int kMaxDevices = 16;

struct Board {
  std::atomic<size_t> live{0};
  std::atomic<size_t> peak{0};
  std::atomic<size_t> allocations{0};
  std::atomic<size_t> h2d{0}, d2h{0}, d2d{0}, p2p{0};  // bytes moved
  std::atomic<size_t> h2d_calls{0}, d2h_calls{0};
};
Board boards[kMaxDevices];
thread_local int current = 0;

size_t EnvNumber(const char* name, size_t fallback) {
  const char* text = std::getenv(name);
  if (text == nullptr || *text == '\0') return fallback;
  char* end = nullptr;
  unsigned long long value = std::strtoull(text, &end, 10);
  return (end != nullptr && *end == '\0') ? static_cast<size_t>(value)
                                          : fallback;
}
// Cards that ASCEND_RT_VISIBLE_DEVICES leaves of so many: those it lists before the first that is not there.
size_t Visible(size_t there) {
  const char* text = std::getenv("ASCEND_RT_VISIBLE_DEVICES");
  if (text == nullptr) return there;
  size_t seen = 0;
  while (*text != '\0') {
    char* end = nullptr;
    unsigned long long card = std::strtoull(text, &end, 10);
    if (end == text || card >= there) break;
    ++seen;
    text = *end == ',' ? end + 1 : end;
    if (text == end) break;
  }
  return seen;
}
size_t DeviceCount() {
  static const size_t n = [] {
    size_t wanted = Visible(EnvNumber("NPU_DOUBLE_DEVICES", 1));
    return wanted > kMaxDevices ? static_cast<size_t>(kMaxDevices) : wanted;
  }();
  return n;
}
size_t Capacity() {
  static const size_t bytes = EnvNumber("NPU_DOUBLE_MEM_MB", 4096) << 20;
  return bytes;
}

bool Known(const C_Device d) {
  return d != nullptr && d->id >= 0 && d->id < static_cast<int>(DeviceCount());
}
Board& At(const C_Device d) { return boards[d->id]; }

C_Status Nothing() { return C_SUCCESS; }

C_Status Enter(const C_Device d) {
  if (!Known(d)) return C_ERROR;
  current = d->id;
  return C_SUCCESS;
}
C_Status Leave(const C_Device d) { return Known(d) ? C_SUCCESS : C_ERROR; }
C_Status Which(const C_Device d) {
  d->id = current;
  return C_SUCCESS;
}

// Streams and events carry no work: a distinct non-null handle is enough.
C_Status NewStream(const C_Device, C_Stream* s) {
  *s = reinterpret_cast<C_Stream>(std::malloc(1));
  return *s ? C_SUCCESS : C_FAILED;
}
C_Status DropStream(const C_Device, C_Stream s) {
  std::free(s);
  return C_SUCCESS;
}
C_Status PollStream(const C_Device, C_Stream) { return C_SUCCESS; }
C_Status CallOnStream(const C_Device d, C_Stream s, C_Callback f, void* arg) {
  C_Status status = C_SUCCESS;
  f(d, s, arg, &status);
  return status;
}
C_Status NewEvent(const C_Device, C_Event* e) {
  *e = reinterpret_cast<C_Event>(std::malloc(1));
  return *e ? C_SUCCESS : C_FAILED;
}
C_Status DropEvent(const C_Device, C_Event e) {
  std::free(e);
  return C_SUCCESS;
}
C_Status MarkEvent(const C_Device, C_Stream, C_Event) { return C_SUCCESS; }
C_Status PollEvent(const C_Device, C_Event) { return C_SUCCESS; }

C_Status DeviceAlloc(const C_Device d, void** out, size_t size) {
  *out = nullptr;
  if (!Known(d)) return C_ERROR;
  Board& b = At(d);
  size_t now = b.live.fetch_add(size) + size;
  if (now > Capacity()) {
    b.live.fetch_sub(size);
    return C_FAILED;
  }
  void* p = nullptr;
  if (posix_memalign(&p, 64, size ? size : 64) != 0) {
    b.live.fetch_sub(size);
    return C_FAILED;
  }
  // Fresh device memory is poisoned: a kernel that forgets to write shows NaN.
  std::memset(p, 0xFF, size);
  b.allocations.fetch_add(1);
  size_t seen = b.peak.load();
  while (now > seen && !b.peak.compare_exchange_weak(seen, now)) {
  }
  *out = p;
  return C_SUCCESS;
}
C_Status DeviceFree(const C_Device d, void* p, size_t size) {
  if (!Known(d)) return C_ERROR;
  At(d).live.fetch_sub(size);
  std::free(p);
  return C_SUCCESS;
}
C_Status DeviceFill(const C_Device, void* p, unsigned char v, size_t size) {
  std::memset(p, v, size);
  return C_SUCCESS;
}
C_Status HostAlloc(const C_Device, void** out, size_t size) {
  *out = std::malloc(size ? size : 1);
  return *out ? C_SUCCESS : C_FAILED;
}
C_Status HostFree(const C_Device, void* p, size_t) {
  std::free(p);
  return C_SUCCESS;
}

template <std::atomic<size_t> Board::*counter>
C_Status Move(const C_Device d, void* dst, const void* src, size_t n) {
  if (!Known(d)) return C_ERROR;
  (At(d).*counter).fetch_add(n);
  if (counter == &Board::h2d) At(d).h2d_calls.fetch_add(1);
  if (counter == &Board::d2h) At(d).d2h_calls.fetch_add(1);
  std::memmove(dst, src, n);
  return C_SUCCESS;
}
template <std::atomic<size_t> Board::*counter>
C_Status MoveLater(
    const C_Device d, C_Stream, void* dst, const void* src, size_t n) {
  return Move<counter>(d, dst, src, n);
}
C_Status MovePeer(const C_Device to,
                  const C_Device from,
                  void* dst,
                  const void* src,
                  size_t n) {
  if (!Known(from)) return C_ERROR;
  return Move<&Board::p2p>(to, dst, src, n);
}
C_Status MovePeerLater(const C_Device to,
                       const C_Device from,
                       C_Stream,
                       void* dst,
                       const void* src,
                       size_t n) {
  return MovePeer(to, from, dst, src, n);
}

C_Status Count(size_t* n) {
  *n = DeviceCount();
  return C_SUCCESS;
}
C_Status List(size_t* ids) {
  for (size_t i = 0; i < DeviceCount(); ++i) ids[i] = i;
  return C_SUCCESS;
}
C_Status MemoryStats(const C_Device d, size_t* total, size_t* available) {
  if (!Known(d)) return C_ERROR;
  *total = Capacity();
  *available = Capacity() - At(d).live.load();
  return C_SUCCESS;
}
template <size_t value>
C_Status Fixed(const C_Device, size_t* out) {
  *out = value;
  return C_SUCCESS;
}
C_Status Yes(const C_Device, bool* out) {
  *out = true;
  return C_SUCCESS;
}
// Present in the interface of 3.3.1, absent from that of 3.0.0.
template <typename Api>
auto LowPrecision(Api* api, int) -> decltype(api->is_bfloat16_supported, void()) {
  api->is_float16_supported = Yes;
  api->is_bfloat16_supported = Yes;
}
template <typename Api>
void LowPrecision(Api*, ...) {
  static_cast<void>(Yes);
}

}  // namespace

// Read by tests through ctypes: what = live|peak|allocations|h2d|d2h|d2d|p2p
// (bytes but for allocations) or h2d_calls|d2h_calls.
extern "C" size_t npu_double_stat(int device, const char* what) {
  if (device < 0 || device >= kMaxDevices) return 0;
  Board& b = boards[device];
  if (!std::strcmp(what, "live")) return b.live;
  if (!std::strcmp(what, "peak")) return b.peak;
  if (!std::strcmp(what, "allocations")) return b.allocations;
  if (!std::strcmp(what, "h2d")) return b.h2d;
  if (!std::strcmp(what, "d2h")) return b.d2h;
  if (!std::strcmp(what, "d2d")) return b.d2d;
  if (!std::strcmp(what, "p2p")) return b.p2p;
  if (!std::strcmp(what, "h2d_calls")) return b.h2d_calls;
  if (!std::strcmp(what, "d2h_calls")) return b.d2h_calls;
  return 0;
}

void RegisterMirrors(const char* device_type);       // in npu_double_kernels.cc
void RegisterCollectives(C_DeviceInterface* api);  // in npu_double_ccl.cc

extern "C" void InitPlugin(CustomRuntimeParams* params) {
  PADDLE_CUSTOM_RUNTIME_CHECK_VERSION(params);
  static char type[] = "npu";
  static char sub_type[] = "double";
  params->device_type = type;
  params->sub_device_type = sub_type;

  C_DeviceInterface& api = *params->interface;
  const size_t size = api.size;
  std::memset(static_cast<void*>(&api), 0, sizeof(api));
  api.size = size;

  api.initialize = Nothing;
  api.finalize = Nothing;
  api.init_device = Enter;
  api.set_device = Enter;
  api.get_device = Which;
  api.deinit_device = Leave;

  api.create_stream = NewStream;
  api.destroy_stream = DropStream;
  api.query_stream = PollStream;
  api.stream_add_callback = CallOnStream;
  api.create_event = NewEvent;
  api.destroy_event = DropEvent;
  api.record_event = MarkEvent;
  api.query_event = PollEvent;
  api.synchronize_device = Leave;
  api.synchronize_stream = PollStream;
  api.synchronize_event = PollEvent;
  api.stream_wait_event = MarkEvent;

  api.device_memory_allocate = DeviceAlloc;
  api.device_memory_deallocate = DeviceFree;
  api.device_memory_set = DeviceFill;
  api.host_memory_allocate = HostAlloc;
  api.host_memory_deallocate = HostFree;
  api.unified_memory_allocate = DeviceAlloc;
  api.unified_memory_deallocate = DeviceFree;
  api.memory_copy_h2d = Move<&Board::h2d>;
  api.memory_copy_d2h = Move<&Board::d2h>;
  api.memory_copy_d2d = Move<&Board::d2d>;
  api.memory_copy_p2p = MovePeer;
  api.async_memory_copy_h2d = MoveLater<&Board::h2d>;
  api.async_memory_copy_d2h = MoveLater<&Board::d2h>;
  api.async_memory_copy_d2d = MoveLater<&Board::d2d>;
  api.async_memory_copy_p2p = MovePeerLater;

  api.get_device_count = Count;
  api.get_device_list = List;
  api.device_memory_stats = MemoryStats;
  api.device_min_chunk_size = Fixed<256>;
  LowPrecision(&api, 0);
  RegisterCollectives(&api);
  RegisterMirrors(type);
}
