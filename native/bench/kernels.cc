// Times the quantised products alone, on one thread:  kernels [ladder]   or   kernels rows cols
// First two ladders from the plain loop to the kernel in use (ladder.h), then every type and number of rows: GB/s of
// packed weights and 10^9 operations a second (2 per multiply-add), best of several; every path this machine runs.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels/kernels.h"
#include "ladder.h"
#include "os.h"

using namespace gemkit;

static double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

int main(int argc, char** argv) {
  if (argc < 3) {
    if (const int code = run_ladders(); code || (argc == 2 && !std::strcmp(argv[1], "ladder"))) return code;
  }
  const int64_t rows = argc > 1 ? std::atoll(argv[1]) : 8192, cols = argc > 2 ? std::atoll(argv[2]) : 2048;
  if (rows % kPanelRows || cols % kSuper)
    return std::fprintf(stderr, "rows must be a multiple of 16 and cols of 256\n"), 2;
  const GgmlType types[] = {kQ4_0, kQ5_0, kQ8_0, kQ4_K, kQ5_K, kQ6_K, kBF16};
  const int64_t batches[] = {1, 2, 4, 8, 16, 128, 512};
  FlushDenormals flush;
  for (const char* name : {"avx512", "avx2", "portable"}) {
    const char* error = nullptr;
    const Kernels* k = select_kernels(name, &error);
    if (!k) continue;
    std::printf("%-9s %-5s", k->name, "type");
    for (int64_t m : batches) std::printf("  %6lld rows", static_cast<long long>(m));
    std::printf("    [GB/s] GOPS …\n");
    for (GgmlType type : types) {
      Packed w;
      w.format = find_format(type), w.rows = rows, w.cols = cols;
      Arena memory, x, y, blocks;
      if (!memory.allocate(w.bytes()) || !x.allocate(512 * cols * 4) || !y.allocate(512 * rows * 4) ||
          !blocks.allocate(512 * (cols / kBlock) * sizeof(ActivationBlock)))
        return std::fprintf(stderr, "not enough memory\n"), 1;
      std::vector<uint8_t> file(static_cast<size_t>(rows) * (cols / w.format->file_elements) * w.format->file_bytes);
      uint32_t state = 1;
      for (auto& byte : file)
        state = state * 1664525 + 1013904223, byte = static_cast<uint8_t>((state >> 24) & 0x3f);  // scales stay finite
      pack_panels(*w.format, file.data(), w, memory.data, 0, w.panels());
      w.data = memory.data;
      Activations a{blocks.as<ActivationBlock>(), cols / kBlock};
      for (int64_t i = 0; i < 512 * cols; i++)
        state = state * 1664525 + 1013904223, x.as<float>()[i] = static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
      for (int64_t m = 0; m < 512; m++) k->quantise(x.as<float>() + m * cols, a.row(m), a.per_row);
      std::printf("%-9s %-5s", "", w.format->name);
      for (int64_t m : batches) {
        std::vector<double> times;
        const int64_t panels = m >= 16 ? std::min<int64_t>(w.panels(), 64) : w.panels();
        for (int rep = 0; rep < (m >= 128 ? 6 : 25); rep++) {
          const double begin = seconds();
          k->matmul({&w, &a, x.as<float>(), cols, y.as<float>(), rows}, 0, m, 0, panels);
          if (rep) times.push_back(seconds() - begin);
        }
        std::sort(times.begin(), times.end());
        const double t = times[0];
        const double ops = 2.0 * static_cast<double>(m * panels * kPanelRows * cols) / t / 1e9;
        if (m == 1)
          std::printf("  [%4.1f] %4.0f", static_cast<double>(w.panel_bytes() * panels) / t / 1e9, ops);
        else
          std::printf("  %11.0f", ops);
        std::fflush(stdout);
        if (k == portable_kernels() && m == 16) break;
      }
      std::printf("\n");
    }
  }
}
