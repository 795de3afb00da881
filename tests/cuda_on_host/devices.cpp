// Launches on streams of two devices, and what tests ask of them.
#include <sys/mman.h>

#include <algorithm>
#include <deque>
#include <map>

#include "threads.h"

#define HOST_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Launch {  // the layout of host.py
  int32_t device;
  uint32_t grid[3], block[3];
  int32_t padding;
  uint64_t stream;
};

struct Memory {
  uintptr_t size;
  int device;
};

struct Host {
  int device = 0;
  std::map<cudaStream_t, int> streams;
  std::map<uintptr_t, Memory> memory;
  std::vector<Launch> launches;
  bool deferred = false;
  std::map<cudaStream_t, std::deque<std::function<void()>>> queues;
  Range x, y;
  int64_t until_failure = -1;
  cudaError_t failure = cudaSuccess, last = cudaSuccess;
};

Host host;

bool mapped(uintptr_t at) { return msync((void*)(at & ~(uintptr_t)4095), 4096, MS_ASYNC) == 0; }

// Every aligned word that is an address of this process has to be one of the current device's.
void check_addresses(const std::vector<host_bytes>& parameters) {
  for (const host_bytes& p : parameters) {
    for (size_t i = 0; i + 8 <= p.size; i += 8) {
      uintptr_t word;
      memcpy(&word, (const char*)p.start + i, 8);
      bool small = (uint32_t)word < 16;  // an int32 and what pads it
      if (small || word >> 48) continue;
      auto after = host.memory.upper_bound(word);
      int owner = -1;
      if (after != host.memory.begin()) {
        auto range = std::prev(after);
        if (word - range->first < range->second.size) owner = range->second.device;
      }
      // of the host, what is far up: low words are numbers more often than addresses
      if (owner < 0 && (word < 0x500000000000u || !mapped(word))) continue;
      if (owner < 0) fault("a kernel was given an address of the host, at byte %zu", i);
      if (owner != host.device) {
        fault("a kernel on device %d was given an address of device %d", host.device, owner);
      }
    }
  }
}

cudaError_t check_launch(dim3 grid, dim3 block, cudaStream_t stream) {
  if (host.until_failure >= 0 && host.until_failure-- == 0) return host.failure;
  uint64_t threads = (uint64_t)block.x * block.y * block.z;
  bool fits = grid.x && grid.y && grid.z && grid.x <= 0x7fffffff && grid.y <= 65535 && grid.z == 1;
  if (!fits || threads == 0 || threads > 1024) return cudaErrorInvalidConfiguration;
  auto known = host.streams.find(stream);
  if (stream && (known == host.streams.end() || known->second != host.device)) {
    return cudaErrorInvalidResourceHandle;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t host_launch(dim3 grid, dim3 block, cudaStream_t stream, std::function<void()> thread,
                        const std::vector<host_bytes>& parameters) {
  cudaError_t error = check_launch(grid, block, stream);
  if (error != cudaSuccess) return host.last = error;  // success leaves an earlier error there
  host.launches.push_back(
      {host.device, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, 0, (uint64_t)stream});
  check_addresses(parameters);
  auto run = [=] { run_grid(grid, block, thread, host.x, host.y); };
  if (host.deferred) {
    host.queues[stream].push_back(run);
  } else if (message.empty()) {
    run();
  }
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(host.last, cudaSuccess); }

// --- for tests ----------------------------------------------------------------------------------

HOST_EXPORT void host_reset() {
  host = Host();
  message.clear();
  order_threads(FORWARD);
  order_blocks(true);
}

HOST_EXPORT void host_order(int seed) { order_threads(seed); }

HOST_EXPORT void host_ordered(int ordered) { order_blocks(ordered); }

// Only blocks of these numbers run, from `first` to before `last`.
HOST_EXPORT void host_blocks(int x_first, int x_last, int y_first, int y_last) {
  host.x = {x_first, x_last};
  host.y = {y_first, y_last};
}

HOST_EXPORT int host_device(int device) { return std::exchange(host.device, device); }

HOST_EXPORT void host_stream(void* stream, int device) {
  host.streams[(cudaStream_t)stream] = device;
}

// Memory of a device; what was known of its addresses is forgotten.
HOST_EXPORT void host_memory(uintptr_t start, uintptr_t size, int device) {
  auto at = host.memory.upper_bound(start);
  if (at != host.memory.begin()) {
    auto before = std::prev(at);
    if (start - before->first < before->second.size) before->second.size = start - before->first;
  }
  at = host.memory.lower_bound(start);
  while (at != host.memory.end() && at->first - start < size) at = host.memory.erase(at);
  if (size) host.memory[start] = {size, device};
}

// The launch after `others` more fails.
HOST_EXPORT void host_fail(int64_t others, int code) {
  host.until_failure = others;
  host.failure = (cudaError_t)code;
}

// The error that cudaGetLastError has, which another library may have left.
HOST_EXPORT void host_leave_error(int code) { host.last = (cudaError_t)code; }

HOST_EXPORT int host_error() { return host.last; }

// Kernels wait in their streams until host_synchronize.
HOST_EXPORT void host_defer(int deferred) { host.deferred = deferred; }

HOST_EXPORT void host_synchronize() {
  for (auto& [stream, queue] : host.queues) {
    for (; !queue.empty(); queue.pop_front()) {
      if (message.empty()) queue.front()();
    }
  }
}

HOST_EXPORT int64_t host_launches(Launch* out, int64_t most) {
  int64_t count = (int64_t)host.launches.size();
  for (int64_t i = 0; i < std::min(count, most); ++i) out[i] = host.launches[i];
  return count;
}

HOST_EXPORT const char* host_message() { return message.c_str(); }
