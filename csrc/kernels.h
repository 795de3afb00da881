// One table of kernels per instruction set: the same sources, compiled three times.
//
// Nothing in them may have external linkage but the table: an inline function of the AVX-512 copy
// that the linker picks for the baseline would be an illegal instruction on an older machine.
#pragma once

#include "elements.h"
#include "lowrank_optim.h"
#include "tables.h"

#ifndef LRO_ISA
#define LRO_ISA baseline
#endif
#define LRO_PASTE_(a, b) a##_##b
#define LRO_PASTE(a, b) LRO_PASTE_(a, b)
#define LRO_LOCAL(name) LRO_PASTE(name, LRO_ISA)

struct lro_kernels {
#define LRO_FIELD(name, args) int (*name)(const args*, int);
  LRO_OPS(LRO_FIELD)
  LRO_CPU_OPS(LRO_FIELD)
#undef LRO_FIELD
};

#define LRO_DECLARE_LOCAL(name, args) int LRO_LOCAL(lro_##name)(const args* a, int threads);
LRO_OPS(LRO_DECLARE_LOCAL)
LRO_CPU_OPS(LRO_DECLARE_LOCAL)
#undef LRO_DECLARE_LOCAL

static inline int64_t lro_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t lro_ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Work is cut into tasks that depend on the shapes alone and never share a sum, so that results do
// not depend on the number of threads. A task finds its tensor by walking the counts: lists are
// short, and consecutive tasks of a thread start from where the last one was found.
struct lro_cursor {
  int64_t tensor, first;  // the tensor and its first task
};

template <class Count>
static inline void lro_seek(lro_cursor* c, int64_t task, Count count) {
  while (task >= c->first + count(c->tensor)) c->first += count(c->tensor++);
}

template <class Count, class Run>
static inline void lro_parallel(int64_t tensors, int threads, Count count, Run run) {
  int64_t tasks = 0;
  for (int64_t i = 0; i < tensors; ++i) tasks += count(i);
  if (tasks == 0) return;
  int64_t wanted = threads > 1 ? lro_min(threads, tasks) : 1;
#pragma omp parallel num_threads((int)wanted) if (wanted > 1)
  {
    lro_cursor c = {0, 0};
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      lro_seek(&c, task, count);
      run(c.tensor, task - c.first);
    }
  }
}

// Whether indices ascend within [0, size), each once, and none is below `least`; -1 stands for
// nowhere. Kernels follow them without looking again.
static inline bool lro_ascends(const int32_t* index, int64_t count, int64_t size,
                               int64_t least = 0) {
  int64_t last = -1;
  for (int64_t k = 0; k < count; ++k) {
    if (index[k] < 0 && index[k] >= least) continue;
    if (index[k] <= last || index[k] >= size) return false;
    last = index[k];
  }
  return true;
}

// Calls f with a typed null pointer for each storage format; false for an unknown one.
template <class F>
static inline bool lro_with_dtype(int dtype, F f) {
  switch (dtype) {
    case LRO_FLOAT32:
      f((float*)nullptr);
      return true;
    case LRO_BFLOAT16:
      f((lro_bf16*)nullptr);
      return true;
    case LRO_FLOAT16:
      f((lro_f16*)nullptr);
      return true;
  }
  return false;
}
