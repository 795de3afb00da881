// Threads of a block as fibers, and where they wait for one another.
#include "threads.h"

#include <link.h>
#include <stdarg.h>

#include <algorithm>

#include "fibers.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;
std::string message;

void fault(const char* format, ...) {
  if (!message.empty()) return;  // the first one: the others may come of it
  char text[512];
  va_list given;
  va_start(given, format);
  vsnprintf(text, sizeof text, format, given);
  va_end(given);
  message = text;
}

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
  uintptr_t here = (uintptr_t)(void*)&machine;
  bool own = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    auto& segment = info->dlpi_phdr[i];
    own |=
        segment.p_type == PT_LOAD && here - (info->dlpi_addr + segment.p_vaddr) < segment.p_memsz;
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
    uint64_t draw = machine.seed + blockIdx.x;
    for (size_t left = machine.order.size(); left > 1; --left) {
      draw = draw * 6364136223846793005u + 1442695040888963407u;
      std::swap(machine.order[left - 1], machine.order[(draw >> 33) % left]);
    }
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

}  // namespace

void run_grid(dim3 grid, dim3 block, const std::function<void()>& body, Range x_range,
              Range y_range) {
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
    if (!y_range.has(y)) continue;
    unsigned end = std::min(grid.x, (unsigned)x_range.last);
    for (unsigned x = (unsigned)x_range.first; x < end && message.empty(); ++x) {
      blockIdx = dim3(x, y);
      run_block();
    }
  }
  __tsan_acquire(&machine.returned);
}

void order_threads(int seed) { machine.seed = seed; }

void order_blocks(bool ordered) { machine.ordered = ordered; }

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
