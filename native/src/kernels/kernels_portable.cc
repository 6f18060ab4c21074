// Plain C++: the path for processors without one of their own, and the oracle for the others' tests.
#define GEMKIT_ISA portable
#define GEMKIT_FUSED_ROWS 0
#define GEMKIT_TILE_ROWS 1
#include "int8_driver.h"

namespace gemkit::portable {

// By row: codes[row][kBlock].
template <class F>
static void unpack_codes(const uint8_t* record, const uint8_t*, uint8_t* codes) {
  const uint8_t* residual = record + kPlane;
  for (int row = 0; row < kPanelRows; row++)
    for (int k = 0; k < kBlock; k++) {
      const int q = k / kQuad, at = kQuad * row + k % kQuad;
      int code = record[kVector * (q / 2) + at] >> 4 * (q & 1) & 15;
      if (F::R == 1) code |= (residual[at] >> q & 1) << 4;
      if (F::R == 2) code |= (residual[kVector * (q / 4) + at] >> 2 * (q % 4) & 3) << 4;
      if (F::R == 4) code = code << 4 | (residual[kVector * (q / 2) + at] >> 4 * (q & 1) & 15);
      codes[kBlock * row + k] = static_cast<uint8_t>(code);
    }
}

template <class F, int M>
static void tile(const Chunk& chunk, int count, const ActivationBlock* const* rows, float* const* y, bool first) {
  static_assert(M == 1);
  constexpr int kOffset = F::kInfo.offset(), kWidth = kBlock / F::kSub;
  for (int row = 0; row < kPanelRows; row++) {
    float f = first ? 0.0f : y[0][row];
    for (int b = 0; b < count; b++) {
      const ActivationBlock& a = rows[0][b];
      const uint8_t* codes = chunk.codes + kUnpacked * b + kBlock * row;
      for (int h = 0; h < F::kSub; h++) {
        int32_t dot = 0;
        for (int k = h * kWidth; k < (h + 1) * kWidth; k++) dot += (static_cast<int32_t>(codes[k]) - kOffset) * a.q[k];
        if (a.quad * kQuad / kWidth == h)
          for (int k = 0; k < kQuad; k++)
            dot += (static_cast<int32_t>(codes[kQuad * a.quad + k]) - kOffset) * a.spare[k];
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

}  // namespace gemkit::portable

GEMKIT_KERNEL_TABLE(portable)
