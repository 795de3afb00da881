// Blocks and their threads, streams and devices, and what tests ask of them.
#include <link.h>
#include <stdarg.h>

#include <algorithm>
#include <deque>
#include <map>
#include <numeric>
#include <random>
#include <string>

#include "cuda_runtime.h"
#include "fibers.h"

#define HOST_EXPORT extern "C" __attribute__((visibility("default")))

dim3 threadIdx, blockIdx, blockDim, gridDim;

#ifdef HOST_SWITCH
asm(R"(
.text
.globl host_switch
.hidden host_switch
.type host_switch, @function
host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size host_switch, .-host_switch
)");
#endif

namespace {

// --- what went wrong ----------------------------------------------------------------------------

std::string message;

__attribute__((format(printf, 1, 2))) void fault(const char* format, ...) {
  if (!message.empty()) return;  // the first one: the others may come of it
  char text[512];
  va_list given;
  va_start(given, format);
  vsnprintf(text, sizeof text, format, given);
  va_end(given);
  message = text;
}

// --- one block ----------------------------------------------------------------------------------

enum State { NEW, READY, WAITS_FOR_BLOCK, WAITS_FOR_WARP, RETURNED };

struct Thread {
  State state = NEW;
  dim3 index;
  unsigned rank = 0;
  Fiber* fiber = nullptr;
};

struct Warp {
  const char* what = nullptr;  // null: none waits
  unsigned mask = 0, here = 0;
  uint64_t given[2][32];
  int turn = 0;  // the lanes of one exchange may still read when the first come to the next
};

enum { FORWARD = -1, BACKWARD = -2 };  // otherwise the seed of a permutation

struct Machine {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<unsigned> order;
  std::vector<std::unique_ptr<Fiber>> fibers;
  size_t used = 0, next = 0;  // of fibers; of order: the first that has not begun
  unsigned waiting = 0;       // for the block
  Thread* running = nullptr;
  Fiber scheduler;
  const std::function<void()>* body = nullptr;
  int seed = FORWARD;
  host_bytes shared = {};
  bool ordered = true;           // a block after the other, as their shared memory is the same here
  char launched, returned, met;  // what ThreadSanitizer is told of
};

Machine machine;

void run_as(Thread* t) {
  machine.running = t;
  threadIdx = t->index;
}

Thread* next_new() {
  return machine.next < machine.order.size() ? &machine.threads[machine.order[machine.next++]]
                                             : nullptr;
}

// Runs threads one after the other, on one stack until one of them waits: whatever has no barrier
// costs a call a thread.
void fiber_main() {
  Fiber* own = machine.running->fiber;
  own->arrived(machine.scheduler);
  for (;;) {
    __tsan_acquire(&machine.launched);
    (*machine.body)();
    __tsan_release(&machine.returned);
    machine.running->state = RETURNED;
#ifndef HOST_RACES
    if (Thread* t = next_new()) {
      t->fiber = own;
      run_as(t);
      continue;
    }
#endif
    own->go(machine.scheduler);
  }
}

void resume(Thread* t) {
  if (t->state == NEW) {
    if (machine.used == machine.fibers.size()) machine.fibers.emplace_back(new Fiber);
    t->fiber = machine.fibers[machine.used++].get();
    t->fiber->start(fiber_main);
  }
  t->state = READY;
  run_as(t);
  machine.scheduler.go(*t->fiber);
}

void wait(State state) {
  Thread* t = machine.running;
  t->state = state;
  t->fiber->go(machine.scheduler);
}

thread_local volatile char anchor;  // touched, so that the thread-local memory is there

// Where the thread-local memory of this library is: what its kernels share.
int find_shared(dl_phdr_info* info, size_t, void* found) {
  bool own = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr) & segment = info->dlpi_phdr[i];
    ElfW(Addr) start = info->dlpi_addr + segment.p_vaddr;
    own |= segment.p_type == PT_LOAD && (ElfW(Addr)) & machine - start < segment.p_memsz;
  }
  for (int i = 0; own && i < info->dlpi_phnum; ++i) {
    if (info->dlpi_phdr[i].p_type != PT_TLS) continue;
    *(host_bytes*)found = {info->dlpi_tls_data, info->dlpi_phdr[i].p_memsz};
  }
  return own;
}

// All that can run has run: what is left waits for what will not come.
void say_who_waits(size_t left) {
  std::string found;
  for (const Warp& w : machine.warps) {
    if (!w.what) continue;
    char text[160];
    snprintf(text, sizeof text, "; %s of warp %d: lanes %08x of %08x are there", w.what,
             (int)(&w - machine.warps.data()), w.here, w.mask);
    found += text;
    break;
  }
  fault("block (%u, %u): %zu of %zu threads wait for ever: %u at __syncthreads%s", blockIdx.x,
        blockIdx.y, left, machine.threads.size(), machine.waiting, found.c_str());
}

void run_block() {
  if (machine.ordered) __tsan_acquire(&machine.returned);
  memset((void*)machine.shared.start, 0xff, machine.shared.size);  // NaN, and nothing of the last
  if (machine.ordered) __tsan_release(&machine.launched);
  for (Thread& t : machine.threads) t.state = NEW;
  for (Warp& w : machine.warps) w = Warp();
  if (machine.seed >= 0) {
    std::mt19937 draw(machine.seed + blockIdx.x);
    std::shuffle(machine.order.begin(), machine.order.end(), draw);
  }
  machine.used = machine.next = machine.waiting = 0;
  while (Thread* t = next_new()) resume(t);
  size_t left = 1;
  for (bool moved = true; left && moved && message.empty();) {
    moved = false;
    left = 0;
    for (unsigned rank : machine.order) {
      Thread* t = &machine.threads[rank];
      if (t->state == READY) {
        resume(t);
        moved = true;
      }
      left += t->state != RETURNED;
    }
  }
  if (left) say_who_waits(left);
}

// --- launches, streams, devices -----------------------------------------------------------------

struct Range {
  int first = 0, last = 0x7fffffff;
  bool has(unsigned at) const { return (int)at >= first && (int)at < last; }
};

struct Launch {  // the layout of library.py
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

void run_grid(dim3 grid, dim3 block, const std::function<void()>& body) {
  unsigned count = block.x * block.y * block.z;
  machine.body = &body;
  machine.threads.assign(count, Thread());
  machine.warps.assign((count + 31) / 32, Warp());
  machine.order.resize(count);
  for (unsigned i = 0; i < count; ++i) {
    machine.order[i] = machine.seed == BACKWARD ? count - 1 - i : i;
    machine.threads[i].rank = i;
    machine.threads[i].index = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
  }
  gridDim = grid;
  blockDim = block;
  anchor = 1;
  dl_iterate_phdr(find_shared, &machine.shared);
  __tsan_release(&machine.launched);
  for (unsigned y = 0; y < grid.y; ++y) {
    if (!host.y.has(y)) continue;
    unsigned end = std::min(grid.x, (unsigned)host.x.last);
    for (unsigned x = (unsigned)host.x.first; x < end && message.empty(); ++x) {
      blockIdx = dim3(x, y);
      run_block();
    }
  }
  __tsan_acquire(&machine.returned);
}

bool mapped(uintptr_t at) { return msync((void*)(at & ~(uintptr_t)4095), 4096, MS_ASYNC) == 0; }

// Every aligned word that is an address of this process has to be one of the current device's.
void check_addresses(const std::vector<host_bytes>& parameters) {
  for (const host_bytes& p : parameters) {
    for (size_t i = 0; i + 8 <= p.size; i += 8) {
      uintptr_t word;
      memcpy(&word, (const char*)p.start + i, 8);
      bool small = (uint32_t)word < 16;  // an int32 and what pads it
      if (small || word < 0x500000000000u || word >> 48) continue;
      auto after = host.memory.upper_bound(word);
      int owner = -1;
      if (after != host.memory.begin()) {
        auto range = std::prev(after);
        if (word - range->first < range->second.size) owner = range->second.device;
      }
      if (owner < 0 && !mapped(word)) continue;
      if (owner < 0)
        fault("a kernel was given an address of the host, at byte %zu of %zu", i, p.size);
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

// --- for kernels --------------------------------------------------------------------------------

unsigned host_lane() { return machine.running->rank % 32; }

void __syncthreads() {
  __tsan_release(&machine.met);
  if (++machine.waiting == machine.threads.size()) {
    machine.waiting = 0;
    for (Thread& t : machine.threads) {
      if (t.state == WAITS_FOR_BLOCK) t.state = READY;
    }
  } else {
    wait(WAITS_FOR_BLOCK);
  }
  __tsan_acquire(&machine.met);
}

uint64_t host_exchange(const char* what, unsigned mask, uint64_t given, unsigned from) {
  unsigned lane = host_lane(), rank = machine.running->rank - lane;
  Warp& w = machine.warps[rank / 32];
  bool orders = !strcmp(what, "__syncwarp");  // a shuffle says nothing about memory
  if (orders) __tsan_release(&w);
  if (!(mask >> lane & 1)) fault("%s: lane %u is not in its own mask %08x", what, lane, mask);
  if (!(mask >> from & 1)) fault("%s: lane %u asks lane %u, not in %08x", what, lane, from, mask);
  if (w.what && (w.what != what || w.mask != mask)) {
    fault("a warp is at %s with %08x and at %s with %08x", w.what, w.mask, what, mask);
  }
  int turn = w.turn;
  w.given[turn][lane] = given;
  w.what = what;
  w.mask = mask;
  w.here |= 1u << lane;
  if (w.here == mask) {
    w.what = nullptr;
    w.here = 0;
    w.turn = 1 - turn;
    for (unsigned i = rank; i < rank + 32 && i < machine.threads.size(); ++i) {
      if (machine.threads[i].state == WAITS_FOR_WARP) machine.threads[i].state = READY;
    }
  } else {
    wait(WAITS_FOR_WARP);
  }
  if (orders) __tsan_acquire(&w);
  return w.given[turn][from & 31];
}

cudaError_t host_launch(dim3 grid, dim3 block, cudaStream_t stream, std::function<void()> thread,
                        const std::vector<host_bytes>& parameters) {
  cudaError_t error = check_launch(grid, block, stream);
  if (error != cudaSuccess) return host.last = error;  // success leaves an earlier error there
  host.launches.push_back(
      {host.device, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, 0, (uint64_t)stream});
  check_addresses(parameters);
  auto run = [=] { run_grid(grid, block, thread); };
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
  machine.seed = FORWARD;
}

// The order in which threads of a block run, as long as none waits for another.
HOST_EXPORT void host_order(int seed) { machine.seed = seed; }

// Whether ThreadSanitizer takes the blocks of a launch for ordered; those that share memory must
// be.
HOST_EXPORT void host_ordered(int ordered) { machine.ordered = ordered; }

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
