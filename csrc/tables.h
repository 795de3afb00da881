// What a CPU quantiser needs of a 256-entry map, made once per map and kept.
//
// Eight steps of binary search per element would cost more than the rest of the update. The top
// bits of a float (sign, exponent, 7 bits of mantissa) already name an interval that at most one
// threshold of the dynamic maps falls into: one table entry and one comparison give the exact code.
#pragma once

#include <stdint.h>

enum {
  LRO_KEY_SHIFT = 16,
  LRO_KEY_LOW = 0x34000000,  // 2^-23, below the first threshold of both dynamic maps
  LRO_KEYS = ((0x3f800000 - LRO_KEY_LOW) >> LRO_KEY_SHIFT) + 1,
};

// For registers, the same with as few intervals as the map allows: `bits` of mantissa where the map
// is dense, fewer elsewhere, so that one byte table of 512 entries holds both halves.
enum { LRO_BINADES = 32, LRO_COARSE = 512 };

struct lro_tables {
  alignas(64) float map[256];
  alignas(64) float thresholds[256];            // the last one is +inf
  alignas(64) uint8_t first[2 * LRO_KEYS + 4];  // by key, negative half second; 4 bytes of slack
  alignas(64) uint8_t map_planes[4][256];       // byte k of the entries of map
  alignas(64) uint8_t threshold_planes[4][256];
  alignas(64) uint8_t coarse[LRO_COARSE];  // codes by coarse interval, negative half from `half`
  alignas(64) int32_t base[LRO_BINADES];   // first interval of a binade, 23 below 1 to 1
  alignas(64) int32_t shift[LRO_BINADES];  // mantissa bits to drop
  int32_t half;
  int coarse_fits;
  int one_step;  // false: some interval holds more thresholds
  uint8_t zero;  // the code of 0
};

// Equal maps share one set of tables; null when memory is exhausted.
const lro_tables* lro_tables_of(const float* map);
