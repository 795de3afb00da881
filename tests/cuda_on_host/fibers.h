// A stack for each thread of a block, and the change from one to another, of which sanitizers are
// told.
#pragma once

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

// HOST_RACES: ThreadSanitizer takes each stack for a thread. What is compiled without
// -fsanitize=thread itself, as this is, has no part in races.
#ifdef HOST_RACES
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#else
inline void __tsan_acquire(void*) {}
inline void __tsan_release(void*) {}
#endif

// Keeps at `from` what a call keeps, and goes on at `to`. swapcontext makes two system calls for
// it.
#if defined(__x86_64__) && !defined(HOST_UCONTEXT)
#define HOST_SWITCH
extern "C" void host_switch(void** from, void* to);
#endif

struct Fiber {
  enum { STACK = 256 << 10, GUARD = 4096 };

  char* stack = nullptr;  // null: the one that the process has
#ifdef HOST_SWITCH
  void* saved = nullptr;
#else
  ucontext_t saved;
#endif
#ifdef __SANITIZE_ADDRESS__
  const void* bottom = nullptr;
  size_t size = 0;
  void* fake = nullptr;
#endif
#ifdef HOST_RACES
  void* thread = nullptr;
#endif

  // Calls `entry`, which never returns, when it is first gone to.
  void start(void (*entry)()) {
    if (!stack) {
      int how = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
      stack = (char*)mmap(nullptr, STACK, PROT_READ | PROT_WRITE, how, -1, 0);
      if (stack == MAP_FAILED || mprotect(stack, GUARD, PROT_NONE)) {
        perror("a stack for a thread of a kernel");
        abort();
      }
#ifdef HOST_RACES
      thread = __tsan_create_fiber(0);
#endif
    }
#ifdef __SANITIZE_ADDRESS__
    bottom = stack;
    size = STACK;
    fake = nullptr;
#endif
#ifdef HOST_SWITCH
    void** top = (void**)(stack + STACK) - 1;  // aligned as after a call
    *--top = (void*)entry;
    saved = top - 6;
#else
    getcontext(&saved);
    saved.uc_stack.ss_sp = stack;
    saved.uc_stack.ss_size = STACK;
    saved.uc_link = nullptr;
    makecontext(&saved, entry, 0);
#endif
  }

  // On this stack again, or for the first time: `other` was left for it.
  void arrived(Fiber& other) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake, &other.bottom, &other.size);
#endif
    (void)other;
  }

  void go(Fiber& to) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&fake, to.bottom, to.size);
#endif
#ifdef HOST_RACES
    if (!stack) thread = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(to.thread, 1);  // 1: neither waits for the other
#endif
#ifdef HOST_SWITCH
    host_switch(&saved, to.saved);
#else
    swapcontext(&saved, &to.saved);
#endif
    arrived(to);
  }
};
