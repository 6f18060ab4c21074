// Chooses the kernel table at run time. No instruction-set flags here: this file runs before the choice.
#include <cstring>

#include "kernels/kernels.h"

#if defined(__x86_64__) || defined(_M_X64)
#define GEMKIT_X86 1
#if defined(_MSC_VER)
#include <intrin.h>
#endif
#endif

namespace gemkit {
namespace {

#if defined(GEMKIT_X86)
#if defined(_MSC_VER)
bool bit(int leaf, int sub, int reg, int position) {
  int r[4];
  __cpuidex(r, leaf, sub);
  return r[reg] >> position & 1;
}
bool saved_by_system(uint64_t mask) { return bit(1, 0, 2, 27) && (_xgetbv(0) & mask) == mask; }
bool has_avx2() { return saved_by_system(6) && bit(7, 0, 1, 5) && bit(1, 0, 2, 12) && bit(1, 0, 2, 29); }
bool has_avx512() {
  return has_avx2() && saved_by_system(0xe6) && bit(7, 0, 1, 16) && bit(7, 0, 1, 17) && bit(7, 0, 1, 30) &&
         bit(7, 0, 1, 31) && bit(7, 0, 2, 11);
}
#else
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
#if defined(GEMKIT_SIMDE)
  return has_avx2();
#else
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
#endif
}
#endif
#endif

}  // namespace

const Kernels* select_kernels(const char* forced, const char** error) {
  *error = nullptr;
  const bool any = !forced || !*forced;
#if defined(GEMKIT_X86)
#if defined(GEMKIT_SIMDE)  // emulated: only on demand
  if (!any && !std::strcmp(forced, "avx512") && has_avx512()) return avx512_kernels();
#else
  if ((any || !std::strcmp(forced, "avx512")) && has_avx512()) return avx512_kernels();
#endif
  if ((any || !std::strcmp(forced, "avx2")) && has_avx2()) return avx2_kernels();
#endif
  if (any || !std::strcmp(forced, "portable")) return portable_kernels();
  *error = std::strcmp(forced, "avx512") && std::strcmp(forced, "avx2")
               ? "GEMKIT_ISA must be one of portable, avx2, avx512"
               : "GEMKIT_ISA names an instruction set that this processor lacks; unset it or use portable";
  return nullptr;
}

}  // namespace gemkit
