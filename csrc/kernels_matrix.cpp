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
  if (a->sound && !*a->sound) return LRO_OK;
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

// One row of coordinate_add, all of it by the free rule.
template <bool UNIT, class T>
void free_row(T* w, int64_t wc, const T* g, int64_t gc, int64_t n, int rule, float decay,
              float step) {
  if (UNIT) wc = gc = 1;
  if (rule == LRO_FREE_SIGN) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      lro_store(&w[j * wc],
                lro_step(lro_load(w[j * wc]), lro_sign_nan(lro_load(g[j * gc])), decay, step));
    }
  } else if (rule == LRO_FREE_IDENTITY) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      lro_store(&w[j * wc], lro_step(lro_load(w[j * wc]), lro_load(g[j * gc]), decay, step));
    }
  } else if (decay != 1.0f) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) lro_store(&w[j * wc], decay * lro_load(w[j * wc]));
  }
}

template <class T>
void free_any(T* w, int64_t wc, const T* g, int64_t gc, int64_t n, int rule, float decay,
              float step) {
  if (wc == 1 && gc == 1) {
    free_row<true>(w, wc, g, gc, n, rule, decay, step);
  } else {
    free_row<false>(w, wc, g, gc, n, rule, decay, step);
  }
}

template <class T>
void picked_row(T* w, int64_t wc, const float* low, int64_t lc, int64_t n, float decay,
                float step) {
  if (wc == 1 && lc == 1) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      lro_store(&w[j], lro_step(lro_load(w[j]), low[j], decay, step));
    }
  } else {
    for (int64_t j = 0; j < n; ++j) {
      lro_store(&w[j * wc], lro_step(lro_load(w[j * wc]), low[j * lc], decay, step));
    }
  }
}

// The position in `index` (sorted) of its first entry that is at least `row`.
int64_t position(const int32_t* index, int64_t k, int64_t row) {
  int64_t low = 0;
  while (low < k) {
    int64_t middle = (low + k) / 2;
    if (index[middle] < row) {
      low = middle + 1;
    } else {
      k = middle;
    }
  }
  return low;
}

const int64_t SAVED = 1024;

// W stored by columns: along a stored run the picked entries are scattered. The free rule runs over
// all of it, so that it vectorises, and what it wrote there is replaced from saved values.
template <class T>
void scattered_run(const lro_coordinate* a, int64_t i, int64_t col, float decay, float lr_scale,
                   float lr_gain) {
  T* w = (T*)a->weights[i] + col * a->weight_cols[i];
  const T* g = (const T*)a->grads[i] + col * a->grad_cols[i];
  const float* low = a->lows[i] + col * a->low_cols[i];
  const int32_t* index = a->index[i];
  int64_t wr = a->weight_rows[i], gr = a->grad_rows[i], lr_ = a->low_rows[i];
  float saved[SAVED];
  int64_t from = 0, k = 0;
  while (from < a->rows[i]) {
    int64_t stop = lro_min(k + SAVED, a->picked[i]);
    int64_t to = stop < a->picked[i] ? index[stop] : a->rows[i];
    for (int64_t q = k; q < stop; ++q) saved[q - k] = lro_load(w[index[q] * wr]);
    free_any(w + from * wr, wr, g + from * gr, gr, to - from, a->free_rule, decay, lr_gain);
    for (int64_t q = k; q < stop; ++q) {
      lro_store(&w[index[q] * wr], lro_step(saved[q - k], low[q * lr_], decay, lr_scale));
    }
    from = to;
    k = stop;
  }
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

int LRO_LOCAL(lro_coordinate_add)(const lro_coordinate* a, int threads) {
  if (a->grad_dtype != a->weight_dtype) return LRO_BAD_DTYPE;
  float decay = (float)a->decay;
  float lr_scale = (float)(a->lr * a->scale), lr_gain = (float)(a->lr * a->gain);
  auto by_column = [&](int64_t i) { return a->weight_rows[i] < a->weight_cols[i]; };
  auto outer = [&](int64_t i) { return by_column(i) ? a->cols[i] : a->rows[i]; };
  auto inner = [&](int64_t i) { return by_column(i) ? a->rows[i] : a->cols[i]; };
  auto per_task = [&](int64_t i) {
    int64_t n = inner(i);
    return n == 0 || ROW_TASK / n < 1 ? (int64_t)1 : ROW_TASK / n;
  };
  bool ok = lro_with_dtype(a->weight_dtype, [&](auto* null) {
    using T = __typeof__(*null);
    lro_parallel(
        a->count, threads, [&](int64_t i) { return lro_ceil(outer(i), per_task(i)); },
        [&](int64_t i, int64_t task) {
          if (a->sound && !*a->sound[i]) return;
          int64_t begin = task * per_task(i), end = lro_min(begin + per_task(i), outer(i));
          if (by_column(i)) {
            for (int64_t j = begin; j < end; ++j) {
              scattered_run<T>(a, i, j, decay, lr_scale, lr_gain);
            }
            return;
          }
          int64_t k = position(a->index[i], a->picked[i], begin), wc = a->weight_cols[i];
          for (int64_t row = begin; row < end; ++row) {
            T* w = (T*)a->weights[i] + row * a->weight_rows[i];
            if (k < a->picked[i] && a->index[i][k] == row) {
              picked_row(w, wc, a->lows[i] + k * a->low_rows[i], a->low_cols[i], a->cols[i], decay,
                         lr_scale);
              ++k;
            } else {
              const T* g = (const T*)a->grads[i] + row * a->grad_rows[i];
              free_any(w, wc, g, a->grad_cols[i], a->cols[i], a->free_rule, decay, lr_gain);
            }
          }
        });
  });
  return ok ? LRO_OK : LRO_BAD_DTYPE;
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
