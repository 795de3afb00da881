// What the CUDA launchers share: storage formats chosen by a uniform branch, so that each op is one
// kernel and not nine; the kernels are bound by memory, and Triton comes first on a GPU.
#pragma once

#include <cuda_runtime.h>

#include "elements.h"
#include "lowrank_optim.h"

#define LRO_EXPORT extern "C" __attribute__((visibility("default")))

// Pointers of a chunk of a list travel as kernel parameters (4 KiB at most): no copy to the device.
constexpr int64_t LRO_LIST = 32;

__device__ __forceinline__ float lro_read(const void* p, int dtype, int64_t i) {
  if (dtype == LRO_FLOAT32) return ((const float*)p)[i];
  if (dtype == LRO_BFLOAT16) return lro_load(((const lro_bf16*)p)[i]);
  return lro_load(((const lro_f16*)p)[i]);
}

__device__ __forceinline__ void lro_write(void* p, int dtype, int64_t i, float x) {
  if (dtype == LRO_FLOAT32) {
    ((float*)p)[i] = x;
  } else if (dtype == LRO_BFLOAT16) {
    lro_store((lro_bf16*)p + i, x);
  } else {
    lro_store((lro_f16*)p + i, x);
  }
}

static inline bool lro_known(int dtype) { return dtype >= LRO_FLOAT32 && dtype <= LRO_FLOAT16; }

static inline unsigned lro_grid(int64_t items, int64_t per_block, int64_t most) {
  int64_t n = (items + per_block - 1) / per_block;
  return (unsigned)(n < 1 ? 1 : n < most ? n : most);
}

template <class T>
struct lro_as_is {  // a parameter that no template argument is deduced from
  using type = T;
};

// The one place that launches. CUDA copies the arguments before it returns, so that nothing of the
// host's has to outlive the call. An error is returned and taken from the runtime, where the next
// call would find it; one that was there before is not taken for ours.
template <class... Params>
int lro_launch(void (*kernel)(Params...), dim3 grid, dim3 block, void* stream,
               const typename lro_as_is<Params>::type&... given) {
  void* args[] = {(void*)&given...};
  cudaError_t error = cudaLaunchKernel(kernel, grid, block, args, 0, (cudaStream_t)stream);
  if (error == cudaSuccess) return LRO_OK;
  cudaGetLastError();
  return LRO_CUDA_ERROR + (int)error;
}
