// Column norms and the passes after the GEMM of a fused apply, for any strides.
#include "common.cuh"

namespace {

// A thread per element; threadIdx.x runs along columns, which the caller makes the stored
// direction.
template <bool SIGN>
__global__ void __launch_bounds__(256) apply(const __grid_constant__ lro_apply a) {
  if (a.finite && !*a.finite) return;
  float decay = (float)a.decay, lr = (float)a.lr, scale = (float)a.scale, gain = (float)a.gain;
  for (int64_t i = blockIdx.y; i < a.rows; i += gridDim.y) {
    for (int64_t j = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; j < a.cols;
         j += (int64_t)gridDim.x * blockDim.x) {
      int64_t at = i * a.weight_row + j * a.weight_col;
      float w = lro_read(a.weight, a.weight_dtype, at);
      float g = lro_read(a.grad, a.grad_dtype, i * a.grad_row + j * a.grad_col);
      float low = lro_read(a.low, a.low_dtype, i * a.low_row + j);
      if (SIGN) {
        float other = lro_read(a.other, a.low_dtype, i * a.low_row + j);
        w = lro_signed(w, low, other, g, decay, lr, scale, gain);
      } else {
        w = lro_scaled(w, low, g, a.factor[i * a.factor_row + j * a.factor_col], decay, lr);
      }
      lro_write(a.weight, a.weight_dtype, at, w);
    }
  }
}

template <bool SIGN>
int launch(const lro_apply* a, void* stream) {
  if (!lro_known(a->weight_dtype) || !lro_known(a->grad_dtype) || !lro_known(a->low_dtype)) {
    return LRO_BAD_DTYPE;
  }
  dim3 grid(lro_grid(a->cols, 256, 65535), lro_grid(a->rows, 1, 65535));
  return lro_launch(apply<SIGN>, grid, 256, stream, *a);
}

struct Coordinate {
  void* weight;
  const void* grad;
  const int32_t* index;
  const float* low;
  int64_t picked, rows, cols, weight_row, weight_col, grad_row, grad_col, low_row, low_col;
  const uint8_t* finite;
  float decay, lr_scale, lr_gain;
  int rule, dtype;
};

// `by_column`: threads run along rows, the stored direction. The row's place in the sorted index is
// found by bisection, log2(k) reads that stay in the cache: an index outside the matrix is met by
// no row, and is never followed.
__global__ void __launch_bounds__(256)
    coordinate(const __grid_constant__ Coordinate a, bool by_column) {
  if (a.finite && !*a.finite) return;
  int64_t inner = by_column ? a.rows : a.cols, outer = by_column ? a.cols : a.rows;
  for (int64_t o = blockIdx.y; o < outer; o += gridDim.y) {
    for (int64_t n = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; n < inner;
         n += (int64_t)gridDim.x * blockDim.x) {
      int64_t i = by_column ? n : o, j = by_column ? o : n, k = 0, end = a.picked;
      while (k < end) {
        int64_t middle = (k + end) / 2;
        if (a.index[middle] < i) {
          k = middle + 1;
        } else {
          end = middle;
        }
      }
      int64_t at = i * a.weight_row + j * a.weight_col;
      float w = lro_read(a.weight, a.dtype, at);
      if (k < a.picked && a.index[k] == i) {
        w = lro_step(w, a.low[k * a.low_row + j * a.low_col], a.decay, a.lr_scale);
      } else if (a.rule == LRO_FREE_NONE) {
        w = a.decay * w;
      } else {
        float g = lro_read(a.grad, a.dtype, i * a.grad_row + j * a.grad_col);
        w = lro_step(w, a.rule == LRO_FREE_SIGN ? lro_sign_nan(g) : g, a.decay, a.lr_gain);
      }
      lro_write(a.weight, a.dtype, at, w);
    }
  }
}

struct Norms {
  const void* value;
  float* out;
  int64_t rows, cols, row, col;
  int dtype;
};

// 32 columns by 8 runs of rows a block; sums in float64, so that no square overflows.
__global__ void __launch_bounds__(256) norms(const __grid_constant__ Norms a) {
  __shared__ double sums[8][33];
  int64_t j = (int64_t)blockIdx.x * 32 + threadIdx.x;
  double sum = 0;
  if (j < a.cols) {
    for (int64_t i = threadIdx.y; i < a.rows; i += 8) {
      double x = lro_read(a.value, a.dtype, i * a.row + j * a.col);
      sum += x * x;
    }
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && j < a.cols) {
    for (int k = 1; k < 8; ++k) sum += sums[k][threadIdx.x];
    a.out[j] = (float)sqrt(sum);
  }
}

// Columns that are contiguous: a warp each.
__global__ void __launch_bounds__(256) norms_of_runs(const __grid_constant__ Norms a) {
  int64_t j = (int64_t)blockIdx.x * 8 + threadIdx.y;
  if (j >= a.cols) return;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < a.rows; i += 32) {
    double x = lro_read(a.value, a.dtype, i * a.row + j * a.col);
    sum += x * x;
  }
  for (int offset = 16; offset; offset >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (threadIdx.x == 0) a.out[j] = (float)sqrt(sum);
}

}  // namespace

LRO_EXPORT int lro_cuda_apply_scaled(const lro_apply* a, void* stream) {
  return launch<false>(a, stream);
}

LRO_EXPORT int lro_cuda_apply_sign(const lro_apply* a, void* stream) {
  return launch<true>(a, stream);
}

LRO_EXPORT int lro_cuda_coordinate_add(const lro_coordinate* a, void* stream) {
  if (!lro_known(a->weight_dtype) || a->grad_dtype != a->weight_dtype) return LRO_BAD_DTYPE;
  for (int64_t i = 0; i < a->count; ++i) {
    Coordinate c = {a->weights[i],
                    a->grads[i],
                    a->index[i],
                    a->lows[i],
                    a->picked[i],
                    a->rows[i],
                    a->cols[i],
                    a->weight_rows[i],
                    a->weight_cols[i],
                    a->grad_rows[i],
                    a->grad_cols[i],
                    a->low_rows[i],
                    a->low_cols[i],
                    a->finite ? a->finite[i] : nullptr,
                    (float)a->decay,
                    (float)(a->lr * a->scale),
                    (float)(a->lr * a->gain),
                    a->free_rule,
                    a->weight_dtype};
    if (c.rows == 0 || c.cols == 0) continue;
    bool by_column = c.weight_row < c.weight_col;
    dim3 grid(lro_grid(by_column ? c.rows : c.cols, 256, 65535),
              lro_grid(by_column ? c.cols : c.rows, 1, 65535));
    if (int error = lro_launch(coordinate, grid, 256, stream, c, by_column)) return error;
  }
  return LRO_OK;
}

LRO_EXPORT int lro_cuda_column_norms(const lro_norms* a, void* stream) {
  if (!lro_known(a->dtype)) return LRO_BAD_DTYPE;
  for (int64_t i = 0; i < a->count; ++i) {
    Norms n = {a->values[i],      a->outs[i],        a->rows[i], a->cols[i],
               a->row_strides[i], a->col_strides[i], a->dtype};
    if (n.cols == 0) continue;
    bool runs = n.row == 1;
    unsigned grid = lro_grid(n.cols, runs ? 8 : 32, 0x7fffffff);
    int error = lro_launch(runs ? norms_of_runs : norms, grid, dim3(32, 8), stream, n);
    if (error) return error;
  }
  return LRO_OK;
}
