// Chooses the kernel table at run time. No instruction-set flags here: this file runs before the choice.
#include <cstring>

#include "kernels/kernels.h"
#include "os.h"

#if defined(__x86_64__) || defined(_M_X64)
#define GEMKIT_X86 1
#include <cpuid.h>
#elif defined(__aarch64__) || defined(_M_ARM64)
#define GEMKIT_ARM64 1
#endif

namespace gemkit {
namespace {

#if defined(GEMKIT_X86)
// Not __builtin_cpu_supports: some compilers' run-time libraries lack what it needs.
bool bit(unsigned leaf, int reg, int position) {
  unsigned r[4];
  if (!__get_cpuid_count(leaf, 0, r, r + 1, r + 2, r + 3)) return false;
  return r[reg] >> position & 1;
}
// Whether the operating system saves these registers.
bool saved(uint32_t mask) {
  if (!bit(1, 2, 27)) return false;
  uint32_t on, high;
  asm volatile("xgetbv" : "=a"(on), "=d"(high) : "c"(0));
  return (on & mask) == mask;
}
// AVX2, FMA, F16C
bool has_avx2() { return saved(6) && bit(7, 1, 5) && bit(1, 2, 12) && bit(1, 2, 29); }
bool has_avx512() {
#if defined(GEMKIT_SIMDE)
  return has_avx2();
#else  // F, DQ, BW, VL, VNNI
  return has_avx2() && saved(0xe6) && bit(7, 1, 16) && bit(7, 1, 17) && bit(7, 1, 30) && bit(7, 1, 31) && bit(7, 2, 11);
#endif
}
#endif

bool always() { return true; }

struct Path {
  const char* name;
  bool (*runs)();
  const Kernels* (*table)();
};

// Of this architecture, best first.
constexpr Path kPaths[] = {
#if defined(GEMKIT_X86)
    {"avx512", has_avx512, avx512_kernels},
    {"avx2", has_avx2, avx2_kernels},
#elif defined(GEMKIT_ARM64)
    {"neon", has_dot_product, neon_kernels},
#endif
    {"portable", always, portable_kernels},
};

#if defined(GEMKIT_X86)
#define GEMKIT_PATHS "portable, avx2, avx512"
#elif defined(GEMKIT_ARM64)
#define GEMKIT_PATHS "portable, neon"
#else
#define GEMKIT_PATHS "portable"
#endif

#if defined(GEMKIT_SIMDE)  // emulated: only on demand
constexpr int kFirstAutomatic = 1;
#else
constexpr int kFirstAutomatic = 0;
#endif

}  // namespace

const Kernels* select_kernels(const char* forced, const char** error) {
  *error = nullptr;
  if (!forced || !*forced) {
    const Path* path = kPaths + kFirstAutomatic;
    while (!path->runs()) path++;
    return path->table();
  }
  *error = "GEMKIT_ISA must be one of " GEMKIT_PATHS;
  for (const Path& path : kPaths) {
    if (std::strcmp(forced, path.name)) continue;
    if (path.runs()) return *error = nullptr, path.table();
    *error = "GEMKIT_ISA names an instruction set that this processor lacks; unset it or use portable";
  }
  return nullptr;
}

}  // namespace gemkit
