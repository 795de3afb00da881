// What csrc/*.cu use of CUDA, for a C++ compiler: kernels run on the CPU, a block after the other,
// each thread of a block a fiber that gives way where CUDA's threads wait for one another.
//
// There is nothing here that the sources do not use (atomics, dynamic shared memory, half types): a
// source that comes to use it does not compile until it is written.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(threads)
#define __grid_constant__
// The library's thread-local memory is what its kernels share, and is nothing else: it can be
// found, and filled with NaN before each block.
#define __shared__ static thread_local

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

typedef struct CUstream_st* cudaStream_t;

enum cudaError_t {  // CUDA's numbers
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchFailure = 719
};

cudaError_t cudaGetLastError();

// --- threads that wait for one another ----------------------------------------------------------

void __syncthreads();

// Waits for the lanes of `mask`; what lane `from` gave.
uint64_t host_exchange(const char* what, unsigned mask, uint64_t given, unsigned from);

// The lane of the running thread in its warp.
unsigned host_lane();

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  host_exchange("__syncwarp", mask, 0, host_lane());
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
  static_assert(sizeof(T) <= 8, "a shuffle moves up to 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = host_exchange("__shfl_xor_sync", mask, bits, host_lane() ^ (unsigned)other);
  memcpy(&value, &bits, sizeof value);
  return value;
}

// --- launches -----------------------------------------------------------------------------------

struct host_bytes {
  const void* start;
  size_t size;
};

// `thread` is one thread of the kernel, with its own copy of the arguments.
cudaError_t host_launch(dim3 grid, dim3 block, cudaStream_t stream, std::function<void()> thread,
                        const std::vector<host_bytes>& parameters);

template <class... Params, size_t... I>
cudaError_t host_launch_copies(void (*kernel)(Params...), dim3 grid, dim3 block, void** args,
                               cudaStream_t stream, std::index_sequence<I...>) {
  auto copies = std::make_shared<std::tuple<Params...>>(*(Params*)args[I]...);
  std::vector<host_bytes> parameters = {{&std::get<I>(*copies), sizeof(Params)}...};
  return host_launch(grid, block, stream, [=] { std::apply(kernel, *copies); }, parameters);
}

template <class... Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params...), dim3 grid, dim3 block, void** args,
                             size_t shared, cudaStream_t stream) {
  static_assert((sizeof(Params) + ... + 0) <= 4096, "CUDA takes 4 KiB of parameters");
  if (shared) return cudaErrorInvalidValue;  // see above
  return host_launch_copies(kernel, grid, block, args, stream,
                            std::make_index_sequence<sizeof...(Params)>());
}
