// Plain C++: the path for processors without one of their own, and the oracle for the others' tests.
#define GEMKIT_ISA portable
#define GEMKIT_FUSED_ROWS 0
#define GEMKIT_TILE_ROWS 1
#include "int8_driver.h"

namespace gemkit::portable {

// Codes by row: [block][row][32].
template <class F>
static void unpack_chunk(const Packed& w, int64_t p, int64_t b0, int count, Chunk& chunk) {
  for (int b = 0; b < count; b++) {
    const uint8_t* record = w.record(p, b0 + b);
    const uint8_t* super = F::kQuant ? w.record(p, (b0 + b) / 8 * 8) - F::kSuperBytes : nullptr;
    const uint8_t *residual = record + 256, *scales = record + F::kScales;
    for (int row = 0; row < kPanelRows; row++) {
      uint8_t* codes = chunk.codes + 512 * b + 32 * row;
      for (int k = 0; k < kBlock; k++) {
        const int q = k / 4, at = 4 * row + k % 4;
        int code = record[64 * (q / 2) + at] >> 4 * (q & 1) & 15;
        if (F::R == 1) code |= (residual[at] >> q & 1) << 4;
        if (F::R == 2) code |= (residual[64 * (q / 4) + at] >> 2 * (q % 4) & 3) << 4;
        if (F::R == 4) code = code << 4 | (residual[64 * (q / 2) + at] >> 4 * (q & 1) & 15);
        codes[k] = static_cast<uint8_t>(code);
      }
      auto half = [&](const uint8_t* from) {
        uint16_t h;
        std::memcpy(&h, from + 2 * row, 2);
        return half_to_float(h);
      };
      for (int h = 0; h < F::kSub; h++) {
        float& scale = chunk.scale[b * F::kSub + h][row];
        if (!F::kQuant)
          scale = half(scales);
        else
          scale =
              half(super) * static_cast<float>(F::kMinimum ? scales[row] : static_cast<int8_t>(scales[16 * h + row]));
      }
      if (F::kMinimum)
        chunk.minimum[b][row] =
            F::kQuant ? -(half(super + 32) * static_cast<float>(scales[16 + row])) : half(scales + 32);
    }
  }
}

template <class F, int M>
static void tile(const Chunk& chunk, int count, const ActivationBlock* const* rows, float* const* y, bool first) {
  static_assert(M == 1);
  constexpr int kOffset = F::kOffsetLog2 < 0 ? 0 : 1 << (F::kOffsetLog2 < 0 ? 0 : F::kOffsetLog2),
                kWidth = kBlock / F::kSub;
  for (int row = 0; row < kPanelRows; row++) {
    float f = first ? 0.0f : y[0][row];
    for (int b = 0; b < count; b++) {
      const ActivationBlock& a = rows[0][b];
      const uint8_t* codes = chunk.codes + 512 * b + 32 * row;
      for (int h = 0; h < F::kSub; h++) {
        int32_t dot = 0;
        for (int k = h * kWidth; k < (h + 1) * kWidth; k++) dot += (static_cast<int32_t>(codes[k]) - kOffset) * a.q[k];
        if (a.quad * 4 / kWidth == h)
          for (int k = 0; k < 4; k++) dot += (static_cast<int32_t>(codes[4 * a.quad + k]) - kOffset) * a.spare[k];
        f = fused(static_cast<float>(dot) * chunk.scale[b * F::kSub + h][row], a.scale, f);
      }
      if (F::kMinimum) f = fused(chunk.minimum[b][row], a.scaled_sum, f);
    }
    y[0][row] = f;
  }
}

static int64_t peak_int8(int64_t rounds) {
  int8_t x[256];
  uint8_t w[256];
  for (int i = 0; i < 256; i++) x[i] = static_cast<int8_t>(i), w[i] = static_cast<uint8_t>(3 * i);
  volatile int32_t sink = 0;
  for (int64_t r = 0; r < rounds; r++) {
    int32_t sum = static_cast<int32_t>(r);
    for (int i = 0; i < 256; i++) sum += w[i] * x[i];
    sink = sum;
  }
  (void)sink;
  return rounds * 512;
}

GEMKIT_KERNEL_TABLE("portable")

}  // namespace gemkit::portable

namespace gemkit {
const Kernels* portable_kernels() { return &portable::kTable; }
}  // namespace gemkit
