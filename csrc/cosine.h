// The orthonormal DCT-II of columns, and its inverse, on 32 columns side by side.
//
// Column l is the real part of a complex sequence and column 16 + l its imaginary part, so that
// one complex FFT of length n serves both; vectors run over columns, and no stage moves a number
// from one lane to another. Every element is computed in the same order on every instruction set.
#pragma once

#include <stdint.h>
#include <string.h>

#include "elements.h"

namespace {

const int64_t LANES = 16;
const int64_t COLUMNS = 2 * LANES;  // of one tile
#if defined(__AVX512F__)
const int64_t WIDTH = 16;  // lanes of one vector: wider ones than the machine's go through memory
#elif defined(__AVX2__)
const int64_t WIDTH = 8;
#else
const int64_t WIDTH = 4;
#endif
const int64_t LARGEST_FACTOR = 61;  // a stage of a prime p takes p / 2 products a number

#define LRO_INLINE_METHOD inline __attribute__((always_inline))
#define LRO_INLINE static LRO_INLINE_METHOD

typedef float Vec __attribute__((vector_size(4 * WIDTH)));

struct Row {  // in memory: 16 columns and 16 more
  alignas(64) float a[LANES], b[LANES];
};

struct Pair {  // some of both, in registers: real and imaginary parts
  Vec a, b;
};

LRO_INLINE Vec get(const float* x) {
  Vec v;
  memcpy(&v, x, sizeof v);
  return v;
}
LRO_INLINE void put(float* x, const Vec& v) { memcpy(x, &v, sizeof v); }
LRO_INLINE Pair get(const Row& x, int64_t lane) { return {get(x.a + lane), get(x.b + lane)}; }
LRO_INLINE void put(Row* x, int64_t lane, const Pair& p) {
  put(x->a + lane, p.a);
  put(x->b + lane, p.b);
}

LRO_INLINE Pair add(const Pair& x, const Pair& y) { return {x.a + y.a, x.b + y.b}; }
LRO_INLINE Pair sub(const Pair& x, const Pair& y) { return {x.a - y.a, x.b - y.b}; }
LRO_INLINE Pair mul(const Pair& x, float re, float im) {
  return {x.a * re - x.b * im, x.a * im + x.b * re};
}

struct Transform {
  int64_t n;
  const float* unit;  // exp(-2 pi i k / n), k < n, as pairs of floats
  // cos and sin of pi k / 2n for k <= n / 2, times sqrt(2 / n) or, for k = 0, sqrt(1 / n)
  const float* twiddle;
};

LRO_INLINE Transform transform_of(int64_t n, const float* turns) {
  return {n, turns, turns + 2 * n};
}

// --- what is read next, fetched while numbers are turned ----------------------------------------

// Rows of a matrix that are far apart: no hardware foresees them, and a loop that only loads waits
// for every one.
struct Ahead {
  struct Rows {
    const char* at;
    int64_t stride, left;  // in bytes; rows
  };
  Rows rows[3] = {};

  void add(int i, const void* from, int64_t bytes, int64_t count) {
    rows[i] = {(const char*)from, bytes, count};
  }

  LRO_INLINE_METHOD void next() {
    for (int i = 0; i < 3; ++i) {
      if (rows[i].left <= 0) continue;
      __builtin_prefetch(rows[i].at, 0, 2);
      __builtin_prefetch(rows[i].at + 64, 0, 2);
      rows[i].at += rows[i].stride;
      --rows[i].left;
    }
  }
};

// --- FFT: split in place until it fits the cache, then Stockham's stages ----------------------

template <int R>
struct Butterfly {  // an odd prime; R == 0: any, given at run time
  LRO_INLINE void run(Pair* x, int64_t given, const Transform& t) {
    const int64_t r = R ? R : given, half = (r - 1) / 2, step = t.n / r;
    Pair plus[R ? R / 2 : LARGEST_FACTOR / 2], minus[R ? R / 2 : LARGEST_FACTOR / 2];
    Pair first = x[0];
    for (int64_t l = 0; l < half; ++l) {
      plus[l] = add(x[l + 1], x[r - 1 - l]);
      minus[l] = sub(x[l + 1], x[r - 1 - l]);
      x[0] = add(x[0], plus[l]);
    }
    for (int64_t j = 1; j <= half; ++j) {
      Pair even = first, odd = {even.a - even.a, even.b - even.b};
      for (int64_t l = 0; l < half; ++l) {
        const float* w = t.unit + 2 * (j * (l + 1) % r) * step;
        even.a += plus[l].a * w[0];
        even.b += plus[l].b * w[0];
        odd.a -= minus[l].b * w[1];
        odd.b += minus[l].a * w[1];
      }
      x[j] = add(even, odd);
      x[r - j] = sub(even, odd);
    }
  }
};

template <>
struct Butterfly<2> {
  LRO_INLINE void run(Pair* x, int64_t, const Transform&) {
    Pair y = x[0];
    x[0] = add(y, x[1]);
    x[1] = sub(y, x[1]);
  }
};

template <>
struct Butterfly<4> {
  LRO_INLINE void run(Pair* x, int64_t, const Transform&) {
    Pair p = add(x[0], x[2]), q = sub(x[0], x[2]);
    Pair r = add(x[1], x[3]), s = sub(x[1], x[3]);
    Pair turned = {s.b, -s.a};
    x[0] = add(p, r);
    x[1] = add(q, turned);
    x[2] = sub(p, r);
    x[3] = sub(q, turned);
  }
};

template <>
struct Butterfly<8> {
  LRO_INLINE void run(Pair* x, int64_t, const Transform& t) {
    const float h = 0.70710678f;  // sqrt(1 / 2)
    Pair even[4] = {x[0], x[2], x[4], x[6]}, odd[4] = {x[1], x[3], x[5], x[7]};
    Butterfly<4>::run(even, 4, t);
    Butterfly<4>::run(odd, 4, t);
    odd[1] = {(odd[1].a + odd[1].b) * h, (odd[1].b - odd[1].a) * h};
    odd[2] = {odd[2].b, -odd[2].a};
    odd[3] = {(odd[3].b - odd[3].a) * h, (odd[3].a + odd[3].b) * -h};
    for (int j = 0; j < 4; ++j) {
      x[j] = add(even[j], odd[j]);
      x[j + 4] = sub(even[j], odd[j]);
    }
  }
};

// Where entry i of a sequence goes: the FFT of a part of another is spread over its coefficients.
struct Out {
  Row* at;
  int64_t spread;

  LRO_INLINE_METHOD Row& operator[](int64_t i) const { return at[i * spread]; }
};

// `stride` sequences of a length side by side, their points `apart`, the first `turn` steps on.
template <int R, bool TURN>
LRO_INLINE void butterflies(const Row* x, Out y, int64_t r, int64_t apart, int64_t stride,
                            int64_t turn, const Transform& t, Ahead& ahead) {
  Pair own[R ? R : LARGEST_FACTOR];
  for (int64_t q = 0; q < stride; ++q) {
    ahead.next();
    for (int64_t lane = 0; lane < LANES; lane += WIDTH) {
      for (int64_t j = 0; j < r; ++j) own[j] = get(x[q + j * apart], lane);
      Butterfly<R>::run(own, r, t);
      put(&y[q], lane, own[0]);
      for (int64_t j = 1; j < r; ++j) {
        const float* w = t.unit + 2 * j * turn;
        put(&y[q + j * stride], lane, TURN ? mul(own[j], w[0], w[1]) : own[j]);
      }
    }
  }
}

// One of Stockham's stages: sequences of length `length`, `stride` of them interleaved, become r
// times as many. `step` is n over the length of the whole sequence.
template <int R>
void stage(const Row* x, Out y, int64_t given, int64_t length, int64_t stride, int64_t step,
           const Transform& t, Ahead& ahead) {
  const int64_t r = R ? R : given, shorter = length / r, apart = shorter * stride;
  butterflies<R, false>(x, y, r, apart, stride, 0, t, ahead);
  for (int64_t p = 1; p < shorter; ++p) {
    Out to = {&y[p * stride * r], y.spread};
    butterflies<R, true>(x + p * stride, to, r, apart, stride, p * stride * step, t, ahead);
  }
}

// The same in place, for what does not fit the first-level cache: r sequences one after the other.
template <int R>
void split(Row* x, int64_t given, int64_t length, int64_t step, const Transform& t, Ahead& ahead) {
  const int64_t r = R ? R : given, shorter = length / r;
  for (int64_t p = 0; p < shorter; ++p) {
    butterflies<R, true>(x + p, {x + p, shorter}, r, shorter, 1, p * step, t, ahead);
  }
}

LRO_INLINE int64_t next_factor(int64_t n) {
  if (n % 8 == 0) return 8;
  if (n % 4 == 0) return 4;
  for (int64_t r = 2; r * r <= n; ++r) {
    if (n % r == 0) return r;
  }
  return n;
}

#define LRO_WITH_FACTOR(r, call) \
  switch (r) {                   \
    case 2:                      \
      call(2);                   \
      break;                     \
    case 3:                      \
      call(3);                   \
      break;                     \
    case 4:                      \
      call(4);                   \
      break;                     \
    case 5:                      \
      call(5);                   \
      break;                     \
    case 8:                      \
      call(8);                   \
      break;                     \
    default:                     \
      call(0);                   \
  }

const int64_t SHORT = 128;  // two buffers of this length fit the first-level cache

// The FFT of `length` numbers to every n / length-th of `out`.
void short_fft(const Row* x, int64_t whole, Out out, Row* buffer, const Transform& t,
               Ahead& ahead) {
  const int64_t step = t.n / whole;
  if (whole == 1) out[0] = x[0];
  Row* other = buffer + SHORT;
  for (int64_t length = whole, stride = 1; length > 1;) {
    const int64_t r = next_factor(length);
    const Out to = length == r ? out : Out{other, 1};
#define LRO_STAGE(R) stage<R>(x, to, r, length, stride, step, t, ahead)
    LRO_WITH_FACTOR(r, LRO_STAGE)
#undef LRO_STAGE
    length /= r;
    stride *= r;
    x = other;
    other = other == buffer ? buffer + SHORT : buffer;
  }
}

void fft(Row* x, int64_t length, Out out, Row* buffer, const Transform& t, Ahead& ahead) {
  if (length <= SHORT) {
    short_fft(x, length, out, buffer, t, ahead);
    return;
  }
  const int64_t r = next_factor(length), shorter = length / r;
#define LRO_SPLIT(R) split<R>(x, r, length, t.n / length, t, ahead)
  LRO_WITH_FACTOR(r, LRO_SPLIT)
#undef LRO_SPLIT
  for (int64_t j = 0; j < r; ++j) {
    fft(x + j * shorter, shorter, {&out[j], out.spread * r}, buffer, t, ahead);
  }
}

// From one buffer, which is overwritten, to the other.
Row* fft(Row* z, Row* other, const Transform& t, Ahead& ahead) {
  Row buffer[2 * SHORT];
  fft(z, t.n, {other, 1}, buffer, t, ahead);
  return other;
}

// --- the transform: Makhoul's order, one FFT, one pass over pairs of coefficients --------------

// Where entry j stands in the sequence that the FFT takes: the even ones ascending, then the odd
// ones descending.
LRO_INLINE int64_t folded(int64_t j, int64_t n) { return j % 2 == 0 ? j / 2 : n - 1 - j / 2; }

// Calls f(k, lane, coefficient k from that lane on) on what the FFT of entries in folded order
// left.
template <class F>
LRO_INLINE void coefficients(const Row* x, const Transform& t, F f) {
  for (int64_t k = 0, n = t.n; 2 * k <= n; ++k) {
    int64_t back = k == 0 ? 0 : n - k;
    float c = 0.5f * t.twiddle[2 * k], s = 0.5f * t.twiddle[2 * k + 1];
    for (int64_t lane = 0; lane < LANES; lane += WIDTH) {
      Pair p = get(x[k], lane), q = get(x[back], lane);
      Vec re_a = p.a + q.a, im_a = p.b - q.b, re_b = p.b + q.b, im_b = q.a - p.a;
      if (back != k) f(back, lane, Pair{s * re_a - c * im_a, s * re_b - c * im_b});
      f(k, lane, Pair{c * re_a + s * im_a, c * re_b + s * im_b});
    }
  }
}

// Entries in folded order to coefficients in their own.
Row* analyse(Row* z, Row* other, const Transform& t, Ahead& ahead) {
  Row* x = fft(z, other, t, ahead);
  coefficients(x, t, [x](int64_t k, int64_t lane, const Pair& c) { put(&x[k], lane, c); });
  return x;
}

// Coefficients in their own order to entries in folded order: the inverse, and the transpose.
Row* synthesise(Row* x, Row* other, const Transform& t, Ahead& ahead) {
  const Vec zero = {};
  for (int64_t k = 0, n = t.n; 2 * k <= n; ++k) {
    int64_t back = k == 0 ? 0 : n - k;
    float c = k == 0 ? t.twiddle[0] : 0.5f * t.twiddle[2 * k];
    float s = 0.5f * t.twiddle[2 * k + 1];
    for (int64_t lane = 0; lane < LANES; lane += WIDTH) {
      Pair p = get(x[k], lane), q = get(x[back], lane);
      if (k == 0) q = {zero, zero};
      // of column l, V = (p - i q) exp(i pi k / 2n); the FFT of i conj(V_b + i V_a) has both
      Vec re_a = c * p.a + s * q.a, im_a = s * p.a - c * q.a;
      Vec re_b = c * p.b + s * q.b, im_b = s * p.b - c * q.b;
      if (back != k) put(&x[back], lane, {re_a - im_b, re_b + im_a});
      put(&x[k], lane, {re_a + im_b, re_b - im_a});
    }
  }
  return fft(x, other, t, ahead);
}

}  // namespace
