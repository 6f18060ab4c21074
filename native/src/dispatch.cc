// Chooses the kernel table at run time. No instruction-set flags here: this file runs before the choice.
#include <cstring>
#include <iterator>
#include <string>
#include <vector>

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

}  // namespace

bool agrees_with_portable(const Kernels& k) {
  constexpr int64_t kRows = kPanelRows, kCols = kSuper, kTokens = 13;
  const Kernels& portable = *portable_kernels();
  uint32_t state = 1;
  auto random = [&state] { return (state = state * 1664525 + 1013904223) >> 16; };
  std::vector<float> x(kTokens * kCols);
  for (float& v : x) v = (static_cast<float>(random() % 2001) - 1000) / 250;
  for (int64_t t = 0; t < kTokens; t++) x[static_cast<size_t>(t * kCols + 37 * t % kCols)] = 60;  // outliers
  for (const FormatInfo& format : kFormats) {
    if (!format.quantised()) continue;
    Packed w{&format, kRows, kCols};
    std::vector<uint8_t> file(static_cast<size_t>(kRows * kCols / format.file_elements * format.file_bytes));
    for (uint8_t& byte : file) byte = static_cast<uint8_t>(random() & 0x3f);  // small codes, and scales that are finite
    Arena packed, blocks[2];
    if (!packed.allocate(w.bytes())) return true;
    pack_panels(format, file.data(), w, packed.data, 0, 1);
    w.data = packed.data;
    std::vector<float> y[2] = {std::vector<float>(kTokens * kRows), std::vector<float>(kTokens * kRows)};
    for (int i = 0; i < 2; i++) {
      const Kernels& path = i ? k : portable;
      if (!blocks[i].allocate(kTokens * kCols / kBlock * sizeof(ActivationBlock))) return true;
      const Activations a{blocks[i].as<ActivationBlock>(), kCols / kBlock};
      for (int64_t t = 0; t < kTokens; t++) path.quantise(x.data() + t * kCols, a.row(t), a.per_row);
      const Product product{&w, &a, nullptr, 0, y[i].data(), kRows};
      path.matmul(product, 0, 1, 0, 1);        // one row
      path.matmul(product, 1, kTokens, 0, 1);  // more than a tile
    }
    if (std::memcmp(y[0].data(), y[1].data(), y[0].size() * sizeof(float))) return false;
  }
  return true;
}

const Kernels* select_kernels(const char* forced, const char** error) {
  *error = nullptr;
  if (!forced || !*forced) {
    static const Kernels* const chosen = [] {
      const Path* path = kPaths;
#if defined(GEMKIT_SIMDE)
      path++;  // emulated: only on demand
#endif
      while (!path->runs() || !agrees_with_portable(*path->table())) path++;
      return path->table();
    }();
    return chosen;
  }
  static const std::string unknown = [] {
    std::string text = "GEMKIT_ISA must be one of ";
    for (size_t i = std::size(kPaths); i-- > 0;) text += std::string(kPaths[i].name) + (i ? ", " : "");
    return text;
  }();
  *error = unknown.c_str();
  for (const Path& path : kPaths) {
    if (std::strcmp(forced, path.name)) continue;
    if (path.runs()) return *error = nullptr, path.table();
    *error = "GEMKIT_ISA names an instruction set that this processor lacks; unset it or use portable";
  }
  return nullptr;
}

}  // namespace gemkit
