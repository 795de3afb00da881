// adamw_direction, lion_direction, moment on float32 moments; stochastic_round.
// One launch serves up to LRO_LIST tensors: blockIdx.y is the tensor, blockIdx.x strides over it.
#include "common.cuh"

namespace {

enum Rule { ADAMW, LION, MOMENT };

struct List {
  const void* grad[LRO_LIST];
  void* out[LRO_LIST];
  float* first[LRO_LIST];
  float* second[LRO_LIST];
  const float* row_eps[LRO_LIST];
  const float* row_scale[LRO_LIST];
  const uint8_t* finite[LRO_LIST];
  int64_t numel[LRO_LIST];
  int64_t width[LRO_LIST];
  float eps[LRO_LIST];
};

struct Scalars {
  float a, b, c;
  int grad_dtype, out_dtype;
};

template <int RULE>
__global__ void __launch_bounds__(256) update(const __grid_constant__ List list, Scalars s) {
  int t = blockIdx.y;
  int64_t n = list.numel[t], step = (int64_t)gridDim.x * blockDim.x;
  bool finite = !list.finite[t] || *list.finite[t];
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
    float result = 0.0f;
    if (finite) {
      float g = lro_read(list.grad[t], s.grad_dtype, i), m = list.first[t][i];
      if (RULE == ADAMW) {
        float v = list.second[t][i], eps = list.eps[t], scale = 1.0f;
        if (list.row_eps[t]) {
          int64_t row = i / list.width[t];
          eps = list.row_eps[t][row];
          scale = list.row_scale[t][row];
        }
        m = lro_lerp(m, g, s.a);
        v = lro_square_avg(v, g, s.b, s.c);
        list.second[t][i] = v;
        result = lro_adamw(m, v, eps, scale);
      } else if (RULE == LION) {
        result = lro_sign_nan(lro_lerp(m, g, s.a));
        m = lro_lerp(m, g, s.b);
      } else {
        m = lro_moment(m, g, s.a, s.b);
        result = m;
      }
      list.first[t][i] = m;
    }
    lro_write(list.out[t], s.out_dtype, i, result);
  }
}

template <int RULE>
int launch(const lro_update* a, Scalars s, void* stream) {
  if (!lro_known(a->grad_dtype) || !lro_known(a->out_dtype)) return LRO_BAD_DTYPE;
  s.grad_dtype = a->grad_dtype;
  s.out_dtype = a->out_dtype;
  for (int64_t from = 0; from < a->count; from += LRO_LIST) {
    List list = {};
    int64_t count = a->count - from < LRO_LIST ? a->count - from : LRO_LIST, most = 0;
    for (int64_t k = 0; k < count; ++k) {
      int64_t i = from + k;
      list.grad[k] = a->grads[i];
      list.out[k] = a->outs[i];
      list.first[k] = a->first[i];
      list.numel[k] = a->numels[i];
      if (RULE == ADAMW) {
        list.second[k] = a->second[i];
        if (a->row_eps) {
          list.row_eps[k] = a->row_eps[i];
          list.row_scale[k] = a->row_scale[i];
          list.width[k] = a->widths[i];
        } else {
          list.eps[k] = a->eps[i];
        }
      }
      if (a->finite) list.finite[k] = a->finite[i];
      most = most < a->numels[i] ? a->numels[i] : most;
    }
    dim3 grid(lro_grid(most, 256 * 4, 4096), (unsigned)count);
    if (int error = lro_launch(update<RULE>, grid, 256, stream, list, s)) return error;
  }
  return LRO_OK;
}

struct Rounds {
  const float* value[LRO_LIST];
  uint16_t* out[LRO_LIST];
  int64_t numel[LRO_LIST];
  lro_place place[LRO_LIST];
  uint32_t seed[LRO_LIST];
};

__global__ void __launch_bounds__(256) round_kernel(const __grid_constant__ Rounds list) {
  int t = blockIdx.y;
  int64_t step = (int64_t)gridDim.x * blockDim.x;
  lro_place place = list.place[t];
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < list.numel[t]; i += step) {
    list.out[t][i] = lro_round_stochastic(list.value[t][i], lro_position(i, place), list.seed[t]);
  }
}

}  // namespace

LRO_EXPORT int lro_cuda_adamw_direction(const lro_update* a, void* stream) {
  return launch<ADAMW>(a, {(float)(1 - a->a), (float)a->b, (float)(1 - a->b), 0, 0}, stream);
}

LRO_EXPORT int lro_cuda_lion_direction(const lro_update* a, void* stream) {
  return launch<LION>(a, {(float)(1 - a->a), (float)(1 - a->b), 0.0f, 0, 0}, stream);
}

LRO_EXPORT int lro_cuda_moment(const lro_update* a, void* stream) {
  return launch<MOMENT>(a, {(float)a->a, (float)a->b, 0.0f, 0, 0}, stream);
}

LRO_EXPORT int lro_cuda_stochastic_round(const lro_rounding* a, void* stream) {
  for (int64_t from = 0; from < a->count; from += LRO_LIST) {
    Rounds list = {};
    int64_t count = a->count - from < LRO_LIST ? a->count - from : LRO_LIST, most = 0;
    for (int64_t k = 0; k < count; ++k) {
      list.value[k] = a->values[from + k];
      list.out[k] = a->outs[from + k];
      list.numel[k] = a->numels[from + k];
      list.seed[k] = a->seeds[from + k];
      list.place[k] = {a->widths[from + k], a->offsets[from + k], a->rows[from + k],
                       a->columns[from + k]};
      most = most < list.numel[k] ? list.numel[k] : most;
    }
    dim3 grid(lro_grid(most, 256 * 4, 4096), (unsigned)count);
    if (int error = lro_launch(round_kernel, grid, 256, stream, list)) return error;
  }
  return LRO_OK;
}

LRO_EXPORT const char* lro_isa(void) { return "cuda"; }

LRO_EXPORT void lro_sizes(int64_t sizes[10]) {
  const int64_t all[10] = LRO_SIZES;
  memcpy(sizes, all, sizeof all);
}
