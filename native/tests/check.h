// A test program is a main() that calls CHECK; it stops at the first failure with the place and the values.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels/kernels.h"

#define CHECK(condition, ...)                                                            \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      std::fprintf(stderr, "%s:%d: CHECK(%s) failed: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                                 \
      std::fprintf(stderr, "\n");                                                        \
      std::exit(1);                                                                      \
    }                                                                                    \
  } while (0)

struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 2 + 1) {}
  uint32_t bits() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(state >> 32);
  }
  int below(int n) { return static_cast<int>(bits() % static_cast<uint32_t>(n)); }
  float uniform() { return static_cast<float>(bits() >> 8) / 16777216.0f; }
  float normal() {  // sum of uniforms: near enough
    float s = 0;
    for (int i = 0; i < 6; i++) s += uniform() - 0.5f;
    return s * 1.4f;
  }
  std::vector<float> normals(size_t n) {
    std::vector<float> v(n);
    for (float& x : v) x = normal();
    return v;
  }
};

// The paths that this machine runs; portable is always the last. Asked for once: a virtual machine takes microseconds
// to milliseconds for each question about the processor.
inline const std::vector<const gemkit::Kernels*>& paths() {
  static const std::vector<const gemkit::Kernels*> all = [] {
    std::vector<const gemkit::Kernels*> found;
    const char* error = nullptr;
    for (const char* name : {"avx512", "avx2", "neon", "portable"})
      if (const gemkit::Kernels* k = gemkit::select_kernels(name, &error)) found.push_back(k);
    return found;
  }();
  return all;
}

// A test program's argument `short`: smaller shapes, for sanitizers and emulators, which take 10 to 100 times as long.
inline bool short_run(int argc, char** argv) { return argc > 1 && !std::strcmp(argv[1], "short"); }
