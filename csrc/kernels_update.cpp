// adamw_direction, lion_direction and moment on float32 moments, and stochastic_round.
#include "kernels.h"
#include "loops.h"

namespace {

const int64_t CHUNK = 1 << 15;

// run(tensor, begin, end, typed grads, typed outs), or zeros where the gradient is unsound.
template <class Run>
int over_chunks(const lro_update* a, int threads, Run run) {
  bool ok = false;
  lro_with_dtype(a->grad_dtype, [&](auto* g_null) {
    ok = lro_with_dtype(a->out_dtype, [&](auto* o_null) {
      lro_parallel(
          a->count, threads, [&](int64_t i) { return lro_ceil(a->numels[i], CHUNK); },
          [&](int64_t i, int64_t task) {
            int64_t begin = task * CHUNK, end = lro_min(begin + CHUNK, a->numels[i]);
            auto* g = (decltype(g_null))a->grads[i];
            auto* out = (decltype(o_null))a->outs[i];
            if (a->finite && a->finite[i] && !*a->finite[i]) {
              for (int64_t k = begin; k < end; ++k) lro_store(&out[k], 0.0f);
            } else {
              run(i, begin, end, g, out);
            }
          });
    });
  });
  return ok ? LRO_OK : LRO_BAD_DTYPE;
}

}  // namespace

int LRO_LOCAL(lro_adamw_direction)(const lro_update* a, int threads) {
  float w1 = (float)(1 - a->a), b2 = (float)a->b, w2 = (float)(1 - a->b);
  return over_chunks(a, threads, [&](int64_t i, int64_t begin, int64_t end, auto* g, auto* out) {
    float *m = a->first[i], *v = a->second[i];
    if (!a->row_eps) {
      adamw(g + begin, m + begin, v + begin, out + begin, end - begin, w1, b2, w2, a->eps[i], 1.0f);
      return;
    }
    int64_t width = a->widths[i];
    for (int64_t k = begin; k < end;) {
      int64_t row = k / width, stop = lro_min((row + 1) * width, end);
      adamw(g + k, m + k, v + k, out + k, stop - k, w1, b2, w2, a->row_eps[i][row],
            a->row_scale[i][row]);
      k = stop;
    }
  });
}

int LRO_LOCAL(lro_lion_direction)(const lro_update* a, int threads) {
  float w1 = (float)(1 - a->a), w2 = (float)(1 - a->b);
  return over_chunks(a, threads, [&](int64_t i, int64_t begin, int64_t end, auto* g, auto* out) {
    lion(g + begin, a->first[i] + begin, out + begin, end - begin, w1, w2);
  });
}

int LRO_LOCAL(lro_moment)(const lro_update* a, int threads) {
  float decay = (float)a->a, weight = (float)a->b;
  return over_chunks(a, threads, [&](int64_t i, int64_t begin, int64_t end, auto* g, auto* out) {
    moment(g + begin, a->first[i] + begin, out + begin, end - begin, decay, weight);
  });
}

int LRO_LOCAL(lro_stochastic_round)(const lro_rounding* a, int threads) {
  lro_parallel(
      a->count, threads, [&](int64_t i) { return lro_ceil(a->numels[i], CHUNK); },
      [&](int64_t i, int64_t task) {
        int64_t begin = task * CHUNK, end = lro_min(begin + CHUNK, a->numels[i]);
        lro_place place = {a->widths[i], a->offsets[i], a->rows[i], a->columns[i]};
        uint32_t seed = a->seeds[i], step = place.column;
        while (begin < end) {  // a row, or what of it is in this chunk
          int64_t n = lro_min(place.width - begin % place.width, end - begin);
          const float* __restrict x = a->values[i] + begin;
          uint16_t* __restrict out = a->outs[i] + begin;
          uint32_t base = lro_position(begin, place);
#pragma omp simd
          for (int64_t k = 0; k < n; ++k) {
            out[k] = lro_round_stochastic(x[k], base + (uint32_t)k * step, seed);
          }
          begin += n;
        }
      });
  return LRO_OK;
}
