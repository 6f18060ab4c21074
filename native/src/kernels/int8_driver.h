// Shape of the quantised product, shared by all instruction sets: few rows are multiplied straight from the packed
// records, many rows pass over a panel whose codes were unpacked once into the first-level cache. The including file
// sets GEMKIT_FUSED_ROWS and GEMKIT_TILE_ROWS, then defines fused_panels, unpack_chunk, tile and peak_int8.
#pragma once
#include <utility>

#include "attention.h"
#include "float_kernels.h"
#include "kernels.h"

namespace gemkit::GEMKIT_ISA {

// FormatInfo as compile-time constants.
template <int R_, int OffsetLog2, int Sub, bool K, bool Minimum>
struct Format {
  static constexpr int R = R_, kOffsetLog2 = OffsetLog2, kSub = Sub;
  static constexpr bool kQuant = K, kMinimum = Minimum;
  static constexpr int kScales = 256 + 64 * R;  // where a record's scales begin
  static constexpr int kRecord = kScales + (!K && Minimum ? 64 : 32);
  static constexpr int kSuperBytes = K ? (Minimum ? 64 : 32) : 0;
  static constexpr int kChunk = R == 4 ? 16 : 32;  // blocks unpacked at a time
};

// Unpacked blocks of one panel: codes by quad, then row; scales as floats.
struct Chunk {
  alignas(64) uint8_t codes[32 * 512];
  alignas(64) float scale[32 * 2][16];
  alignas(64) float minimum[32][16];
};

constexpr int kFusedRows = GEMKIT_FUSED_ROWS, kTileRows = GEMKIT_TILE_ROWS;

// y[m..m+M) of panels [p0, p1), unpacking in registers.
template <class F, int M>
static void fused_panels(const Product& product, int64_t m, int64_t p0, int64_t p1);
// Blocks [b0, b0 + count) of panel p.
template <class F>
static void unpack_chunk(const Packed& w, int64_t p, int64_t b0, int count, Chunk& chunk);
// Adds the chunk's blocks to sixteen outputs of each of M rows, or begins them where `first`.
template <class F, int M>
static void tile(const Chunk& chunk, int count, const ActivationBlock* const* rows, float* const* y, bool first);

constexpr int32_t kMagicBits =
    0x4B400000;  // the float 1.5·2^23: an int32 sum that starts here is, as a float, 1.5·2^23 + sum

template <class F, int... I>
static void fused_rows(int rows, const Product& product, int64_t m, int64_t p0, int64_t p1,
                       std::integer_sequence<int, I...>) {
  (void)((rows == I + 1 && (fused_panels<F, I + 1>(product, m, p0, p1), true)) || ...);
}

template <class F, int... I>
static void tile_rows(int rows, const Chunk& chunk, int count, const ActivationBlock* const* a, float* const* y,
                      bool first, std::integer_sequence<int, I...>) {
  (void)((rows == I + 1 && (tile<F, I + 1>(chunk, count, a, y, first), true)) || ...);
}

template <class F>
static void matmul_int8(const Product& product, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  if constexpr (kFusedRows > 0) {
    if (m1 - m0 <= kFusedRows)
      return fused_rows<F>(static_cast<int>(m1 - m0), product, m0, p0, p1,
                           std::make_integer_sequence<int, kFusedRows>());
  }
  const Packed& w = *product.w;
  const int64_t blocks = w.blocks();
  // Rows whose activations fit the second-level cache pass over a panel together
  int64_t group = 262144 / (blocks * static_cast<int64_t>(sizeof(ActivationBlock)));
  group = group < 4 * kTileRows ? 4 * kTileRows : group / kTileRows * kTileRows;
  Chunk chunk;
  for (int64_t g0 = m0; g0 < m1; g0 += group) {
    const int64_t g1 = g0 + group < m1 ? g0 + group : m1;
    for (int64_t p = p0; p < p1; p++)
      for (int64_t b = 0; b < blocks; b += F::kChunk) {
        const int count = static_cast<int>(blocks - b < F::kChunk ? blocks - b : F::kChunk);
        unpack_chunk<F>(w, p, b, count, chunk);
        for (int64_t m = g0; m < g1; m += kTileRows) {
          const int rows = static_cast<int>(g1 - m < kTileRows ? g1 - m : kTileRows);
          const ActivationBlock* a[kTileRows];
          float* y[kTileRows];
          for (int i = 0; i < rows; i++) {
            a[i] = product.a->blocks + (m + i) * product.a->per_row + b;
            y[i] = product.y + (m + i) * product.ldy + p * kPanelRows;
          }
          tile_rows<F>(rows, chunk, count, a, y, b == 0, std::make_integer_sequence<int, kTileRows>());
        }
      }
  }
}

static void matmul(const Product& product, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  if (m0 >= m1 || p0 >= p1) return;
  switch (product.w->format->type) {
    case kQ4_0:
      return matmul_int8<Format<0, 3, 1, false, false>>(product, m0, m1, p0, p1);
    case kQ4_1:
      return matmul_int8<Format<0, -1, 1, false, true>>(product, m0, m1, p0, p1);
    case kQ5_0:
      return matmul_int8<Format<1, 4, 1, false, false>>(product, m0, m1, p0, p1);
    case kQ5_1:
      return matmul_int8<Format<1, -1, 1, false, true>>(product, m0, m1, p0, p1);
    case kQ8_0:
      return matmul_int8<Format<4, 7, 1, false, false>>(product, m0, m1, p0, p1);
    case kQ4_K:
      return matmul_int8<Format<0, -1, 1, true, true>>(product, m0, m1, p0, p1);
    case kQ5_K:
      return matmul_int8<Format<1, -1, 1, true, true>>(product, m0, m1, p0, p1);
    case kQ6_K:
      return matmul_int8<Format<2, 5, 2, true, false>>(product, m0, m1, p0, p1);
    default:
      return matmul_float(product, m0, m1, p0, p1);
  }
}

}  // namespace gemkit::GEMKIT_ISA

// Ends a translation unit: its table, from the functions above and the including file's peak_int8.
#define GEMKIT_KERNEL_TABLE(path_name)                                                                  \
  static const Kernels kTable = {path_name, quantise, matmul,  rms_norm,      add,       gelu_multiply, \
                                 rope,      scale,    softcap, write_cache,   attend,    join,          \
                                 largest,   sum_exp,  screen,  panel_largest, peak_int8, read_memory};
