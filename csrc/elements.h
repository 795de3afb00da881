// The arithmetic of every op on one element: what the CPU loops and the CUDA kernels both run, so
// that a test on the CPU is a test of what the GPU computes. Compile with -ffp-contract=off and
// -fmad=false: a fused multiply-add in one build and not in the other would part the bits.
#pragma once

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define LRO_HD static __host__ __device__ __forceinline__
#define LRO_SQRT(x) sqrtf(x)
#else
#define LRO_HD static inline __attribute__((always_inline))
#define LRO_SQRT(x) __builtin_sqrtf(x)
#endif

LRO_HD uint32_t lro_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

LRO_HD float lro_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

// --- storage formats: float32, bfloat16 and float16 as bits, rounded to nearest even -------------

struct lro_bf16 {
  uint16_t bits;
};
struct lro_f16 {
  uint16_t bits;
};

LRO_HD float lro_load(float x) { return x; }
LRO_HD float lro_load(lro_bf16 x) { return lro_float((uint32_t)x.bits << 16); }

// Exponent and mantissa are moved into place and rescaled by 2^112; what that gets wrong
// (infinities and NaN) is repaired by a select, so that the loop has no branch.
LRO_HD float lro_load(lro_f16 x) {
  uint32_t magnitude = (uint32_t)(x.bits & 0x7fffu) << 13;
  uint32_t sign = (uint32_t)(x.bits & 0x8000u) << 16;
  uint32_t finite = lro_bits(lro_float(magnitude) * lro_float(0x77800000u));
  uint32_t special = magnitude | 0x7f800000u;
  return lro_float(sign | (magnitude >= 0x0f800000u ? special : finite));
}

LRO_HD void lro_store(float* out, float x) { *out = x; }

LRO_HD void lro_store(lro_bf16* out, float x) {
  uint32_t u = lro_bits(x);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  out->bits = (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

LRO_HD void lro_store(lro_f16* out, float x) {
  uint32_t u = lro_bits(x);
  uint32_t sign = (u >> 16) & 0x8000u;
  uint32_t magnitude = u & 0x7fffffffu;
  // Below 2^-14: adding 0.5 leaves the subnormal half in the low bits, rounded by the addition.
  uint32_t subnormal = lro_bits(lro_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  out->bits = (uint16_t)(sign | half);
}

// --- moments -------------------------------------------------------------------------------------

LRO_HD float lro_sign(float x) { return (float)(x > 0.0f) - (float)(x < 0.0f); }

// w = 1 - beta1, rounded once from double.
LRO_HD float lro_lerp(float m, float g, float w) { return m + w * (g - m); }
LRO_HD float lro_square_avg(float v, float g, float beta2, float w) {
  return beta2 * v + w * (g * g);
}
LRO_HD float lro_adamw(float m, float v, float eps, float scale) {
  return (scale * m) / (LRO_SQRT(v) + eps);
}
LRO_HD float lro_moment(float m, float x, float decay, float weight) {
  return decay * m + weight * x;
}

// sign() that keeps NaN: a lost gradient must not look like a step of zero.
LRO_HD float lro_sign_nan(float x) { return x != x ? x : lro_sign(x); }

// --- 8-bit codes ---------------------------------------------------------------------------------

// Halfway between neighbouring entries, in float32: a tie takes the lower code, as in bitsandbytes.
LRO_HD float lro_threshold(float low, float high) { return (low + high) * 0.5f; }

// Nearest code: the count of the 255 thresholds that x exceeds. NaN exceeds none.
LRO_HD uint32_t lro_nearest(const float* thresholds, float x) {
  uint32_t code = 0;
  for (uint32_t step = 128; step; step >>= 1) {
    code += x > thresholds[code + step - 1] ? step : 0;
  }
  return code;
}

// What scales a block to [-1, 1]. Multiplying by the reciprocal is bitsandbytes' arithmetic; below
// 2.9e-39 the reciprocal overflows, so both factors of a product in two steps stay finite.
struct lro_inverse {
  float first, second;
};

LRO_HD lro_inverse lro_invert(float absmax) {
  lro_inverse r;
  bool tiny = absmax < 0x1p-126f;
  r.first = tiny ? 0x1p64f : 1.0f;
  float lifted = absmax * r.first;
  r.second = lifted > 0.0f ? 1.0f / lifted : 0.0f;
  return r;
}

LRO_HD float lro_normalise(float x, lro_inverse r) { return (x * r.first) * r.second; }

// --- stochastic rounding -------------------------------------------------------------------------

LRO_HD uint32_t lro_hash(uint32_t x) {  // lowbias32
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

// What the noise is a hash of: where entry i lies in the whole.
struct lro_place {
  int64_t width;
  uint32_t offset, row, column;
};

LRO_HD uint32_t lro_position(int64_t i, lro_place p) {
  if (i < p.width) return p.offset + (uint32_t)i * p.column;
  // a 64-bit division costs a GPU several times what a 32-bit one does
  int64_t r = ((i | p.width) >> 32) ? i / p.width : (int64_t)((uint32_t)i / (uint32_t)p.width);
  return p.offset + (uint32_t)r * p.row + (uint32_t)(i - r * p.width) * p.column;
}

LRO_HD uint16_t lro_round_stochastic(float x, uint32_t position, uint32_t seed) {
  uint32_t u = lro_bits(x);
  uint32_t noisy = (u + (lro_hash(position ^ seed) & 0xffffu)) >> 16;
  lro_bf16 nearest;
  lro_store(&nearest, x);
  return (uint16_t)((u & 0x7f800000u) == 0x7f800000u ? nearest.bits : noisy);
}

// --- applies -------------------------------------------------------------------------------------

LRO_HD float lro_scaled(float w, float low, float g, float c, float decay, float lr) {
  return decay * w - lr * (low + g * c);
}

LRO_HD float lro_signed(float w, float low, float other, float g, float decay, float lr,
                        float scale, float gain) {
  return decay * w - lr * (scale * low + gain * lro_sign_nan(g - other));
}

// step: lr * scale or lr * gain, rounded once from double.
LRO_HD float lro_step(float w, float x, float decay, float step) { return decay * w - step * x; }
