// Shape of the quantised product, shared by all instruction sets: few rows are multiplied straight from the packed
// records, many rows pass over a panel whose codes were unpacked once into the first-level cache. The including file
// sets GEMKIT_FUSED_ROWS and GEMKIT_TILE_ROWS, then defines fused_panels, unpack_codes, tile and peak_int8.
#pragma once
#include "attention.h"
#include "float_kernels.h"
#include "kernels.h"

namespace gemkit::GEMKIT_ISA {

// A row of the table of formats as compile-time constants.
template <int Index>
struct Format {
  static constexpr FormatInfo kInfo = kFormats[Index];
  static constexpr int R = kInfo.residual_bits, kOffsetLog2 = kInfo.offset_log2, kSub = kInfo.sub_blocks;
  static constexpr bool kQuant = kInfo.k_quant, kMinimum = kInfo.has_minimum;
  static constexpr int kScales = kInfo.scales_at(), kRecord = kInfo.record_bytes(), kSuperBytes = kInfo.super_bytes();
  static constexpr int kChunk = R == 4 ? 16 : 32;  // blocks unpacked at a time
};

// Unpacked blocks of one panel: codes by quad, then row; scales as floats.
constexpr int kMaxChunk = 32;
struct Chunk {
  alignas(64) uint8_t codes[kMaxChunk * kUnpacked];
  alignas(64) float scale[kMaxChunk * 2][kPanelRows];
  alignas(64) float minimum[kMaxChunk][kPanelRows];
};

// Scales of sub-block h, and minima, of a record's sixteen rows; `super`: its super-scales.
template <class F>
GEMKIT_INLINE f32x16 record_scale(const uint8_t* record, const uint8_t* super, int h) {
  const uint8_t* scales = record + F::kScales;
  if constexpr (!F::kQuant) return load_f16(reinterpret_cast<const uint16_t*>(scales));
  const f32x16 d = load_f16(reinterpret_cast<const uint16_t*>(super));
  if constexpr (F::kMinimum) return d * from_u8(scales);
  return d * from_i8(reinterpret_cast<const int8_t*>(scales + kPanelRows * h));
}
template <class F>
GEMKIT_INLINE f32x16 record_minimum(const uint8_t* record, const uint8_t* super) {
  const uint8_t* scales = record + F::kScales;
  if constexpr (!F::kQuant) return load_f16(reinterpret_cast<const uint16_t*>(scales + kPanelHalves));
  return load_f16(reinterpret_cast<const uint16_t*>(super + kPanelHalves)) * from_u8(scales + kPanelRows) * set1(-1.0f);
}

// Sum of the quantised activations of sub-block `sub`.
template <class F>
GEMKIT_INLINE int32_t activation_sum(const ActivationBlock& a, int sub) {
  if constexpr (F::kSub == 1) return a.sum;
  return sub == 0 ? a.first_sum : a.sum - a.first_sum;
}

constexpr int kFusedRows = GEMKIT_FUSED_ROWS, kTileRows = GEMKIT_TILE_ROWS;

// y[m..m+M) of panels [p0, p1), unpacking in registers.
template <class F, int M>
static void fused_panels(const Product& product, int64_t m, int64_t p0, int64_t p1);
// Codes of a record, kUnpacked bytes. `next`: the same block of the next panel, which may be prefetched.
template <class F>
static void unpack_codes(const uint8_t* record, const uint8_t* next, uint8_t* codes);
// Adds the chunk's blocks to sixteen outputs of each of M rows, or begins them where `first`.
template <class F, int M>
static void tile(const Chunk& chunk, int count, const ActivationBlock* const* rows, float* const* y, bool first);

constexpr int32_t kMagicBits =
    0x4B400000;  // the float 1.5·2^23: an int32 sum that starts here is, as a float, 1.5·2^23 + sum

// Blocks [b0, b0 + count) of panel p.
template <class F>
static void unpack_chunk(const Packed& w, int64_t p, int64_t b0, int count, Chunk& chunk) {
  for (int b = 0; b < count; b++) {
    const uint8_t *record = w.record(p, b0 + b), *super = w.super(p, b0 + b);
    unpack_codes<F>(record, record + w.panel_bytes(), chunk.codes + kUnpacked * b);
    for (int h = 0; h < F::kSub; h++) store(chunk.scale[b * F::kSub + h], record_scale<F>(record, super, h));
    if constexpr (F::kMinimum) store(chunk.minimum[b], record_minimum<F>(record, super));
  }
}

template <class F>
static void matmul_int8(const Product& product, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  if constexpr (kFusedRows > 0) {
    if (m1 - m0 <= kFusedRows)
      return with_constant<kFusedRows>(static_cast<int>(m1 - m0 - 1),
                                       [&](auto i) { fused_panels<F, i + 1>(product, m0, p0, p1); });
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
          with_constant<kTileRows>(rows - 1, [&](auto i) { tile<F, i + 1>(chunk, count, a, y, b == 0); });
        }
      }
  }
}

static void matmul(const Product& product, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  if (m0 >= m1 || p0 >= p1) return;
  with_constant<kFormatCount>(static_cast<int>(product.w->format - kFormats), [&](auto i) {
    if constexpr (kFormats[i].quantised())
      matmul_int8<Format<i>>(product, m0, m1, p0, p1);
    else if constexpr (kFormats[i].type == kBF16)
      matmul_float<uint16_t>(product, m0, m1, p0, p1, [](const uint16_t* p) { return load_bf16(p); });
    else
      matmul_float<std::conditional_t<kFormats[i].type == kF32, float, uint16_t>>(
          product, m0, m1, p0, p1, [](const auto* p) { return load_element(p); });
  });
}

}  // namespace gemkit::GEMKIT_ISA

// Ends a translation unit: the table of its functions.
#define GEMKIT_KERNEL_TABLE(path)             \
  namespace gemkit {                          \
  const Kernels* path##_kernels() {           \
    static constexpr Kernels kTable = {       \
        .name = #path,                        \
        .quantise = path::quantise,           \
        .matmul = path::matmul,               \
        .rms_norm = path::rms_norm,           \
        .add = path::add,                     \
        .gelu_multiply = path::gelu_multiply, \
        .rope = path::rope,                   \
        .scale = path::scale,                 \
        .softcap = path::softcap,             \
        .write_cache = path::write_cache,     \
        .attend = path::attend,               \
        .merge = path::merge,                 \
        .largest = path::largest,             \
        .sum_exp = path::sum_exp,             \
        .screen = path::screen,               \
        .panel_largest = path::panel_largest, \
        .peak_int8 = path::peak_int8,         \
        .read = path::read_memory,            \
    };                                        \
    return &kTable;                           \
  }                                           \
  }
