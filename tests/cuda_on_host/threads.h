// A grid, run block by block and thread by thread.
#pragma once

#include <functional>
#include <string>

#include "cuda_runtime.h"

// The first thing that a kernel did wrong; empty if there is none. Nothing runs after it.
extern std::string message;

__attribute__((format(printf, 1, 2))) void fault(const char* format, ...);

struct Range {
  int first = 0, last = 0x7fffffff;
  bool has(unsigned at) const { return (int)at >= first && (int)at < last; }
};

// Runs the blocks whose numbers are in both ranges; `body` is one thread.
void run_grid(dim3 grid, dim3 block, const std::function<void()>& body, Range x_range,
              Range y_range);

enum { FORWARD = -1, BACKWARD = -2 };  // otherwise the seed of a permutation

// The order in which the threads of a block run, as long as none waits for another.
void order_threads(int seed);

// Whether ThreadSanitizer takes the blocks of a launch for ordered; those that share memory must
// be.
void order_blocks(bool ordered);
