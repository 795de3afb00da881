// The C ABI of liblowrank_optim.so (host pointers, `threads`) and liblowrank_optim_cuda.so (device
// pointers, `stream`). One struct per family of ops, shared by both;
// lowrank_optim/ops/native/loader.py mirrors the structs, and lro_sizes() lets it check that the
// two sides agree.
//
// Every array of `count` entries, and every scalar, is host memory in both libraries; what the
// entries of pointer arrays point at is device memory in the CUDA library.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LRO_ABI 6

enum { LRO_FLOAT32 = 0, LRO_BFLOAT16 = 1, LRO_FLOAT16 = 2 };
enum {
  LRO_OK = 0,
  LRO_BAD_DTYPE = 1,
  LRO_BAD_BLOCK = 2,
  LRO_BAD_LENGTH = 4,
  LRO_NO_MEMORY = 5,
  LRO_BAD_INDEX = 6,
  LRO_CUDA_ERROR = 1000  // plus the cudaError_t of a launch: what came after it was not launched
};
enum { LRO_FREE_NONE = 0, LRO_FREE_SIGN = 1, LRO_FREE_IDENTITY = 2 };
enum { LRO_DCT2 = 0, LRO_DCT3 = 1 };
enum { LRO_L2 = 0, LRO_L1 = 1 };
enum { LRO_MAX_BLOCK = 4096, LRO_MAX_BLOCK_CUDA = 256 };

// Moment updates: adamw_direction, lion_direction, moment, each with float32 or 8-bit moments.
typedef struct {
  int64_t count;
  const int64_t* numels;
  const int64_t* widths;        // size of the last dimension; read with row_eps
  const void* const* grads;     // grad_dtype, contiguous
  void* const* outs;            // out_dtype, contiguous
  float* const* first;          // exp_avg, float32 ops
  float* const* second;         // exp_avg_sq, float32 adamw
  uint8_t* const* first_codes;  // exp_avg, 8-bit ops
  float* const* first_scales;
  uint8_t* const* second_codes;  // exp_avg_sq, 8-bit adamw
  float* const* second_scales;
  const float* signed_map;  // 256 sorted entries
  const float* unsigned_map;
  const int64_t* rows;  // layout of codes: rows * cols elements, rows cut into blocks
  const int64_t* cols;
  const int64_t* blocks;
  const float* eps;               // adamw
  const float* const* row_eps;    // null, or one float per row of the last dimension
  const float* const* row_scale;  // null exactly where row_eps is
  const uint8_t* const* finite;   // null, or one flag per tensor
  double a;                       // beta1 | decay
  double b;                       // beta2 | weight
  int32_t grad_dtype;
  int32_t out_dtype;
} lro_update;

// Blockwise quantisation alone. values: inputs of quantize, outputs of dequantize.
typedef struct {
  int64_t count;
  void* const* values;
  uint8_t* const* codes;
  float* const* scales;
  const float* map;
  const int64_t* rows;
  const int64_t* cols;
  const int64_t* blocks;
  int32_t dtype;
} lro_blockwise;

// Entry i of a tensor is at position offset + (i / width) row + (i % width) column, modulo 2^32.
typedef struct {
  int64_t count;
  const int64_t* numels;
  const float* const* values;
  uint16_t* const* outs;  // bfloat16
  const uint32_t* seeds;
  const uint32_t* offsets;
  const int64_t* widths;  // at least 1
  const uint32_t* rows;
  const uint32_t* columns;
} lro_rounding;

typedef struct {
  int64_t count;
  const void* const* values;
  float* const* outs;  // (cols)
  const int64_t* rows;
  const int64_t* cols;
  const int64_t* row_strides;  // in elements
  const int64_t* col_strides;
  int32_t dtype;
} lro_norms;

// One tile of a fused apply. low and other are GEMM results, (rows, cols) with a leading dimension.
//   scaled: W <- decay W - lr (low + G c)
//   sign:   W <- decay W - lr (scale low + gain sign(G - other))
typedef struct {
  int64_t rows, cols;
  void* weight;
  int64_t weight_row, weight_col;
  const void* grad;
  int64_t grad_row, grad_col;
  const void* low;
  const void* other;
  int64_t low_row;
  const float* factor;  // c; a stride is 0 along the dimension that c is constant in
  int64_t factor_row, factor_col;
  const uint8_t* finite;  // null, or one flag: where it is 0 nothing is written
  double decay, lr, scale, gain;
  int32_t weight_dtype, grad_dtype, low_dtype;
} lro_apply;

// Indices are looked at before anything is written: the CPU library returns LRO_BAD_INDEX unless
// `index` ascends within its rows, each once, and `source` within what is picked, -1 apart. On CUDA
// each row looks for itself in `index`: one outside is never met, and nothing is read or written by
// it.

// Rows in index: W <- decay W - lr scale N[k]; others: W <- decay W - lr gain f(G).
typedef struct {
  int64_t count;
  void* const* weights;
  const void* const* grads;
  const int32_t* const* index;  // k sorted rows
  const float* const* lows;     // (k, cols)
  const int64_t* picked;        // k
  const int64_t* rows;
  const int64_t* cols;
  const int64_t* weight_rows;  // strides in elements
  const int64_t* weight_cols;
  const int64_t* grad_rows;
  const int64_t* grad_cols;
  const int64_t* low_rows;
  const int64_t* low_cols;
  const uint8_t* const* finite;  // null, or one flag per matrix
  double decay, lr, scale, gain;
  int32_t free_rule;
  int32_t weight_dtype, grad_dtype;
} lro_coordinate;

// Rows in index: AdamW with moments (k, cols), W <- decay W - step N; others: W <- decay W -
// free_step f(G). Of the CPU library alone.
typedef struct {
  int64_t count;
  void* const* weights;
  const void* const* grads;
  const int32_t* const* index;  // k sorted rows
  float* const* first;          // exp_avg, contiguous
  float* const* second;         // exp_avg_sq
  const int64_t* picked;        // k
  const int64_t* rows;
  const int64_t* cols;
  const int64_t* weight_rows;  // strides in elements
  const int64_t* weight_cols;
  const int64_t* grad_rows;
  const int64_t* grad_cols;
  const float* eps;
  const float* steps;
  const float* free_steps;
  double beta1, beta2, decay;
  int32_t free_rule;
  int32_t dtype;  // of weights and gradients
} lro_coordinate_step;

// Cosine transforms of columns, all of one length with no prime factor above 61.
//   scores:   the sum of squares (l2) or of absolute values (l1) of each coefficient
//   project:  lows <- the coefficients in index
//   lift_add: W <- decay W - step (columns with coefficients lows at index, and zeros elsewhere)
//   adamw:    project, AdamW with moments (k, cols), lift_add. Of the CPU library alone.
typedef struct {
  int64_t count;
  int64_t rows;                  // of every matrix: the length of the transforms
  void* const* weights;          // lift_add, adamw
  const void* const* grads;      // scores, project, adamw
  const int32_t* const* index;   // k sorted coefficients
  const int32_t* const* source;  // adamw; null, or where the moments of each stood, -1 for nowhere
  float* const* lows;            // (k, cols), contiguous
  float* const* first;           // exp_avg, contiguous
  float* const* second;          // exp_avg_sq
  float* const* scores;          // (rows)
  const int64_t* picked;         // k
  const int64_t* cols;
  const int64_t* weight_rows;  // strides in elements
  const int64_t* weight_cols;
  const int64_t* grad_rows;
  const int64_t* grad_cols;
  const float* eps;               // adamw
  const float* const* row_eps;    // null, or one float per coefficient
  const float* const* row_scale;  // null exactly where row_eps is
  const float* steps;
  const float*
      turns;  // rows pairs (cos, -sin) of 2 pi k / rows, then rows / 2 + 1 pairs (cos, sin)
              // of pi k / (2 rows) times sqrt(2 / rows), the first times sqrt(1 / rows)
  double beta1, beta2, decay;
  int32_t basis, norm;
  int32_t dtype;  // of weights and gradients
} lro_cosine;

// The indices of the largest scores, ascending, the lowest among equals. Of the CPU library alone.
typedef struct {
  int64_t count;
  const float* const* scores;  // (rows), not negative
  int32_t* const* index;       // (picked), ascending: the old ones, and then the new
  int32_t* const* source;      // (picked), written: where each stood among the old, or -1
  const int64_t* rows;
  const int64_t* picked;
} lro_top;

// sizeof of the nine structs in the order above, then LRO_ABI.
void lro_sizes(int64_t sizes[10]);
#define LRO_SIZES               \
  {sizeof(lro_update),          \
   sizeof(lro_blockwise),       \
   sizeof(lro_rounding),        \
   sizeof(lro_norms),           \
   sizeof(lro_apply),           \
   sizeof(lro_coordinate),      \
   sizeof(lro_coordinate_step), \
   sizeof(lro_cosine),          \
   sizeof(lro_top),             \
   LRO_ABI}
// "baseline", "avx2", "avx512"; null where LOWRANK_OPTIM_ISA asks for what this machine lacks.
const char* lro_isa(void);

#define LRO_OPS(X)                    \
  X(adamw_direction, lro_update)      \
  X(lion_direction, lro_update)       \
  X(moment, lro_update)               \
  X(adamw_direction_8bit, lro_update) \
  X(lion_direction_8bit, lro_update)  \
  X(moment_8bit, lro_update)          \
  X(quantize, lro_blockwise)          \
  X(dequantize, lro_blockwise)        \
  X(stochastic_round, lro_rounding)   \
  X(column_norms, lro_norms)          \
  X(apply_scaled, lro_apply)          \
  X(apply_sign, lro_apply)            \
  X(coordinate_add, lro_coordinate)
// Of the CPU library alone.
#define LRO_CPU_OPS(X)                     \
  X(coordinate_adamw, lro_coordinate_step) \
  X(cosine_scores, lro_cosine)             \
  X(cosine_project, lro_cosine)            \
  X(cosine_lift_add, lro_cosine)           \
  X(cosine_adamw, lro_cosine)              \
  X(top_rows, lro_top)

#define LRO_DECLARE(name, args)               \
  int lro_##name(const args* a, int threads); \
  int lro_cuda_##name(const args* a, void* stream);
LRO_OPS(LRO_DECLARE)
#undef LRO_DECLARE
#define LRO_DECLARE(name, args) int lro_##name(const args* a, int threads);
LRO_CPU_OPS(LRO_DECLARE)
#undef LRO_DECLARE

#ifdef __cplusplus
}
#endif
