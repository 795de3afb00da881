// The update loops that float32 and 8-bit moments share, on contiguous runs.
#pragma once

#include "elements.h"

namespace {

template <class G, class O>
void adamw(const G* __restrict g, float* __restrict m, float* __restrict v, O* __restrict out,
           int64_t n, float w1, float b2, float w2, float eps, float scale) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    float x = lro_load(g[i]);
    m[i] = lro_lerp(m[i], x, w1);
    v[i] = lro_square_avg(v[i], x, b2, w2);
    lro_store(&out[i], lro_adamw(m[i], v[i], eps, scale));
  }
}

template <class G, class O>
void lion(const G* __restrict g, float* __restrict m, O* __restrict out, int64_t n, float w1,
          float w2) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    float x = lro_load(g[i]);
    lro_store(&out[i], lro_sign_nan(lro_lerp(m[i], x, w1)));
    m[i] = lro_lerp(m[i], x, w2);
  }
}

template <class G, class O>
void moment(const G* __restrict g, float* __restrict m, O* __restrict out, int64_t n, float decay,
            float weight) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    m[i] = lro_moment(m[i], lro_load(g[i]), decay, weight);
    lro_store(&out[i], m[i]);
  }
}

}  // namespace
