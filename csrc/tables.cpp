#include "tables.h"

#include <cmath>
#include <cstring>
#include <mutex>
#include <new>

#include "elements.h"

namespace {

struct Entry {
  lro_tables tables;
  Entry* next;
};

std::mutex mutex;
Entry* entries = nullptr;  // never freed: callers hold pointers; a process uses two maps

void split_bytes(const float* values, uint8_t planes[4][256]) {
  for (int i = 0; i < 256; ++i) {
    uint32_t u = lro_bits(values[i]);
    for (int k = 0; k < 4; ++k) planes[k][i] = (uint8_t)(u >> (8 * k));
  }
}

// The lowest and highest code of the magnitudes from `low` to `high` (as bits) of one sign.
void span(const lro_tables* t, uint32_t low, uint32_t high, uint32_t sign, uint32_t* first,
          uint32_t* last) {
  *first = lro_nearest(t->thresholds, lro_float(sign | (sign ? high : low)));
  *last = lro_nearest(t->thresholds, lro_float(sign | (sign ? low : high)));
}

// The fewest intervals of each binade that no interval holds two thresholds, of either sign.
void build_coarse(lro_tables* t) {
  int signs = t->map[0] < 0 ? 2 : 1;
  uint8_t codes[2][LRO_COARSE];
  int32_t count = 0;
  t->coarse_fits = 0;
  for (uint32_t e = 0; e < LRO_BINADES; ++e) {
    uint32_t exponent = (LRO_KEY_LOW >> 23) + e;
    bool settled = exponent > 127;  // past 1, where the clamp leaves nothing
    t->base[e] = settled ? 0 : count;
    t->shift[e] = 23;
    for (int bits = 0; !settled; ++bits) {
      if (bits > 8 || count + (1 << bits) > LRO_COARSE) return;
      settled = true;
      for (int32_t k = 0; k < 1 << bits && settled; ++k) {
        uint32_t low = (exponent << 23) + ((uint32_t)k << (23 - bits));
        uint32_t high = low + (1u << (23 - bits)) - 1;
        if (e == 0 && k == 0) low = 0;
        if (exponent == 127) low = high = 0x3f800000u;
        for (int s = 0; s < signs; ++s) {
          uint32_t first, last;
          span(t, low, high, s ? 0x80000000u : 0, &first, &last);
          codes[s][count + k] = (uint8_t)first;
          settled = settled && last <= first + 1;
        }
      }
      t->shift[e] = 23 - bits;
      if (settled) count += 1 << bits;
    }
  }
  if (count * signs > LRO_COARSE) return;
  t->half = count;
  std::memset(t->coarse, 0, sizeof t->coarse);
  for (int s = 0; s < signs; ++s) std::memcpy(t->coarse + s * count, codes[s], (size_t)count);
  t->coarse_fits = 1;
}

void build(lro_tables* t, const float* map) {
  std::memcpy(t->map, map, sizeof t->map);
  for (int i = 0; i < 255; ++i) t->thresholds[i] = lro_threshold(map[i], map[i + 1]);
  t->thresholds[255] = INFINITY;
  t->zero = (uint8_t)lro_nearest(t->thresholds, 0.0f);
  t->one_step = 1;
  std::memset(t->first, 0, sizeof t->first);
  for (uint32_t key = 0; key < LRO_KEYS; ++key) {
    uint32_t low = key ? LRO_KEY_LOW + (key << LRO_KEY_SHIFT) : 0;
    uint32_t high = LRO_KEY_LOW + ((key + 1) << LRO_KEY_SHIFT) - 1;
    if (key == LRO_KEYS - 1) high = 0x7f800000u;  // rounding can leave |x| just above 1
    for (int negative = 0; negative < 2; ++negative) {
      uint32_t sign = negative ? 0x80000000u : 0;
      uint32_t first, last;
      span(t, low, high, sign, &first, &last);
      t->first[negative * LRO_KEYS + key] = (uint8_t)first;
      if (last > first + 1) t->one_step = 0;
    }
  }
  split_bytes(t->map, t->map_planes);
  split_bytes(t->thresholds, t->threshold_planes);
  build_coarse(t);
}

}  // namespace

const lro_tables* lro_tables_of(const float* map) {
  std::lock_guard<std::mutex> lock(mutex);
  for (Entry* e = entries; e; e = e->next) {
    if (std::memcmp(e->tables.map, map, sizeof e->tables.map) == 0) return &e->tables;
  }
  Entry* e = new (std::nothrow) Entry;
  if (!e) return nullptr;
  build(&e->tables, map);
  e->next = entries;
  entries = e;
  return &e->tables;
}
