// Tiles of 32 columns of a matrix of any strides: read into the rows of a buffer, and stepped by
// them.
#pragma once

#include <string.h>

#include "cosine.h"
#include "kernels.h"
#include "turn.h"

namespace {

struct Place {
  int64_t rows, cols;  // strides
  int64_t n, width;    // rows, and columns of this tile, at most 32
  bool folds;          // row j stands at folded(j) in a buffer

  int64_t at(int64_t row) const { return folds ? folded(row, n) : row; }
  bool by_row() const { return cols == 1 && width == COLUMNS; }
  bool by_column() const { return rows == 1; }
};

template <class T>
void load_entry(Row* z, const T* x, const Place& p, int64_t row, int64_t from) {
  float* out = (float*)&z[p.at(row)];
  for (int64_t l = from; l < lro_min(from + LANES, p.width); ++l) {
    out[l] = lro_load(x[row * p.rows + l * p.cols]);
  }
}

// Columns `from` to `from + 16`, stored one after the other.
template <class T>
void load_columns(Row* z, const T* x, const Place& p, int64_t from) {
  alignas(64) float own[LANES * TURNED], other[LANES * TURNED];
  int64_t row = 0;
  for (; from + LANES <= p.width && row + TURNED <= p.n; row += TURNED) {
    for (int64_t l = 0; l < LANES; ++l) {
      const T* run = x + row + (from + l) * p.cols;
#pragma omp simd
      for (int64_t j = 0; j < TURNED; ++j) own[l * TURNED + j] = lro_load(run[j]);
    }
    turn(own, TURNED, other, LANES);
    for (int64_t j = 0; j < TURNED; ++j) {
      memcpy((float*)&z[p.at(row + j)] + from, other + j * LANES, 4 * LANES);
    }
  }
  for (; row < p.n; ++row) load_entry(z, x, p, row, from);
}

template <class T>
void load(Row* z, const T* x, const Place& p) {
  if (p.by_row()) {
    for (int64_t row = 0; row < p.n; ++row) {
      const T* run = x + row * p.rows;
      float* out = (float*)&z[p.at(row)];
#pragma omp simd
      for (int64_t l = 0; l < COLUMNS; ++l) out[l] = lro_load(run[l]);
    }
    return;
  }
  if (p.width < COLUMNS) memset((void*)z, 0, sizeof(Row) * p.n);
  for (int64_t from = 0; from < p.width; from += LANES) {
    if (p.by_column()) {
      load_columns(z, x, p, from);
    } else {
      for (int64_t row = 0; row < p.n; ++row) load_entry(z, x, p, row, from);
    }
  }
}

struct Step {
  float decay, size;
};

template <class T>
void push_entry(T* w, const Row* z, const Place& p, int64_t row, int64_t from, Step s) {
  const float* x = (const float*)&z[p.at(row)];
  for (int64_t l = from; l < lro_min(from + LANES, p.width); ++l) {
    T* own = &w[row * p.rows + l * p.cols];
    lro_store(own, lro_step(lro_load(*own), x[l], s.decay, s.size));
  }
}

template <class T>
void push_columns(T* w, const Row* z, const Place& p, int64_t from, Step s) {
  alignas(64) float own[LANES * TURNED], other[LANES * TURNED];
  int64_t row = 0;
  for (; from + LANES <= p.width && row + TURNED <= p.n; row += TURNED) {
    for (int64_t j = 0; j < TURNED; ++j) {
      memcpy(own + j * LANES, (const float*)&z[p.at(row + j)] + from, 4 * LANES);
    }
    turn(own, LANES, other, TURNED);
    for (int64_t l = 0; l < LANES; ++l) {
      T* run = w + row + (from + l) * p.cols;
      const float* x = other + l * TURNED;
#pragma omp simd
      for (int64_t j = 0; j < TURNED; ++j) {
        lro_store(&run[j], lro_step(lro_load(run[j]), x[j], s.decay, s.size));
      }
    }
  }
  for (; row < p.n; ++row) push_entry(w, z, p, row, from, s);
}

// W <- decay W - size z.
template <class T>
void push(T* w, const Row* z, const Place& p, Step s) {
  if (p.by_row()) {
    for (int64_t row = 0; row < p.n; ++row) {
      T* run = w + row * p.rows;
      const float* x = (const float*)&z[p.at(row)];
#pragma omp simd
      for (int64_t l = 0; l < COLUMNS; ++l) {
        lro_store(&run[l], lro_step(lro_load(run[l]), x[l], s.decay, s.size));
      }
    }
    return;
  }
  for (int64_t from = 0; from < p.width; from += LANES) {
    if (p.by_column()) {
      push_columns(w, z, p, from, s);
    } else {
      for (int64_t row = 0; row < p.n; ++row) push_entry(w, z, p, row, from, s);
    }
  }
}

}  // namespace
