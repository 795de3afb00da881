// Picked rows of W by a given direction or by AdamW itself, the others by the free rule: one pass.
#include <string.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "kernels.h"
#include "turn.h"

namespace {

const int64_t ROW_TASK = 1 << 15;  // elements of one task, in whole rows
const int64_t RUNS = TURNED;       // stored runs that are stepped together where rows are scattered
const int64_t PICKED = 256;        // picked entries of each that are gathered at a time

// One row, all of it by the free rule.
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

struct Adam {
  float w1, b2, w2, eps, decay, step;
};

// One picked row; W, G and the moments along it.
template <bool UNIT, class W, class G>
void adam_run(W* w, int64_t ws, const G* g, int64_t gs, float* __restrict m, float* __restrict v,
              int64_t n, Adam a) {
  if (UNIT) ws = gs = 1;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    float x = lro_load(g[j * gs]);
    m[j] = lro_lerp(m[j], x, a.w1);
    v[j] = lro_square_avg(v[j], x, a.b2, a.w2);
    float direction = lro_adamw(m[j], v[j], a.eps, 1.0f);
    lro_store(&w[j * ws], lro_step(lro_load(w[j * ws]), direction, a.decay, a.step));
  }
}

// A piece of W and of all that belongs to it: `runs` stored runs, the picked rows scattered in
// each.
template <class T>
struct Piece {
  T* w;
  const T* g;
  float *m, *v;                // of its first run
  int64_t wr, wc, gr, gc;      // strides along a run and across runs
  int64_t runs, rows, picked;  // of W
  int64_t row;                 // of the moments
  const int32_t* index;
  int rule;
  float free_step;
  Adam adam;
};

// AdamW on 16 picked rows of a piece, whose W and G were gathered by runs.
template <class T>
void turned(const Piece<T>& p, float* w, const float* g, int64_t k, int64_t rows) {
  alignas(64) float gt[RUNS * RUNS], wt[RUNS * RUNS];
  turn(g, PICKED, gt, RUNS);
  turn(w, PICKED, wt, RUNS);
  for (int64_t q = 0; q < rows; ++q) {
    float *m = p.m + (k + q) * p.row, *v = p.v + (k + q) * p.row;
    __builtin_prefetch(m + 2 * RUNS, 1);  // for the next piece: rows are far apart
    __builtin_prefetch(v + 2 * RUNS, 1);
    if (p.runs == RUNS) {
      adam_run<true>(wt + q * RUNS, 1, gt + q * RUNS, 1, m, v, RUNS, p.adam);
    } else {
      adam_run<true>(wt + q * RUNS, 1, gt + q * RUNS, 1, m, v, p.runs, p.adam);
    }
  }
  turn(wt, RUNS, w, PICKED);
}

// Which of the rows from `from` on are picked, as masks of 16; `count` whole masks. Where few are
// (or nothing packs by masks) there are none, and entries are taken one by one.
struct Masks {
  int64_t count;
  uint16_t bits[PICKED];
};

void find_masks(Masks* masks, const int32_t* at, int64_t picked, int64_t from, int64_t to) {
  masks->count = 0;
#ifdef __AVX512F__
  int64_t whole = (to - from) / RUNS;
  if (whole > PICKED || picked < whole) return;
  memset(masks->bits, 0, sizeof masks->bits);
  for (int64_t q = 0; q < picked && at[q] < from + whole * RUNS; ++q) {
    masks->bits[(at[q] - from) / RUNS] |= (uint16_t)(1u << ((at[q] - from) % RUNS));
  }
  masks->count = whole;
#else
  (void)at, (void)picked, (void)from, (void)to;
#endif
}

#ifdef __AVX512F__
template <class T>
__m512 load16(const T* x) {
  float y[RUNS];
#pragma omp simd
  for (int64_t i = 0; i < RUNS; ++i) y[i] = lro_load(x[i]);
  return _mm512_loadu_ps(y);
}
__m512 load16(const float* x) { return _mm512_loadu_ps(x); }

#endif

// The picked entries of a run, side by side; up to 16 numbers past them are overwritten.
template <bool UNIT, class T>
void gather(const T* x, int64_t stride, const Masks& masks, const int32_t* at, int64_t count,
            int64_t from, float* out) {
  int64_t q = 0;
#ifdef __AVX512F__
  for (int64_t b = 0; UNIT && b < masks.count; ++b) {
    __m512 v = _mm512_maskz_compress_ps(masks.bits[b], load16(x + from + b * RUNS));
    _mm512_storeu_ps(out + q, v);
    q += __builtin_popcount(masks.bits[b]);
  }
#else
  (void)masks, (void)from;
#endif
  for (; q < count; ++q) out[q] = lro_load(x[at[q] * (UNIT ? 1 : stride)]);
}

// The way back. Narrow formats would be rounded again along all of the run: entry by entry.
template <bool UNIT, class T>
void scatter(T* x, int64_t stride, const Masks&, const int32_t* at, int64_t count, int64_t,
             const float* in) {
  for (int64_t q = 0; q < count; ++q) lro_store(&x[at[q] * (UNIT ? 1 : stride)], in[q]);
}

#ifdef __AVX512F__
template <bool UNIT>
void scatter(float* x, int64_t stride, const Masks& masks, const int32_t* at, int64_t count,
             int64_t from, const float* in) {
  int64_t q = 0;
  for (int64_t b = 0; UNIT && b < masks.count; ++b) {
    float* run = x + from + b * RUNS;
    __m512 old = _mm512_loadu_ps(run);
    _mm512_storeu_ps(run, _mm512_mask_expand_ps(old, masks.bits[b], _mm512_loadu_ps(in + q)));
    q += __builtin_popcount(masks.bits[b]);
  }
  for (; q < count; ++q) x[at[q] * (UNIT ? 1 : stride)] = in[q];
}
#endif

// What is picked is gathered first, and turned so that a row of the moments is contiguous; the free
// rule runs over everything, so that it vectorises, and is replaced where rows are picked.
template <bool UNIT, class T>
void scattered(const Piece<T>& p) {
  alignas(64) float g[PICKED * RUNS + RUNS], w[PICKED * RUNS + RUNS];
  int64_t wr = UNIT ? 1 : p.wr, gr = UNIT ? 1 : p.gr, from = 0, k = 0;
  Masks masks;
  while (from < p.rows) {
    int64_t stop = lro_min(k + PICKED, p.picked);
    int64_t to = stop < p.picked ? p.index[stop] : p.rows;
    const int32_t* at = p.index + k;
    int64_t count = stop - k;
    find_masks(&masks, at, count, from, to);
    for (int64_t j = 0; j < p.runs; ++j) {
      const T* gj = p.g + j * p.gc;
      T* wj = p.w + j * p.wc;
      gather<UNIT>(gj, gr, masks, at, count, from, g + j * PICKED);
      gather<UNIT>(wj, wr, masks, at, count, from, w + j * PICKED);
      free_row<UNIT>(wj + from * wr, wr, gj + from * gr, gr, to - from, p.rule, p.adam.decay,
                     p.free_step);
    }
    for (int64_t q = 0; q < count; q += RUNS) {
      turned(p, w + q, g + q, k + q, lro_min(RUNS, count - q));
    }
    for (int64_t j = 0; j < p.runs; ++j) {
      scatter<UNIT>(p.w + j * p.wc, wr, masks, at, count, from, w + j * PICKED);
    }
    from = to;
    k = stop;
  }
}

template <class T>
void whole_rows(const lro_coordinate_step* a, int64_t i, int64_t begin, int64_t end, Adam adam) {
  int64_t k = position(a->index[i], a->picked[i], begin), n = a->cols[i];
  int64_t wc = a->weight_cols[i], gc = a->grad_cols[i];
  bool unit = wc == 1 && gc == 1;
  for (int64_t row = begin; row < end; ++row) {
    T* w = (T*)a->weights[i] + row * a->weight_rows[i];
    const T* g = (const T*)a->grads[i] + row * a->grad_rows[i];
    if (k < a->picked[i] && a->index[i][k] == row) {
      float *m = a->first[i] + k * n, *v = a->second[i] + k * n;
      if (unit) {
        adam_run<true>(w, 1, g, 1, m, v, n, adam);
      } else {
        adam_run<false>(w, wc, g, gc, m, v, n, adam);
      }
      ++k;
    } else if (unit) {
      free_row<true>(w, 1, g, 1, n, a->free_rule, adam.decay, a->free_steps[i]);
    } else {
      free_row<false>(w, wc, g, gc, n, a->free_rule, adam.decay, a->free_steps[i]);
    }
  }
}

template <class Args>
bool indices_fit(const Args* a) {
  for (int64_t i = 0; i < a->count; ++i) {
    if (!lro_ascends(a->index[i], a->picked[i], a->rows[i])) return false;
  }
  return true;
}

}  // namespace

int LRO_LOCAL(lro_coordinate_add)(const lro_coordinate* a, int threads) {
  if (a->grad_dtype != a->weight_dtype) return LRO_BAD_DTYPE;
  if (!indices_fit(a)) return LRO_BAD_INDEX;
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
          if (a->finite && !*a->finite[i]) return;
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

int LRO_LOCAL(lro_coordinate_adamw)(const lro_coordinate_step* a, int threads) {
  if (!indices_fit(a)) return LRO_BAD_INDEX;
  float w1 = (float)(1 - a->beta1), b2 = (float)a->beta2, w2 = (float)(1 - a->beta2);
  auto by_column = [&](int64_t i) { return a->weight_rows[i] < a->weight_cols[i]; };
  auto per_task = [&](int64_t i) {
    int64_t n = a->cols[i];
    return by_column(i) ? RUNS : n == 0 || ROW_TASK / n < 1 ? (int64_t)1 : ROW_TASK / n;
  };
  bool ok = lro_with_dtype(a->dtype, [&](auto* null) {
    using T = __typeof__(*null);
    lro_parallel(
        a->count, threads,
        [&](int64_t i) { return lro_ceil(by_column(i) ? a->cols[i] : a->rows[i], per_task(i)); },
        [&](int64_t i, int64_t task) {
          Adam adam = {w1, b2, w2, a->eps[i], (float)a->decay, a->steps[i]};
          int64_t begin = task * per_task(i);
          if (!by_column(i)) {
            whole_rows<T>(a, i, begin, lro_min(begin + per_task(i), a->rows[i]), adam);
            return;
          }
          Piece<T> p = {(T*)a->weights[i] + begin * a->weight_cols[i],
                        (const T*)a->grads[i] + begin * a->grad_cols[i],
                        a->first[i] + begin,
                        a->second[i] + begin,
                        a->weight_rows[i],
                        a->weight_cols[i],
                        a->grad_rows[i],
                        a->grad_cols[i],
                        lro_min(RUNS, a->cols[i] - begin),
                        a->rows[i],
                        a->picked[i],
                        a->cols[i],
                        a->index[i],
                        a->free_rule,
                        a->free_steps[i],
                        adam};
          if (p.wr == 1 && p.gr == 1) {
            scattered<true>(p);
          } else {
            scattered<false>(p);
          }
        });
  });
  return ok ? LRO_OK : LRO_BAD_DTYPE;
}
