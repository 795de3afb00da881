// What is stored by columns, by rows, and the way back.
#pragma once

#include <stdint.h>
#include <string.h>

namespace {

const int64_t TURNED = 16;

// 16 x 16 numbers turned, rows of x and of out `xs` and `os` apart.
void turn(const float* x, int64_t xs, float* out, int64_t os) {
#ifdef __AVX512F__
  typedef float Row __attribute__((vector_size(64)));
  typedef int32_t Order __attribute__((vector_size(64)));
  const Order low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  const Order high = low + 8;
  Row a[TURNED], b[TURNED];
  for (int i = 0; i < TURNED; ++i) memcpy(&a[i], x + i * xs, sizeof a[i]);
  for (int round = 0; round < 4; ++round) {  // four perfect shuffles of 16 rows turn them
    for (int i = 0; i < TURNED / 2; ++i) {
      b[2 * i] = __builtin_shuffle(a[i], a[i + TURNED / 2], low);
      b[2 * i + 1] = __builtin_shuffle(a[i], a[i + TURNED / 2], high);
    }
    for (int i = 0; i < TURNED; ++i) a[i] = b[i];
  }
  for (int i = 0; i < TURNED; ++i) memcpy(out + i * os, &a[i], sizeof a[i]);
#else
  for (int64_t i = 0; i < TURNED; ++i) {
    for (int64_t j = 0; j < TURNED; ++j) out[j * os + i] = x[i * xs + j];
  }
#endif
}

}  // namespace
