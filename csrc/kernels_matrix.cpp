// Passes over W and G in any strides: column norms, and what follows the GEMM of a fused apply.
#include "kernels.h"

namespace {

const int64_t ROW_TASK = 1 << 15;  // elements of one task, in whole rows
const int64_t STRIP = 256;         // columns of one task of column_norms
const int LANES = 16;

// One row of the two passes. UNIT: both inner strides are 1, and the loop vectorises.
template <bool UNIT, class W, class G, class L>
void scaled_row(W* w, int64_t wc, const G* g, int64_t gc, const L* low, const float* c, int64_t cc,
                int64_t n, float decay, float lr) {
  if (UNIT) wc = gc = 1;
  if (cc == 0) {
    float f = *c;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      float x =
          lro_scaled(lro_load(w[j * wc]), lro_load(low[j]), lro_load(g[j * gc]), f, decay, lr);
      lro_store(&w[j * wc], x);
    }
  } else {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      float x =
          lro_scaled(lro_load(w[j * wc]), lro_load(low[j]), lro_load(g[j * gc]), c[j], decay, lr);
      lro_store(&w[j * wc], x);
    }
  }
}

template <bool UNIT, class W, class G, class L>
void signed_row(W* w, int64_t wc, const G* g, int64_t gc, const L* low, const L* other, int64_t n,
                float decay, float lr, float scale, float gain) {
  if (UNIT) wc = gc = 1;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    float x = lro_signed(lro_load(w[j * wc]), lro_load(low[j]), lro_load(other[j]),
                         lro_load(g[j * gc]), decay, lr, scale, gain);
    lro_store(&w[j * wc], x);
  }
}

// f(row, typed W, G, low) over fixed runs of rows.
template <class F>
int over_rows(const lro_apply* a, int threads, F f) {
  if (a->grad_dtype != a->weight_dtype) return LRO_BAD_DTYPE;
  if (a->finite && !*a->finite) return LRO_OK;
  int64_t per_task = ROW_TASK / a->cols > 1 ? ROW_TASK / a->cols : 1;
  bool ok = false;
  lro_with_dtype(a->weight_dtype, [&](auto* w_null) {
    ok = lro_with_dtype(a->low_dtype, [&](auto* l_null) {
      lro_parallel(
          1, threads, [&](int64_t) { return lro_ceil(a->rows, per_task); },
          [&](int64_t, int64_t task) {
            int64_t end = lro_min((task + 1) * per_task, a->rows);
            for (int64_t i = task * per_task; i < end; ++i) {
              f(i, (decltype(w_null))a->weight + i * a->weight_row,
                (decltype(w_null))a->grad + i * a->grad_row,
                (decltype(l_null))a->low + i * a->low_row,
                (decltype(l_null))a->other + i * a->low_row);
            }
          });
    });
  });
  return ok ? LRO_OK : LRO_BAD_DTYPE;
}

template <class T>
void norms_by_strip(const T* x, int64_t rows, int64_t row, int64_t col, int64_t n, float* out) {
  double sum[STRIP] = {0};
  for (int64_t i = 0; i < rows; ++i) {
    const T* __restrict r = x + i * row;
    if (col == 1) {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        double v = lro_load(r[j]);
        sum[j] += v * v;
      }
    } else {
      for (int64_t j = 0; j < n; ++j) {
        double v = lro_load(r[j * col]);
        sum[j] += v * v;
      }
    }
  }
  for (int64_t j = 0; j < n; ++j) out[j] = (float)__builtin_sqrt(sum[j]);
}

// A column that is contiguous: sixteen partial sums whatever the vector width, added in order.
template <class T>
float norm_of_run(const T* __restrict x, int64_t n) {
  double sum[LANES] = {0};
  int64_t whole = n - n % LANES;
  for (int64_t i = 0; i < whole; i += LANES) {
#pragma omp simd
    for (int k = 0; k < LANES; ++k) {
      double v = lro_load(x[i + k]);
      sum[k] += v * v;
    }
  }
  for (int64_t i = whole; i < n; ++i) {
    double v = lro_load(x[i]);
    sum[i - whole] += v * v;
  }
  double total = 0;
  for (int k = 0; k < LANES; ++k) total += sum[k];
  return (float)__builtin_sqrt(total);
}

}  // namespace

int LRO_LOCAL(lro_apply_scaled)(const lro_apply* a, int threads) {
  float decay = (float)a->decay, lr = (float)a->lr;
  bool unit = a->weight_col == 1 && a->grad_col == 1;
  return over_rows(a, threads, [&](int64_t i, auto* w, auto* g, auto* low, auto*) {
    const float* c = a->factor + i * a->factor_row;
    if (unit) {
      scaled_row<true>(w, 1, g, 1, low, c, a->factor_col, a->cols, decay, lr);
    } else {
      scaled_row<false>(w, a->weight_col, g, a->grad_col, low, c, a->factor_col, a->cols, decay,
                        lr);
    }
  });
}

int LRO_LOCAL(lro_apply_sign)(const lro_apply* a, int threads) {
  float decay = (float)a->decay, lr = (float)a->lr, scale = (float)a->scale, gain = (float)a->gain;
  bool unit = a->weight_col == 1 && a->grad_col == 1;
  return over_rows(a, threads, [&](int64_t, auto* w, auto* g, auto* low, auto* other) {
    if (unit) {
      signed_row<true>(w, 1, g, 1, low, other, a->cols, decay, lr, scale, gain);
    } else {
      signed_row<false>(w, a->weight_col, g, a->grad_col, low, other, a->cols, decay, lr, scale,
                        gain);
    }
  });
}

int LRO_LOCAL(lro_column_norms)(const lro_norms* a, int threads) {
  bool ok = lro_with_dtype(a->dtype, [&](auto* null) {
    using T = __typeof__(*null);
    lro_parallel(
        a->count, threads, [&](int64_t i) { return lro_ceil(a->cols[i], STRIP); },
        [&](int64_t i, int64_t task) {
          int64_t begin = task * STRIP, n = lro_min(STRIP, a->cols[i] - begin);
          const T* x = (const T*)a->values[i] + begin * a->col_strides[i];
          if (a->row_strides[i] == 1) {
            for (int64_t j = 0; j < n; ++j) {
              a->outs[i][begin + j] = norm_of_run(x + j * a->col_strides[i], a->rows[i]);
            }
          } else {
            norms_by_strip(x, a->rows[i], a->row_strides[i], a->col_strides[i], n,
                           a->outs[i] + begin);
          }
        });
  });
  return ok ? LRO_OK : LRO_BAD_DTYPE;
}
