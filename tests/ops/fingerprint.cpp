// Prints a hash of what every op of the CPU library writes on fixed data, one line an op and
// format: builds for two architectures must print the same (tests/ops/test_neon.py).
#include <cstdio>
#include <cstring>
#include <vector>

#include "elements.h"
#include "lowrank_optim.h"

namespace {

const int64_t ROWS = 37, COLS = 301, N = ROWS * COLS, BLOCK = 256, BLOCKS = ROWS * 2;
const int BYTES[] = {4, 2, 2};

uint32_t random_state = 1;

// In (-1, 1), times a power of ten per row of a block: quantisers see all of their range.
float number(int64_t i, bool spread) {
  random_state = random_state * 1664525u + 1013904223u;
  float x = (float)(int32_t)random_state * 0x1p-31f, scale = 1.0f;
  for (int64_t k = 0; spread && k < i / BLOCK % 7; ++k) scale *= 0.1f;
  return x * scale;
}

struct Buffer {
  std::vector<uint8_t> bytes;
  Buffer(int64_t n, int dtype, bool spread = false, bool positive = false) : bytes(n * 4) {
    for (int64_t i = 0; i < n; ++i) {
      float x = number(i, spread);
      if (positive) x = x < 0 ? -x : x;
      if (dtype == LRO_FLOAT32) memcpy(&bytes[4 * i], &x, 4);
      if (dtype == LRO_BFLOAT16) lro_store((lro_bf16*)bytes.data() + i, x);
      if (dtype == LRO_FLOAT16) lro_store((lro_f16*)bytes.data() + i, x);
    }
  }
  void* at() { return bytes.data(); }
};

uint64_t hash = 0;

void mix(const void* data, int64_t bytes) {
  for (int64_t i = 0; i < bytes; ++i) hash = (hash ^ ((const uint8_t*)data)[i]) * 0x100000001b3ull;
}

void say(const char* op, int dtype, int status) {
  printf("%s %d %d %016llx\n", op, dtype, status, (unsigned long long)hash);
  hash = 0xcbf29ce484222325ull;
}

typedef int (*Update)(const lro_update*, int);

void update(const char* name, Update op, int dtype, bool eight, const float* maps) {
  Buffer grad(N, dtype), out(N, dtype), m(N, 0, true), v(N, 0, true, true), flags(1, 0);
  Buffer s1(BLOCKS, 0, false, true), s2(BLOCKS, 0, false, true);
  std::vector<uint8_t> c1(N), c2(N);
  for (int64_t i = 0; i < N; ++i) c1[i] = (uint8_t)(i * 37), c2[i] = (uint8_t)(i * 91);
  const void* g = grad.at();
  void* o = out.at();
  float *pm = (float*)m.at(), *pv = (float*)v.at(), *p1 = (float*)s1.at(), *p2 = (float*)s2.at();
  uint8_t *q1 = c1.data(), *q2 = c2.data(), finite = 1;
  const uint8_t* flag = &finite;
  int64_t n = N, width = COLS, rows = ROWS, cols = COLS, block = BLOCK;
  float eps = 1e-3f;
  lro_update a = {};
  a.count = 1, a.numels = &n, a.widths = &width, a.grads = &g, a.outs = &o;
  a.first = &pm, a.second = &pv, a.finite = &flag, a.eps = &eps;
  if (eight) {
    a.first_codes = &q1, a.first_scales = &p1, a.second_codes = &q2, a.second_scales = &p2;
    a.signed_map = maps, a.unsigned_map = maps + 256;
    a.rows = &rows, a.cols = &cols, a.blocks = &block;
  }
  a.a = 0.9, a.b = 0.99, a.grad_dtype = a.out_dtype = dtype;
  int status = op(&a, 1);
  mix(o, N * BYTES[dtype]);
  mix(pm, 4 * N), mix(pv, 4 * N), mix(q1, N), mix(q2, N), mix(p1, 4 * BLOCKS), mix(p2, 4 * BLOCKS);
  say(name, dtype, status);
}

void matrices(int dtype) {
  Buffer w(N, dtype), g(N, dtype), low(N, dtype), other(N, dtype), c(COLS, 0), rows(N, 0);
  lro_apply a = {};
  a.rows = ROWS, a.cols = COLS, a.weight = w.at(), a.weight_row = COLS, a.weight_col = 1;
  a.grad = g.at(), a.grad_row = COLS, a.grad_col = 1, a.low = low.at(), a.other = other.at();
  a.low_row = COLS, a.factor = (float*)c.at(), a.factor_col = 1;
  a.decay = 0.98, a.lr = 0.1, a.scale = 0.25, a.gain = 0.5;
  a.weight_dtype = a.grad_dtype = a.low_dtype = dtype;
  int status = lro_apply_scaled(&a, 1);
  mix(w.at(), N * BYTES[dtype]);
  say("apply_scaled", dtype, status);
  status = lro_apply_sign(&a, 1);
  mix(w.at(), N * BYTES[dtype]);
  say("apply_sign", dtype, status);
  int32_t index[] = {0, 3, 4, 20, 36};
  const int32_t* picks = index;
  int64_t picked = 5, r = ROWS, n = COLS, one = 1;
  void* weight = w.at();
  const void* grad = g.at();
  const float* own = (const float*)rows.at();
  lro_coordinate k = {};
  k.count = 1, k.weights = &weight, k.grads = &grad, k.index = &picks, k.lows = &own;
  k.picked = &picked, k.rows = &r, k.cols = &n, k.weight_rows = k.grad_rows = k.low_rows = &n;
  k.weight_cols = k.grad_cols = k.low_cols = &one;
  k.decay = 0.98, k.lr = 0.1, k.scale = 0.25, k.gain = 0.5, k.free_rule = LRO_FREE_SIGN;
  k.weight_dtype = k.grad_dtype = dtype;
  status = lro_coordinate_add(&k, 1);
  mix(w.at(), N * BYTES[dtype]);
  say("coordinate_add", dtype, status);
  Buffer first(N, 0), second(N, 0, false, true);
  float *m = (float*)first.at(), *v = (float*)second.at(), eps = 1e-3f, step = 0.1f, slow = 0.01f;
  lro_coordinate_step t = {};
  t.count = 1, t.weights = &weight, t.grads = &grad, t.index = &picks, t.picked = &picked;
  t.first = &m, t.second = &v, t.rows = &r, t.cols = &n, t.weight_rows = t.grad_rows = &n;
  t.weight_cols = t.grad_cols = &one, t.eps = &eps, t.steps = &step, t.free_steps = &slow;
  t.beta1 = 0.9, t.beta2 = 0.99, t.decay = 0.98, t.free_rule = LRO_FREE_SIGN, t.dtype = dtype;
  status = lro_coordinate_adamw(&t, 1);
  t.weight_rows = t.grad_rows = &one, t.weight_cols = t.grad_cols = &n, t.rows = &n, t.cols = &r;
  status |= lro_coordinate_adamw(&t, 1);
  mix(w.at(), N * BYTES[dtype]), mix(m, 4 * N), mix(v, 4 * N);
  say("coordinate_adamw", dtype, status);
  float* out = (float*)c.at();
  lro_norms x = {1, &grad, &out, &r, &n, &n, &one, dtype};
  status = lro_column_norms(&x, 1);
  mix(out, 4 * COLS);
  say("column_norms", dtype, status);
}

// Lengths of every kind of stage, both bases, rows and columns stored. Bits need no true cosines.
void cosines(int dtype) {
  const char* names[] = {"cosine_scores", "cosine_project", "cosine_lift_add", "cosine_adamw"};
  int (*ops[])(const lro_cosine*, int) = {lro_cosine_scores, lro_cosine_project,
                                          lro_cosine_lift_add, lro_cosine_adamw};
  for (int op = 0; op < 4; ++op) {
    int status = 0;
    for (int64_t rows : {35, 36, 37, 40, 256}) {
      Buffer w(N, dtype), g(N, dtype), low(N, 0), first(N, 0), second(N, 0, false, true);
      Buffer turns(4 * rows, 0), scores(rows, 0), scale(rows, 0, false, true);
      int32_t index[] = {0, 3, 4, 20, 34}, source[] = {1, -1, 2, 3, 4};
      const int32_t *picks = index, *from = source;
      int64_t picked = 5, one = 1, n = N / rows;
      void* weight = w.at();
      const void* grad = g.at();
      float *l = (float*)low.at(), *m = (float*)first.at(), *v = (float*)second.at();
      float *s = (float*)scores.at(), eps = 1e-3f, step = 0.1f;
      const float* by_row = (const float*)scale.at();
      lro_cosine a = {};
      a.count = 1, a.rows = rows, a.weights = &weight, a.grads = &grad, a.index = &picks;
      a.source = &from, a.lows = &l, a.first = &m, a.second = &v, a.scores = &s;
      a.picked = &picked, a.cols = &n, a.weight_rows = a.grad_rows = &n;
      a.weight_cols = a.grad_cols = &one, a.eps = &eps, a.row_eps = a.row_scale = &by_row;
      a.steps = &step, a.turns = (const float*)turns.at();
      a.beta1 = 0.9, a.beta2 = 0.99, a.decay = 0.98, a.dtype = dtype;
      for (int basis = 0; basis < 2; ++basis) {
        a.basis = a.norm = basis;
        status |= ops[op](&a, 1);
        a.weight_cols = a.grad_cols = &rows, a.weight_rows = a.grad_rows = &one;
        mix(s, 4 * rows), mix(l, 4 * picked * n), mix(m, 4 * picked * n), mix(v, 4 * picked * n);
        mix(w.at(), N * BYTES[dtype]);
      }
    }
    say(names[op], dtype, status);
  }
}

void top_rows() {
  Buffer scores(N, 0, false, true);
  const float* x = (const float*)scores.at();
  std::vector<int32_t> index(100), source(100);
  for (int i = 0; i < 100; ++i) index[i] = 7 * i;
  int32_t *picks = index.data(), *from = source.data();
  int64_t rows = N, picked = 100;
  lro_top a = {1, &x, &picks, &from, &rows, &picked};
  int status = lro_top_rows(&a, 1);
  mix(picks, 400), mix(from, 400);
  say("top_rows", 0, status);
}

void storage(int dtype, const float* map, const char* name) {
  Buffer values(N, dtype, true), scales(BLOCKS, 0);
  std::vector<uint8_t> codes(N);
  void* x = values.at();
  uint8_t* q = codes.data();
  float* s = (float*)scales.at();
  int64_t rows = ROWS, cols = COLS, block = BLOCK;
  lro_blockwise a = {1, &x, &q, &s, map, &rows, &cols, &block, dtype};
  int status = lro_quantize(&a, 1);
  mix(q, N), mix(s, 4 * BLOCKS);
  status |= lro_dequantize(&a, 1);
  mix(x, N * BYTES[dtype]);
  say(name, dtype, status);
}

}  // namespace

int main() {
  // the shape of the dynamic maps: decades of midpoints, twice as many in each as in the one below
  float maps[512];
  for (int i = 0; i < 128; ++i) {
    int decade = 0;
    while ((2 << decade) <= i + 1) ++decade;
    float x = (0.1f + 0.9f * ((float)(i + 1 - (1 << decade)) + 0.5f) / (float)(1 << decade));
    for (int k = decade; k < 6; ++k) x *= 0.1f;
    maps[128 + i] = i == 127 ? 1.0f : x, maps[127 - i] = i == 127 ? -0.9930f : -x;
    maps[256 + 2 * i] = x * 0.97f, maps[256 + 2 * i + 1] = i == 127 ? 1.0f : x;
  }
  maps[127] = 0.0f, maps[256] = 0.0f;
  for (int d = 0; d < 3; ++d) {
    update("adamw_direction", lro_adamw_direction, d, false, maps);
    update("lion_direction", lro_lion_direction, d, false, maps);
    update("moment", lro_moment, d, false, maps);
    update("adamw_direction_8bit", lro_adamw_direction_8bit, d, true, maps);
    update("lion_direction_8bit", lro_lion_direction_8bit, d, true, maps);
    update("moment_8bit", lro_moment_8bit, d, true, maps);
    storage(d, maps, "quantize signed");
    storage(d, maps + 256, "quantize unsigned");
    matrices(d);
    cosines(d);
  }
  top_rows();
  Buffer x(N, 0, true), out(N, 1);
  const float* from = (const float*)x.at();
  uint16_t* to = (uint16_t*)out.at();
  uint32_t seed = 7, offset = 11, row = 1000, column = 3;
  int64_t n = N, width = 7;
  lro_rounding a = {1, &n, &from, &to, &seed, &offset, &width, &row, &column};
  int status = lro_stochastic_round(&a, 1);
  mix(to, 2 * N);
  say("stochastic_round", 0, status);
}
