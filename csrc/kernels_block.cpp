// The same updates on 8-bit moments, block by block: read the codes, update, find the largest
// magnitude, write codes. The full moment never exists in float32: a block is 1 KiB on the stack.
#include "kernels.h"
#include "loops.h"

#if defined(__AVX512VBMI__) && defined(__AVX512BW__)
#define LRO_VBMI
#include <immintrin.h>
#endif

namespace {

const int64_t TASK = 1 << 14;  // elements of one task, in whole blocks

// --- codes to floats and back --------------------------------------------------------------------

void decode_plain(const lro_tables* t, const uint8_t* codes, float scale, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = t->map[codes[i]] * scale;
}

// In two loops: the first vectorises, the second is two loads and a comparison an element.
void encode_plain(const lro_tables* t, const float* x, lro_inverse inverse, uint8_t* codes,
                  int64_t n) {
  const int64_t RUN = 256;
  for (int64_t start = 0; start < n; start += RUN) {
    float y[RUN];
    int32_t key[RUN];
    int64_t length = lro_min(RUN, n - start);
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) {
      y[i] = lro_normalise(x[start + i], inverse);
      int32_t u = (int32_t)lro_bits(y[i]), magnitude = u & 0x7fffffff;
      magnitude = magnitude < LRO_KEY_LOW ? (int32_t)LRO_KEY_LOW : magnitude;
      magnitude = magnitude > 0x3f800000 ? 0x3f800000 : magnitude;
      key[i] = ((magnitude - LRO_KEY_LOW) >> LRO_KEY_SHIFT) + ((u >> 31) & LRO_KEYS);
    }
    for (int64_t i = 0; i < length; ++i) {
      uint32_t c = t->first[key[i]];
      codes[start + i] = (uint8_t)(c + (y[i] > t->thresholds[c]));
    }
  }
}

#ifdef LRO_VBMI

// 64 codes to 64 floats in registers. A table of 256 bytes is two permutes and a select, so the
// floats are looked up a byte at a time and interleaved: 21 instructions for 64 entries, where
// sixteen-lane gathers need 64 loads. The codes are first transposed as 4x4 words, which undoes
// the interleaving by 128-bit lanes.
static inline __attribute__((always_inline)) void look_up(const uint8_t planes[4][256],
                                                          __m512i codes, __m512 out[4]) {
  const __m512i transpose = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  codes = _mm512_permutexvar_epi32(transpose, codes);
  __mmask64 upper = _mm512_movepi8_mask(codes);
  __m512i b[4];
  for (int k = 0; k < 4; ++k) {
    const uint8_t* p = planes[k];
    __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(p), codes, _mm512_load_si512(p + 64));
    __m512i high =
        _mm512_permutex2var_epi8(_mm512_load_si512(p + 128), codes, _mm512_load_si512(p + 192));
    b[k] = _mm512_mask_blend_epi8(upper, low, high);
  }
  __m512i l0 = _mm512_unpacklo_epi8(b[0], b[1]), h0 = _mm512_unpackhi_epi8(b[0], b[1]);
  __m512i l1 = _mm512_unpacklo_epi8(b[2], b[3]), h1 = _mm512_unpackhi_epi8(b[2], b[3]);
  out[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(l0, l1));
  out[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(l0, l1));
  out[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(h0, h1));
  out[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(h0, h1));
}

void decode(const lro_tables* t, const uint8_t* codes, float scale, float* out, int64_t n) {
  int64_t whole = n & ~(int64_t)63;
  __m512 s = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < whole; i += 64) {
    __m512 x[4];
    look_up(t->map_planes, _mm512_loadu_si512(codes + i), x);
    for (int k = 0; k < 4; ++k) _mm512_storeu_ps(out + i + 16 * k, _mm512_mul_ps(x[k], s));
  }
  decode_plain(t, codes + whole, scale, out + whole, n - whole);
}

static inline __attribute__((always_inline)) __m512i join(const __m128i part[4]) {
  __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(part[0]), part[1], 1);
  __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(part[2]), part[3], 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

static inline __attribute__((always_inline)) __mmask64 join(const __mmask16 part[4]) {
  return (__mmask64)part[0] | (__mmask64)part[1] << 16 | (__mmask64)part[2] << 32 |
         (__mmask64)part[3] << 48;
}

void encode(const lro_tables* t, const float* x, lro_inverse inverse, uint8_t* codes, int64_t n) {
  int64_t whole = t->coarse_fits ? n & ~(int64_t)63 : 0;
  const __m512 first = _mm512_set1_ps(inverse.first), second = _mm512_set1_ps(inverse.second);
  const __m512 lowest = _mm512_set1_ps(t->map[0]);  // all below it is code 0
  const __m512i low = _mm512_set1_epi32(LRO_KEY_LOW), one = _mm512_set1_epi32(0x3f800000);
  const __m512i base0 = _mm512_load_si512(t->base), base1 = _mm512_load_si512(t->base + 16);
  const __m512i shift0 = _mm512_load_si512(t->shift), shift1 = _mm512_load_si512(t->shift + 16);
  const __m512i half = _mm512_set1_epi32(t->half), bit8 = _mm512_set1_epi32(256);
  const __m512i mantissa = _mm512_set1_epi32(0x7fffff), absolute = _mm512_set1_epi32(0x7fffffff);
  for (int64_t i = 0; i < whole; i += 64) {
    __m512 y[4], bound[4];
    __m128i bytes[4];
    __mmask16 far[4];
    for (int k = 0; k < 4; ++k) {
      y[k] = _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i + 16 * k), first), second);
      y[k] = _mm512_max_ps(y[k], lowest);
      __m512i u = _mm512_castps_si512(y[k]);
      __m512i size = _mm512_and_si512(u, absolute);
      size = _mm512_min_epi32(_mm512_max_epi32(size, low), one);
      __m512i binade = _mm512_srli_epi32(_mm512_sub_epi32(size, low), 23);
      __m512i at = _mm512_srlv_epi32(_mm512_and_si512(size, mantissa),
                                     _mm512_permutex2var_epi32(shift0, binade, shift1));
      at = _mm512_add_epi32(at, _mm512_permutex2var_epi32(base0, binade, base1));
      at = _mm512_mask_add_epi32(at, _mm512_movepi32_mask(u), at, half);
      bytes[k] = _mm512_cvtepi32_epi8(at);
      far[k] = _mm512_test_epi32_mask(at, bit8);
    }
    __m512i at = join(bytes);
    __mmask64 odd = _mm512_movepi8_mask(at), upper = join(far);
    __m512i part[4];
    for (int k = 0; k < 4; ++k) {
      part[k] = _mm512_permutex2var_epi8(_mm512_load_si512(t->coarse + 128 * k), at,
                                         _mm512_load_si512(t->coarse + 128 * k + 64));
    }
    __m512i c = _mm512_mask_blend_epi8(upper, _mm512_mask_blend_epi8(odd, part[0], part[1]),
                                       _mm512_mask_blend_epi8(odd, part[2], part[3]));
    look_up(t->threshold_planes, c, bound);
    __mmask16 above[4];
    for (int k = 0; k < 4; ++k) above[k] = _mm512_cmp_ps_mask(y[k], bound[k], _CMP_GT_OQ);
    c = _mm512_mask_add_epi8(c, join(above), c, _mm512_set1_epi8(1));
    _mm512_storeu_si512(codes + i, c);
  }
  encode_plain(t, x + whole, inverse, codes + whole, n - whole);
}

#else

void decode(const lro_tables* t, const uint8_t* codes, float scale, float* out, int64_t n) {
  decode_plain(t, codes, scale, out, n);
}

void encode(const lro_tables* t, const float* x, lro_inverse inverse, uint8_t* codes, int64_t n) {
  encode_plain(t, x, inverse, codes, n);
}

#endif

// The largest magnitude, as bits: integers order as floats do, and NaN above infinity. Eight lanes
// or one, a maximum is the same.
float largest(const float* x, int64_t n) {
  uint32_t most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < n; ++i) {
    uint32_t magnitude = lro_bits(x[i]) & 0x7fffffffu;
    most = magnitude > most ? magnitude : most;
  }
  return lro_float(most > 0x7f800000u ? 0x7fc00000u : most);
}

// A block of zeros keeps the code of zero and scale 0. One with an infinity or NaN has that for a
// scale and the code of zero throughout: it reads back as NaN, and is not silently wrong.
void quantise(const lro_tables* t, const float* x, uint8_t* codes, float* scale, int64_t n) {
  float absmax = largest(x, n);
  *scale = absmax;
  if (absmax == 0.0f || !(absmax < __builtin_inff())) {
    for (int64_t i = 0; i < n; ++i) codes[i] = t->zero;
  } else if (t->one_step) {
    encode(t, x, lro_invert(absmax), codes, n);
  } else {
    lro_inverse inverse = lro_invert(absmax);
    for (int64_t i = 0; i < n; ++i) {
      codes[i] = (uint8_t)lro_nearest(t->thresholds, lro_normalise(x[i], inverse));
    }
  }
}

// A positive square keeps a positive code: as 0 it would let the next step divide by eps alone.
void keep_positive(const lro_tables* t, const float* v, uint8_t* codes, float scale, int64_t n) {
  if (!(scale < __builtin_inff())) return;
  for (int64_t i = 0; i < n; ++i) codes[i] += (uint8_t)((codes[i] == t->zero) & (v[i] > 0.0f));
}

// --- the block updates, in place on decoded moments
// -----------------------------------------------

// A block is computed in bursts that the hardware's own prefetch does not run ahead of.
template <class T>
void prefetch(const T* p, int64_t n) {
  for (const char* c = (const char*)p; c < (const char*)(p + n); c += 64) __builtin_prefetch(c);
}

template <class T>
void prefetch_to_write(const T* p, int64_t n) {
  for (const char* c = (const char*)p; c < (const char*)(p + n); c += 64) __builtin_prefetch(c, 1);
}

struct Block {
  int64_t begin, length, index;  // first element, elements, entry of scales
};

template <class Args>
int check(const Args* a) {
  for (int64_t i = 0; i < a->count; ++i) {
    if (a->blocks[i] < 1 || a->blocks[i] > LRO_MAX_BLOCK) return LRO_BAD_BLOCK;
  }
  return LRO_OK;
}

// run(tensor, block) for every block: tasks are runs of whole blocks of one tensor.
template <class Args, class Run>
void over_blocks(const Args* a, int threads, Run run) {
  auto total = [&](int64_t i) { return a->rows[i] * lro_ceil(a->cols[i], a->blocks[i]); };
  auto group = [&](int64_t i) { return TASK / a->blocks[i]; };
  lro_parallel(
      a->count, threads, [&](int64_t i) { return lro_ceil(total(i), group(i)); },
      [&](int64_t i, int64_t task) {
        int64_t cols = a->cols[i], block = a->blocks[i], per_row = lro_ceil(cols, block);
        int64_t end = lro_min((task + 1) * group(i), total(i));
        for (int64_t k = task * group(i); k < end; ++k) {
          int64_t row = k / per_row, at = (k - row * per_row) * block;
          run(i, Block{row * cols + at, lro_min(block, cols - at), k});
        }
      });
}

// One moment: update(grads, moment, outs, n) on each block.
template <class Update>
int one_moment(const lro_update* a, int threads, Update update) {
  const lro_tables* t = lro_tables_of(a->signed_map);
  if (int wrong = check(a)) return wrong;
  if (!t) return LRO_NO_MEMORY;
  bool ok = false;
  lro_with_dtype(a->grad_dtype, [&](auto* g_null) {
    ok = lro_with_dtype(a->out_dtype, [&](auto* o_null) {
      over_blocks(a, threads, [&](int64_t i, Block k) {
        auto* g = (decltype(g_null))a->grads[i] + k.begin;
        auto* out = (decltype(o_null))a->outs[i] + k.begin;
        if (a->finite && a->finite[i] && !*a->finite[i]) {
          for (int64_t j = 0; j < k.length; ++j) lro_store(&out[j], 0.0f);
          return;
        }
        alignas(64) float m[LRO_MAX_BLOCK];
        decode(t, a->first_codes[i] + k.begin, a->first_scales[i][k.index], m, k.length);
        update(g, m, out, k.length);
        quantise(t, m, a->first_codes[i] + k.begin, &a->first_scales[i][k.index], k.length);
      });
    });
  });
  return ok ? LRO_OK : LRO_BAD_DTYPE;
}

}  // namespace

int LRO_LOCAL(lro_adamw_direction_8bit)(const lro_update* a, int threads) {
  const lro_tables *t = lro_tables_of(a->signed_map), *t2 = lro_tables_of(a->unsigned_map);
  float w1 = (float)(1 - a->a), b2 = (float)a->b, w2 = (float)(1 - a->b);
  if (int wrong = check(a)) return wrong;
  if (!t || !t2) return LRO_NO_MEMORY;
  bool ok = false;
  lro_with_dtype(a->grad_dtype, [&](auto* g_null) {
    ok = lro_with_dtype(a->out_dtype, [&](auto* o_null) {
      over_blocks(a, threads, [&](int64_t i, Block k) {
        auto* g = (decltype(g_null))a->grads[i] + k.begin;
        auto* out = (decltype(o_null))a->outs[i] + k.begin;
        if (a->finite && a->finite[i] && !*a->finite[i]) {
          for (int64_t j = 0; j < k.length; ++j) lro_store(&out[j], 0.0f);
          return;
        }
        alignas(64) float m[LRO_MAX_BLOCK], v[LRO_MAX_BLOCK];
        prefetch(g + k.length, k.length);
        prefetch_to_write(out + k.length, k.length);
        prefetch_to_write(a->first_codes[i] + k.begin + k.length, k.length);
        prefetch_to_write(a->second_codes[i] + k.begin + k.length, k.length);
        uint8_t *c = a->first_codes[i] + k.begin, *c2 = a->second_codes[i] + k.begin;
        float *s = &a->first_scales[i][k.index], *s2 = &a->second_scales[i][k.index];
        decode(t, c, *s, m, k.length);
        decode(t2, c2, *s2, v, k.length);
        if (!a->row_eps) {
          adamw(g, m, v, out, k.length, w1, b2, w2, a->eps[i], 1.0f);
        } else {
          int64_t width = a->widths[i];
          for (int64_t j = 0; j < k.length;) {
            int64_t row = (k.begin + j) / width;
            int64_t n = lro_min((row + 1) * width - k.begin, k.length) - j;
            adamw(g + j, m + j, v + j, out + j, n, w1, b2, w2, a->row_eps[i][row],
                  a->row_scale[i][row]);
            j += n;
          }
        }
        quantise(t, m, c, s, k.length);
        quantise(t2, v, c2, s2, k.length);
        keep_positive(t2, v, c2, *s2, k.length);
      });
    });
  });
  return ok ? LRO_OK : LRO_BAD_DTYPE;
}

int LRO_LOCAL(lro_lion_direction_8bit)(const lro_update* a, int threads) {
  float w1 = (float)(1 - a->a), w2 = (float)(1 - a->b);
  return one_moment(a, threads,
                    [&](auto* g, float* m, auto* out, int64_t n) { lion(g, m, out, n, w1, w2); });
}

int LRO_LOCAL(lro_moment_8bit)(const lro_update* a, int threads) {
  float decay = (float)a->a, weight = (float)a->b;
  return one_moment(a, threads, [&](auto* g, float* m, auto* out, int64_t n) {
    moment(g, m, out, n, decay, weight);
  });
}

int LRO_LOCAL(lro_quantize)(const lro_blockwise* a, int threads) {
  const lro_tables* t = lro_tables_of(a->map);
  if (int wrong = check(a)) return wrong;
  if (!t) return LRO_NO_MEMORY;
  bool ok = lro_with_dtype(a->dtype, [&](auto* null) {
    over_blocks(a, threads, [&](int64_t i, Block k) {
      auto* values = (decltype(null))a->values[i] + k.begin;
      alignas(64) float x[LRO_MAX_BLOCK];
      for (int64_t j = 0; j < k.length; ++j) x[j] = lro_load(values[j]);
      quantise(t, x, a->codes[i] + k.begin, &a->scales[i][k.index], k.length);
    });
  });
  return ok ? LRO_OK : LRO_BAD_DTYPE;
}

int LRO_LOCAL(lro_dequantize)(const lro_blockwise* a, int threads) {
  const lro_tables* t = lro_tables_of(a->map);
  if (int wrong = check(a)) return wrong;
  if (!t) return LRO_NO_MEMORY;
  bool ok = lro_with_dtype(a->dtype, [&](auto* null) {
    over_blocks(a, threads, [&](int64_t i, Block k) {
      auto* values = (decltype(null))a->values[i] + k.begin;
      alignas(64) float x[LRO_MAX_BLOCK];
      decode(t, a->codes[i] + k.begin, a->scales[i][k.index], x, k.length);
      for (int64_t j = 0; j < k.length; ++j) lro_store(&values[j], x[j]);
    });
  });
  return ok ? LRO_OK : LRO_BAD_DTYPE;
}
