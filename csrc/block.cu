// The updates on 8-bit moments. A warp owns a quantisation block of up to 256 elements, eight a
// lane, in registers: the full moment never exists in memory. Maps and thresholds sit in shared
// memory, 2 KiB a map, filled once by each thread block, which then strides over the blocks.
#include "common.cuh"

namespace {

enum Rule { ADAMW, LION, MOMENT, QUANTIZE, DEQUANTIZE };
enum { WARPS = 8, ITEMS = LRO_MAX_BLOCK_CUDA / 32 };

struct List {
  void* grad[LRO_LIST];  // values of quantize and dequantize
  void* out[LRO_LIST];
  uint8_t* codes[LRO_LIST];
  float* scales[LRO_LIST];
  uint8_t* codes2[LRO_LIST];
  float* scales2[LRO_LIST];
  const float* row_eps[LRO_LIST];
  const float* row_scale[LRO_LIST];
  const uint8_t* finite[LRO_LIST];
  int64_t rows[LRO_LIST];
  int64_t cols[LRO_LIST];
  int64_t width[LRO_LIST];
  int32_t block[LRO_LIST];
  float eps[LRO_LIST];
};

struct Scalars {
  float a, b, c;
  int grad_dtype, out_dtype;
  const float *map, *map2;
};

struct Tables {
  float map[256];
  float thresholds[256];
};

__device__ void fill(Tables* t, const float* map) {
  int i = threadIdx.x;
  t->map[i] = map[i];
  t->thresholds[i] = i < 255 ? lro_threshold(map[i], map[i + 1]) : lro_float(0x7f800000u);
}

// SQUARES: a positive value keeps a positive code; as 0 the next step would divide by eps alone.
template <bool SQUARES>
__device__ void encode(const Tables& t, const float* x, uint8_t* codes, float* scale, int lane,
                       int length) {
  unsigned most = 0;
#pragma unroll
  for (int k = 0; k < ITEMS; ++k) {
    unsigned magnitude = lro_bits(x[k]) & 0x7fffffffu;
    if (lane + 32 * k < length) most = magnitude > most ? magnitude : most;
  }
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) {
    unsigned other = __shfl_xor_sync(0xffffffffu, most, offset);
    most = other > most ? other : most;
  }
  float absmax = lro_float(most > 0x7f800000u ? 0x7fc00000u : most);
  bool plain = most > 0 && most < 0x7f800000u;
  lro_inverse inverse = lro_invert(absmax);
#pragma unroll
  for (int k = 0; k < ITEMS; ++k) {
    int j = lane + 32 * k;
    float y = plain ? lro_normalise(x[k], inverse) : 0.0f;
    if (SQUARES && plain && x[k] > 0.0f) y = y > t.map[1] ? y : t.map[1];
    if (j < length) codes[j] = (uint8_t)lro_nearest(t.thresholds, y);
  }
  if (lane == 0) *scale = absmax;
}

template <int RULE>
__global__ void __launch_bounds__(32 * WARPS)
    update(const __grid_constant__ List list, const __grid_constant__ Scalars s) {
  __shared__ Tables tables[RULE == ADAMW ? 2 : 1];
  fill(&tables[0], s.map);
  if (RULE == ADAMW) fill(&tables[RULE == ADAMW ? 1 : 0], s.map2);
  __syncthreads();
  int t = blockIdx.y, lane = threadIdx.x % 32;
  int block = list.block[t];
  int64_t cols = list.cols[t], per_row = (cols + block - 1) / block;
  int64_t total = list.rows[t] * per_row, step = (int64_t)gridDim.x * WARPS;
  bool finite = !list.finite[t] || *list.finite[t];
  for (int64_t b = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32; b < total; b += step) {
    int64_t row = b / per_row, at = (b - row * per_row) * block, begin = row * cols + at;
    int length = (int)(cols - at < block ? cols - at : block);
    if (!finite) {
      for (int j = lane; j < length; j += 32) lro_write(list.out[t], s.out_dtype, begin + j, 0.0f);
      continue;
    }
    uint8_t* codes = list.codes[t] + begin;
    float scale = RULE == QUANTIZE ? 0.0f : list.scales[t][b];
    float m[ITEMS], v[ITEMS];
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
      int j = lane + 32 * k;
      m[k] = v[k] = 0.0f;
      if (j >= length) continue;
      if (RULE != QUANTIZE) m[k] = tables[0].map[codes[j]] * scale;
      if (RULE == DEQUANTIZE) {
        lro_write(list.grad[t], s.grad_dtype, begin + j, m[k]);
        continue;
      }
      float g = lro_read(list.grad[t], s.grad_dtype, begin + j), result = 0.0f;
      if (RULE == QUANTIZE) {
        m[k] = g;
        continue;
      }
      if (RULE == ADAMW) {
        v[k] = tables[RULE == ADAMW ? 1 : 0].map[list.codes2[t][begin + j]] * list.scales2[t][b];
        float eps = list.eps[t], row_scale = 1.0f;
        if (list.row_eps[t]) {
          int64_t r = (begin + j) / list.width[t];
          eps = list.row_eps[t][r];
          row_scale = list.row_scale[t][r];
        }
        m[k] = lro_lerp(m[k], g, s.a);
        v[k] = lro_square_avg(v[k], g, s.b, s.c);
        result = lro_adamw(m[k], v[k], eps, row_scale);
      } else if (RULE == LION) {
        result = lro_sign_nan(lro_lerp(m[k], g, s.a));
        m[k] = lro_lerp(m[k], g, s.b);
      } else {
        m[k] = lro_moment(m[k], g, s.a, s.b);
        result = m[k];
      }
      lro_write(list.out[t], s.out_dtype, begin + j, result);
    }
    __syncwarp();  // every lane has read the scales before lane 0 writes them
    if (RULE != DEQUANTIZE) encode<false>(tables[0], m, codes, &list.scales[t][b], lane, length);
    if (RULE == ADAMW) {
      encode<true>(tables[RULE == ADAMW ? 1 : 0], v, list.codes2[t] + begin, &list.scales2[t][b],
                   lane, length);
    }
  }
}

// fill_entry(list, k, i): what is particular to one family of ops.
template <int RULE, class Args, class Fill>
int launch(const Args* a, const Scalars& s, void* stream, Fill fill_entry) {
  for (int64_t i = 0; i < a->count; ++i) {
    if (a->blocks[i] < 1 || a->blocks[i] > LRO_MAX_BLOCK_CUDA) return LRO_BAD_BLOCK;
  }
  for (int64_t from = 0; from < a->count; from += LRO_LIST) {
    List list = {};
    int64_t count = a->count - from < LRO_LIST ? a->count - from : LRO_LIST, most = 0;
    for (int64_t k = 0; k < count; ++k) {
      int64_t i = from + k, block = a->blocks[i];
      list.rows[k] = a->rows[i];
      list.cols[k] = a->cols[i];
      list.block[k] = (int32_t)block;
      fill_entry(list, k, i);
      int64_t total = a->rows[i] * ((a->cols[i] + block - 1) / block);
      most = most < total ? total : most;
    }
    dim3 grid(lro_grid(most, WARPS * 4, 2048), (unsigned)count);
    if (int error = lro_launch(update<RULE>, grid, 32 * WARPS, stream, list, s)) return error;
  }
  return LRO_OK;
}

template <int RULE>
int launch_update(const lro_update* a, float x, float y, float z, void* stream) {
  if (!lro_known(a->grad_dtype) || !lro_known(a->out_dtype)) return LRO_BAD_DTYPE;
  Scalars s = {x, y, z, a->grad_dtype, a->out_dtype, a->signed_map, a->unsigned_map};
  return launch<RULE>(a, s, stream, [&](List& list, int64_t k, int64_t i) {
    list.grad[k] = (void*)a->grads[i];
    list.out[k] = a->outs[i];
    list.codes[k] = a->first_codes[i];
    list.scales[k] = a->first_scales[i];
    if (RULE == ADAMW) {
      list.codes2[k] = a->second_codes[i];
      list.scales2[k] = a->second_scales[i];
      if (a->row_eps) {
        list.row_eps[k] = a->row_eps[i];
        list.row_scale[k] = a->row_scale[i];
        list.width[k] = a->widths[i];
      } else {
        list.eps[k] = a->eps[i];
      }
    }
    if (a->finite) list.finite[k] = a->finite[i];
  });
}

template <int RULE>
int launch_blockwise(const lro_blockwise* a, void* stream) {
  if (!lro_known(a->dtype)) return LRO_BAD_DTYPE;
  Scalars s = {0.0f, 0.0f, 0.0f, a->dtype, a->dtype, a->map, nullptr};
  return launch<RULE>(a, s, stream, [&](List& list, int64_t k, int64_t i) {
    list.grad[k] = a->values[i];
    list.codes[k] = a->codes[i];
    list.scales[k] = a->scales[i];
  });
}

}  // namespace

LRO_EXPORT int lro_cuda_adamw_direction_8bit(const lro_update* a, void* stream) {
  return launch_update<ADAMW>(a, (float)(1 - a->a), (float)a->b, (float)(1 - a->b), stream);
}

LRO_EXPORT int lro_cuda_lion_direction_8bit(const lro_update* a, void* stream) {
  return launch_update<LION>(a, (float)(1 - a->a), (float)(1 - a->b), 0.0f, stream);
}

LRO_EXPORT int lro_cuda_moment_8bit(const lro_update* a, void* stream) {
  return launch_update<MOMENT>(a, (float)a->a, (float)a->b, 0.0f, stream);
}

LRO_EXPORT int lro_cuda_quantize(const lro_blockwise* a, void* stream) {
  return launch_blockwise<QUANTIZE>(a, stream);
}

LRO_EXPORT int lro_cuda_dequantize(const lro_blockwise* a, void* stream) {
  return launch_blockwise<DEQUANTIZE>(a, stream);
}
