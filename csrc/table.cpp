// The kernels of one instruction set, as the dispatcher takes them.
#include "kernels.h"

extern const lro_kernels LRO_LOCAL(lro_kernels);
const lro_kernels LRO_LOCAL(lro_kernels) = {
#define LRO_ENTRY(name, args) LRO_LOCAL(lro_##name),
    LRO_OPS(LRO_ENTRY) LRO_CPU_OPS(LRO_ENTRY)
#undef LRO_ENTRY
};
