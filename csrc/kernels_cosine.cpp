// The fast cosine transform: scores, coordinates, lifts and whole AdamW steps of matrices, a tile
// of 32 columns at a time. A tile stays in the second-level cache between its transforms, so that
// no spectrum and no basis is ever in memory.
#include <stdlib.h>
#include <string.h>

#include "columns.h"
#include "cosine.h"
#include "kernels.h"

namespace {

const int64_t STRIP = 4 * COLUMNS;  // of one task; a task has sums of its own

// --- scratch memory, one a thread, kept between calls ------------------------------------------

struct Scratch {
  char* memory = nullptr;
  size_t size = 0;
  ~Scratch() { free(memory); }

  char* get(size_t wanted) {
    if (wanted > size) {
      free(memory);
      size = (wanted + 4095) / 4096 * 4096;
      memory = (char*)aligned_alloc(4096, size);
      if (!memory) size = 0;
    }
    return memory;
  }
};

thread_local Scratch scratch;

// What a thread holds of a strip of columns.
struct Buffers {
  Row *one, *two;  // a tile, n each
  float* sums;     // LANES a row
  float* picked;   // coefficients, STRIP a row

  bool get(int64_t n, int64_t count) {
    size_t bytes = (2 * sizeof(Row) + 4 * LANES) * n + 4 * STRIP * count;
    one = (Row*)scratch.get(bytes), two = one + n;
    sums = (float*)(two + n), picked = sums + LANES * n;
    return one != nullptr;
  }
};

// --- the ops on one tile -----------------------------------------------------------------------

// One matrix of a call, and a tile of it from column `begin` on.
struct Tile {
  const lro_cosine* a;
  int64_t i, begin, width;
  Transform transform;
  Buffers* own;

  bool dct2() const { return a->basis == LRO_DCT2; }
  int64_t cols() const { return a->cols[i]; }
  // where coefficient k stands, before a synthesis and after an analysis
  int64_t slot(int64_t k) const { return dct2() ? k : folded(k, a->rows); }

  Place grad() const { return {a->grad_rows[i], a->grad_cols[i], a->rows, width, dct2()}; }
  Place weight() const { return {a->weight_rows[i], a->weight_cols[i], a->rows, width, dct2()}; }

  template <class T>
  const T* grad_from(int64_t column) const {
    return (const T*)a->grads[i] + column * a->grad_cols[i];
  }
  template <class T>
  T* weight_from(int64_t column) const {
    return (T*)a->weights[i] + column * a->weight_cols[i];
  }

  // The gradient of the next tile, if its rows are far apart and there is one.
  template <class T>
  void expect_grad(Ahead* ahead) const {
    if (grad().by_row() && begin + COLUMNS < cols()) {
      ahead->add(0, grad_from<T>(begin + COLUMNS), sizeof(T) * a->grad_rows[i], a->rows);
    }
  }

  template <class T>
  void expect_weight(Ahead* ahead) const {
    if (weight().by_row()) {
      ahead->add(2, weight_from<T>(begin), sizeof(T) * a->weight_rows[i], a->rows);
    }
  }

  template <class T>
  Row* coefficients(Ahead* ahead) const {
    load(own->one, grad_from<T>(begin), grad());
    return dct2() ? analyse(own->one, own->two, transform, *ahead)
                  : synthesise(own->one, own->two, transform, *ahead);
  }

  Row* other(const Row* z) const { return z == own->one ? own->two : own->one; }

  template <class T>
  void lift(Row* z, Step step, Ahead* ahead) const {
    Row* x = dct2() ? synthesise(z, other(z), transform, *ahead)
                    : analyse(z, other(z), transform, *ahead);
    push(weight_from<T>(begin), x, weight(), step);
  }
};

// The columns of one task.
struct Strip {
  const lro_cosine* a;
  int64_t i, begin, width;
  Buffers* own;

  template <class F>
  void tiles(F f) const {
    Transform transform = transform_of(a->rows, a->turns);
    for (int64_t at = begin; at < begin + width; at += COLUMNS) {
      f(Tile{a, i, at, lro_min(COLUMNS, begin + width - at), transform, own});
    }
  }
};

template <class T>
void add_scores(const Strip& s, float* out) {
  typedef int32_t Bits __attribute__((vector_size(4 * WIDTH)));
  const int32_t positive = 0x7fffffff;
  const int64_t rows = s.a->rows;
  const bool l1 = s.a->norm == LRO_L1;
  float* sums = s.own->sums;
  memset(sums, 0, 4 * LANES * rows);
  auto count = [&](int64_t k, int64_t lane, const Pair& c) {
    float* own = sums + k * LANES + lane;
    if (l1) {
      put(own, get(own) + ((Vec)((Bits)c.a & positive) + (Vec)((Bits)c.b & positive)));
    } else {
      put(own, get(own) + (c.a * c.a + c.b * c.b));
    }
  };
  s.tiles([&](const Tile& t) {
    Ahead ahead;
    t.expect_grad<T>(&ahead);
    if (t.dct2()) {  // as they are made: they are not written
      load(t.own->one, t.grad_from<T>(t.begin), t.grad());
      coefficients(fft(t.own->one, t.own->two, t.transform, ahead), t.transform, count);
      return;
    }
    const Row* x = t.coefficients<T>(&ahead);
    for (int64_t k = 0; k < rows; ++k) {
      for (int64_t lane = 0; lane < LANES; lane += WIDTH) {
        count(k, lane, get(x[t.slot(k)], lane));
      }
    }
  });
  for (int64_t k = 0; k < rows; ++k) {
    float sum = 0.0f;
    for (int64_t l = 0; l < LANES; ++l) sum += sums[k * LANES + l];
    out[k] = sum;
  }
}

template <class T>
void project(const Strip& s) {
  const lro_cosine* a = s.a;
  s.tiles([&](const Tile& t) {
    Ahead ahead;
    t.expect_grad<T>(&ahead);
    const Row* x = t.coefficients<T>(&ahead);
    for (int64_t k = 0; k < a->picked[s.i]; ++k) {
      memcpy(a->lows[s.i] + k * t.cols() + t.begin, &x[t.slot(a->index[s.i][k])], 4 * t.width);
    }
  });
}

template <class T>
void lift_add(const Strip& s) {
  const lro_cosine* a = s.a;
  s.tiles([&](const Tile& t) {
    Row* z = t.own->one;
    memset((void*)z, 0, sizeof(Row) * a->rows);
    for (int64_t k = 0; k < a->picked[s.i]; ++k) {
      const float* in = a->lows[s.i] + k * t.cols() + t.begin;
      memcpy((void*)&z[t.slot(a->index[s.i][k])], in, 4 * t.width);
    }
    Ahead ahead;
    t.expect_weight<T>(&ahead);
    t.lift<T>(z, {(float)a->decay, a->steps[s.i]}, &ahead);
  });
}

struct Adam {
  float w1, b2, w2;
};

LRO_INLINE void adam_row(const float* x, const float* m_in, const float* v_in, float* m, float* v,
                         float* out, int64_t n, Adam a, float eps, float scale) {
#pragma omp simd
  for (int64_t l = 0; l < n; ++l) {
    float m_new = lro_lerp(m_in[l], x[l], a.w1);
    float v_new = lro_square_avg(v_in[l], x[l], a.b2, a.w2);
    m[l] = m_new;
    v[l] = v_new;
    out[l] = lro_adamw(m_new, v_new, eps, scale);
  }
}

// AdamW on what was picked of a strip, in place: coefficients become directions.
struct Moments {
  const lro_cosine* a;
  int64_t i, begin, width;
  float* picked;
  Adam adam;

  void row(int64_t k, int64_t from) const {
    const int64_t n = a->cols[i];
    static const float zeros[STRIP] = {};
    float *m = a->first[i] + k * n + begin, *v = a->second[i] + k * n + begin;
    const float* m_in = from < 0 ? zeros : a->first[i] + from * n + begin;
    const float* v_in = from < 0 ? zeros : a->second[i] + from * n + begin;
    float eps = a->row_eps ? a->row_eps[i][k] : a->eps[i];
    float scale = a->row_scale ? a->row_scale[i][k] : 1.0f;
    float* x = picked + k * STRIP;
    adam_row(x, m_in, v_in, m, v, x, width, adam, eps, scale);
  }

  // Both sets of rows ascend, so those that move down are overwritten by none that moves down
  // before they are read when they are taken in order, those that move up in reverse, and new rows
  // come last.
  void rows() const {
    const int64_t picked_rows = a->picked[i];
    const int32_t* source = a->source ? a->source[i] : nullptr;
    for (int64_t k = 0; k < picked_rows; ++k) {
      if (!source || source[k] >= k) row(k, source ? source[k] : k);
    }
    for (int64_t k = picked_rows - 1; source && k >= 0; --k) {
      if (source[k] >= 0 && source[k] < k) row(k, source[k]);
    }
    for (int64_t k = 0; source && k < picked_rows; ++k) {
      if (source[k] < 0) row(k, -1);
    }
  }
};

template <class T>
void step(const Strip& s, Adam adam) {
  const lro_cosine* a = s.a;
  const int64_t i = s.i, picked = a->picked[i];
  s.tiles([&](const Tile& t) {
    Ahead ahead;
    t.expect_grad<T>(&ahead);
    const Row* x = t.coefficients<T>(&ahead);
    float* out = s.own->picked + (t.begin - s.begin);
    for (int64_t k = 0; k < picked; ++k) {
      memcpy(out + k * STRIP, &x[t.slot(a->index[i][k])], sizeof(Row));
    }
  });
  Moments{a, i, s.begin, s.width, s.own->picked, adam}.rows();
  s.tiles([&](const Tile& t) {
    Row* z = t.own->one;
    const float* in = s.own->picked + (t.begin - s.begin);
    memset((void*)z, 0, sizeof(Row) * a->rows);
    for (int64_t k = 0; k < picked; ++k) {
      memcpy((void*)&z[t.slot(a->index[i][k])], in + k * STRIP, sizeof(Row));
    }
    Ahead ahead;
    t.expect_weight<T>(&ahead);
    t.lift<T>(z, {(float)a->decay, a->steps[i]}, &ahead);
  });
}

// --- calls -------------------------------------------------------------------------------------

int64_t strips(const lro_cosine* a, int64_t i) { return lro_ceil(a->cols[i], STRIP); }

// Calls f(strip, task) for every strip of every matrix.
template <class F>
int for_strips(const lro_cosine* a, int threads, bool picks, F f) {
  bool short_of_memory = false;
  auto tasks = [&](int64_t i) { return strips(a, i); };
  lro_parallel(a->count, threads, tasks, [&](int64_t i, int64_t task) {
    Buffers own;
    if (!own.get(a->rows, picks ? a->picked[i] : 0)) {
      __atomic_store_n(&short_of_memory, true, __ATOMIC_RELAXED);
      return;
    }
    int64_t begin = task * STRIP;
    f(Strip{a, i, begin, lro_min(STRIP, a->cols[i] - begin), &own}, task);
  });
  return short_of_memory ? LRO_NO_MEMORY : LRO_OK;
}

int valid(const lro_cosine* a) {
  for (int64_t n = a->rows; n > 1; n /= next_factor(n)) {
    if (next_factor(n) > LARGEST_FACTOR) return LRO_BAD_LENGTH;
  }
  if (a->rows < 1) return LRO_BAD_LENGTH;
  for (int64_t i = 0; i < a->count; ++i) {
    bool fits = !a->index || lro_ascends(a->index[i], a->picked[i], a->rows);
    if (fits && a->source) fits = lro_ascends(a->source[i], a->picked[i], a->picked[i], -1);
    if (!fits) return LRO_BAD_INDEX;
  }
  return LRO_OK;
}

// Calls f(strip, a null pointer of the storage format).
template <class F>
int run(const lro_cosine* a, int threads, bool picks, F f) {
  int status = valid(a);
  bool known = lro_with_dtype(a->dtype, [&](auto* null) {
    if (status != LRO_OK) return;
    status = for_strips(a, threads, picks, [&](const Strip& s, int64_t task) { f(s, task, null); });
  });
  return known ? status : LRO_BAD_DTYPE;
}

}  // namespace

int LRO_LOCAL(lro_cosine_scores)(const lro_cosine* a, int threads) {
  int64_t all = 0;
  for (int64_t i = 0; i < a->count; ++i) all += strips(a, i);
  float* partial = (float*)malloc(sizeof(float) * (size_t)(all * a->rows + 1));
  if (!partial) return LRO_NO_MEMORY;
  auto of = [&](int64_t i, int64_t task) {  // what a task adds up, matrices one after the other
    for (int64_t j = 0; j < i; ++j) task += strips(a, j);
    return partial + task * a->rows;
  };
  int status = run(a, threads, false, [&](const Strip& s, int64_t task, auto* null) {
    add_scores<__typeof__(*null)>(s, of(s.i, task));
  });
  for (int64_t i = 0; status == LRO_OK && i < a->count; ++i) {
    for (int64_t k = 0; k < a->rows; ++k) {
      double sum = 0.0;
      for (int64_t task = 0; task < strips(a, i); ++task) sum += of(i, task)[k];
      a->scores[i][k] = (float)sum;
    }
  }
  free(partial);
  return status;
}

int LRO_LOCAL(lro_cosine_project)(const lro_cosine* a, int threads) {
  return run(a, threads, false,
             [](const Strip& s, int64_t, auto* null) { project<__typeof__(*null)>(s); });
}

int LRO_LOCAL(lro_cosine_lift_add)(const lro_cosine* a, int threads) {
  return run(a, threads, false,
             [](const Strip& s, int64_t, auto* null) { lift_add<__typeof__(*null)>(s); });
}

int LRO_LOCAL(lro_cosine_adamw)(const lro_cosine* a, int threads) {
  Adam adam = {(float)(1.0 - a->beta1), (float)a->beta2, (float)(1.0 - a->beta2)};
  return run(a, threads, true,
             [&](const Strip& s, int64_t, auto* null) { step<__typeof__(*null)>(s, adam); });
}

// The r-th largest score is found by its bits, one after the other: they are in order for numbers
// that are not negative.
int LRO_LOCAL(lro_top_rows)(const lro_top* a, int threads) {
  bool short_of_memory = false;
  lro_parallel(
      a->count, threads, [](int64_t) { return (int64_t)1; },
      [&](int64_t i, int64_t) {
        const int64_t rows = a->rows[i], picked = a->picked[i];
        const float* scores = a->scores[i];
        int32_t *index = a->index[i], *source = a->source[i];
        auto at_least = [&](uint32_t bits) {
          int64_t found = 0;
          for (int64_t k = 0; k < rows; ++k) found += lro_bits(scores[k]) >= bits;
          return found;
        };
        uint32_t least = 0;
        for (int bit = 30; bit >= 0; --bit) {
          if (at_least(least | 1u << bit) >= picked) least |= 1u << bit;
        }
        int64_t equal = picked - at_least(least + 1);  // how many are taken of those equal to it
        int32_t* old = (int32_t*)scratch.get(4 * picked + 4);
        if (!old) {
          __atomic_store_n(&short_of_memory, true, __ATOMIC_RELAXED);
          return;
        }
        memcpy(old, index, 4 * picked);
        for (int64_t k = 0, j = 0, from = 0; j < picked && k < rows; ++k) {
          while (from < picked && old[from] < k) ++from;
          uint32_t bits = lro_bits(scores[k]);
          if (bits < least || (bits == least && equal-- <= 0)) continue;
          index[j] = (int32_t)k;
          source[j++] = from < picked && old[from] == k ? (int32_t)from : -1;
        }
      });
  return short_of_memory ? LRO_NO_MEMORY : LRO_OK;
}
