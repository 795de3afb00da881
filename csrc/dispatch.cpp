// The exported functions: each goes to the widest instruction set this machine has, or to the one
// that LOWRANK_OPTIM_ISA names (a slower choice gives the same bits; tests rely on it).
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

extern const lro_kernels lro_kernels_baseline;
#ifdef LRO_X86
extern const lro_kernels lro_kernels_avx2;
extern const lro_kernels lro_kernels_avx512;
#endif

namespace {

struct Choice {
  const char* name;
  const lro_kernels* kernels;
};

Choice choose() {
  const char* wanted = getenv("LOWRANK_OPTIM_ISA");
  if (wanted && !*wanted) wanted = nullptr;
#ifdef LRO_X86
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vbmi");  // Ice Lake and Zen 4 on
  if (avx512 && (!wanted || !strcmp(wanted, "avx512"))) return {"avx512", &lro_kernels_avx512};
  if (avx2 && (!wanted || !strcmp(wanted, "avx2"))) return {"avx2", &lro_kernels_avx2};
#endif
  if (!wanted || !strcmp(wanted, "baseline")) return {"baseline", &lro_kernels_baseline};
  return {nullptr, &lro_kernels_baseline};
}

const Choice choice = choose();

}  // namespace

#define LRO_EXPORT extern "C" __attribute__((visibility("default")))

#define LRO_FORWARD(name, args) \
  LRO_EXPORT int lro_##name(const args* a, int threads) { return choice.kernels->name(a, threads); }
LRO_OPS(LRO_FORWARD)
LRO_CPU_OPS(LRO_FORWARD)

LRO_EXPORT const char* lro_isa(void) { return choice.name; }

LRO_EXPORT void lro_sizes(int64_t sizes[10]) {
  const int64_t all[10] = LRO_SIZES;
  memcpy(sizes, all, sizeof all);
}
