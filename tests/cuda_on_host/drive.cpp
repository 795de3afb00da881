// Every kernel, for sanitizers alone: nothing here looks at results.
//
// To ThreadSanitizer each thread of a block is a thread of its own. What two of them touch without
// a barrier between is a race, in whatever order they ran. So is what two blocks touch, but for
// kernels with shared memory, which is the same for all blocks here.
#include <stdio.h>

#include <vector>

#include "lowrank_optim.h"

extern "C" {
void host_order(int seed);
void host_ordered(int ordered);
void host_memory(uintptr_t start, uintptr_t size, int device);
const char* host_message(void);
}

namespace {

const int64_t ROWS = 5, COLS = 300, BLOCK = 256, NUMEL = ROWS * COLS, SCALES = ROWS * 2;

// COUNT tensors of one kind, and the array of pointers to them.
template <class T>
struct Tensors {
  enum { COUNT = 3 };
  std::vector<T> data;
  T* pointers[COUNT];

  explicit Tensors(int64_t size = NUMEL) : data(size * COUNT) {
    host_memory((uintptr_t)data.data(), data.size() * sizeof(T), 0);
    for (int i = 0; i < COUNT; ++i) pointers[i] = data.data() + i * size;
    for (size_t i = 0; i < data.size(); ++i) data[i] = (T)(i % 97);
  }
};

const int64_t COUNT = Tensors<float>::COUNT;

std::vector<int64_t> each(int64_t x) { return std::vector<int64_t>(COUNT, x); }

int failed = 0;

enum Memory { ALONE, SHARES };  // whether a kernel has shared memory

template <class Args>
void run(const char* op, Memory memory, int (*function)(const Args*, void*), const Args& a) {
  host_ordered(memory == SHARES);
  int status = function(&a, nullptr);
  if (status || *host_message()) {
    printf("%s: status %d, %s\n", op, status, host_message());
    failed = 1;
  }
}

void updates() {
  Tensors<float> grads, outs, first, second, scales(SCALES), scales2(SCALES);
  Tensors<float> row_eps(ROWS), row_scale(ROWS);
  Tensors<uint8_t> codes, codes2, finite(1);
  Tensors<float> map(256);
  float eps[COUNT] = {1, 1, 1};
  auto numels = each(NUMEL), rows = each(ROWS), cols = each(COLS), blocks = each(BLOCK);
  lro_update a = {};
  a.count = COUNT;
  a.numels = numels.data();
  a.widths = cols.data();
  a.grads = (const void* const*)grads.pointers;
  a.outs = (void* const*)outs.pointers;
  a.first = first.pointers;
  a.second = second.pointers;
  a.first_codes = codes.pointers;
  a.first_scales = scales.pointers;
  a.second_codes = codes2.pointers;
  a.second_scales = scales2.pointers;
  a.signed_map = a.unsigned_map = map.pointers[0];
  a.rows = rows.data();
  a.cols = cols.data();
  a.blocks = blocks.data();
  a.eps = eps;
  a.finite = finite.pointers;
  a.a = a.b = 0.5;
  for (int by_row = 0; by_row < 2; ++by_row) {
    a.row_eps = by_row ? row_eps.pointers : nullptr;
    a.row_scale = by_row ? row_scale.pointers : nullptr;
    run("adamw_direction", ALONE, lro_cuda_adamw_direction, a);
    run("adamw_direction_8bit", SHARES, lro_cuda_adamw_direction_8bit, a);
  }
  run("lion_direction", ALONE, lro_cuda_lion_direction, a);
  run("moment", ALONE, lro_cuda_moment, a);
  run("lion_direction_8bit", SHARES, lro_cuda_lion_direction_8bit, a);
  run("moment_8bit", SHARES, lro_cuda_moment_8bit, a);

  lro_blockwise b = {};
  b.count = COUNT;
  b.values = a.outs;
  b.codes = codes.pointers;
  b.scales = scales.pointers;
  b.map = map.pointers[0];
  b.rows = a.rows;
  b.cols = a.cols;
  b.blocks = a.blocks;
  run("quantize", SHARES, lro_cuda_quantize, b);
  run("dequantize", SHARES, lro_cuda_dequantize, b);

  Tensors<uint16_t> narrow;
  uint32_t numbers[COUNT] = {1, 2, 3};
  lro_rounding r = {COUNT,   numels.data(), grads.pointers, narrow.pointers, numbers,
                    numbers, a.widths,      numbers,        numbers};
  run("stochastic_round", ALONE, lro_cuda_stochastic_round, r);
}

void matrices() {
  Tensors<float> weights, grads, lows, norms(COLS), factor(COLS);
  Tensors<int32_t> index(2);
  for (int i = 0; i < COUNT; ++i) index.pointers[i][0] = 1, index.pointers[i][1] = 3;
  auto rows = each(ROWS), cols = each(COLS), one = each(1), two = each(2);
  for (int by_column = 0; by_column < 2; ++by_column) {
    lro_norms n = {};
    n.count = COUNT;
    n.values = (const void* const*)grads.pointers;
    n.outs = norms.pointers;
    n.rows = rows.data();
    n.cols = cols.data();
    n.row_strides = by_column ? one.data() : cols.data();
    n.col_strides = by_column ? rows.data() : one.data();
    run("column_norms", by_column ? ALONE : SHARES, lro_cuda_column_norms, n);

    lro_coordinate c = {};
    c.count = COUNT;
    c.weights = (void* const*)weights.pointers;
    c.grads = n.values;
    c.index = index.pointers;
    c.lows = lows.pointers;
    c.picked = two.data();
    c.rows = n.rows;
    c.cols = n.cols;
    c.weight_rows = c.grad_rows = n.row_strides;
    c.weight_cols = c.grad_cols = n.col_strides;
    c.low_rows = cols.data();
    c.low_cols = one.data();
    c.free_rule = LRO_FREE_SIGN;
    run("coordinate_add", ALONE, lro_cuda_coordinate_add, c);
  }
  lro_apply a = {};
  a.rows = ROWS;
  a.cols = a.weight_row = a.grad_row = a.low_row = COLS;
  a.weight_col = a.grad_col = a.factor_col = 1;
  a.weight = weights.pointers[0];
  a.grad = grads.pointers[0];
  a.low = lows.pointers[0];
  a.other = lows.pointers[1];
  a.factor = factor.pointers[0];
  run("apply_scaled", ALONE, lro_cuda_apply_scaled, a);
  run("apply_sign", ALONE, lro_cuda_apply_sign, a);
}

}  // namespace

int main() {
  for (int seed = 0; seed < 3; ++seed) {
    host_order(seed);
    updates();
    matrices();
  }
  printf("done\n");
  return failed;
}
