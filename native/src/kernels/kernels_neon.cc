// AArch64 with the dot-product extension: one sdot multiplies a quad of four rows and sums it exactly in int32. Codes
// below 2^7 are signed bytes as they stand; the 8-bit form becomes signed by its offset.
#define GEMKIT_ISA neon
#define GEMKIT_NEON 1
#define GEMKIT_FUSED_ROWS 4
#define GEMKIT_TILE_ROWS 4
#include "int8_driver.h"

namespace gemkit::neon {

constexpr int kAhead = 0;     // bytes prefetched ahead of the record being read
constexpr int kQuarters = 4;  // registers of four rows in a panel, and in a plane vector
constexpr int kQuarterVector = kVector / kQuarters;

// v · 2^By in each byte, bits past either end lost.
template <int By>
GEMKIT_INLINE uint8x16_t shifted(uint8x16_t v) {
  if constexpr (By > 0)
    return vshlq_n_u8(v, By);
  else if constexpr (By < 0)
    return vshrq_n_u8(v, -By);
  else
    return v;
}
// The same, the distance not known in advance.
GEMKIT_INLINE uint8x16_t shifted(uint8x16_t v, int by) { return vshlq_u8(v, vdupq_n_s8(static_cast<int8_t>(by))); }

// Codes of four rows, four bytes a row, from a packed record.
template <class F>
struct RecordCodes {
  const uint8_t* record;

  // Quad Q of rows 4g … 4g + 3.
  template <int Q>
  GEMKIT_MEMBER int8x16_t quad(int g) const {
    const uint8x16_t nibble = vdupq_n_u8(15), v = vld1q_u8(record + kVector * (Q / 2) + kQuarterVector * g);
    const uint8_t* residual = record + kPlane + kQuarterVector * g;
    if constexpr (F::R == 4) {
      const uint8x16_t w = vld1q_u8(residual + kVector * (Q / 2));
      const uint8x16_t code = Q % 2 ? vsriq_n_u8(v, w, 4) : vsliq_n_u8(w, v, 4);
      return vreinterpretq_s8_u8(veorq_u8(code, vdupq_n_u8(128)));
    }
    uint8x16_t code = Q % 2 ? vshrq_n_u8(v, 4) : vandq_u8(v, nibble);
    if constexpr (F::R == 1) code = vorrq_u8(code, vandq_u8(shifted<4 - Q>(vld1q_u8(residual)), vdupq_n_u8(16)));
    if constexpr (F::R == 2)
      code = vorrq_u8(code, vandq_u8(shifted<4 - 2 * (Q % 4)>(vld1q_u8(residual + kVector * (Q / 4))), vdupq_n_u8(48)));
    return vreinterpretq_s8_u8(code);
  }

  // The same of any one quad, `q` not known in advance.
  GEMKIT_MEMBER int8x16_t quad(int g, int q) const {
    const uint8x16_t nibble = vdupq_n_u8(15);
    const uint8_t* residual = record + kPlane + kQuarterVector * g;
    uint8x16_t code =
        vandq_u8(shifted(vld1q_u8(record + kVector * (q / 2) + kQuarterVector * g), -4 * (q % 2)), nibble);
    if constexpr (F::R == 4) {
      const uint8x16_t low = vandq_u8(shifted(vld1q_u8(residual + kVector * (q / 2)), -4 * (q % 2)), nibble);
      code = veorq_u8(vsliq_n_u8(low, code, 4), vdupq_n_u8(128));
    }
    if constexpr (F::R == 1) code = vorrq_u8(code, vandq_u8(shifted(vld1q_u8(residual), 4 - q), vdupq_n_u8(16)));
    if constexpr (F::R == 2)
      code = vorrq_u8(code, vandq_u8(shifted(vld1q_u8(residual + kVector * (q / 4)), 4 - 2 * (q % 4)), vdupq_n_u8(48)));
    return vreinterpretq_s8_u8(code);
  }
};

// The same from an unpacked chunk: a plane vector for each quad.
template <class F>
struct ChunkCodes {
  const uint8_t* block;
  GEMKIT_MEMBER int8x16_t quad(int g, int q) const {
    return vreinterpretq_s8_u8(vld1q_u8(block + kVector * q + kQuarterVector * g));
  }
  template <int Q>
  GEMKIT_MEMBER int8x16_t quad(int g) const {
    return quad(g, Q);
  }
};

// What a sum over sub-block `sub` starts from, so that it ends as the float 1.5·2^23 + sum of (code − offset) · q.
template <class F>
GEMKIT_INLINE int32_t start_of_sum(const ActivationBlock& a, int sub) {
  if constexpr (F::kOffsetLog2 < 0 || F::R == 4) return kMagicBits;
  return kMagicBits - activation_sum<F>(a, sub) * F::kInfo.offset();
}

// Adds quad Q, whose activations are lane Q % 4 of x[m].
template <int Q, int M, class Codes>
GEMKIT_INLINE void add_quad(const Codes& source, const int8x16_t (&x)[M], int32x4_t (&sums)[M][kQuarters]) {
#pragma GCC unroll 4
  for (int g = 0; g < kQuarters; g++) {
    const int8x16_t codes = source.template quad<Q>(g);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
      sums[m][g] = vdotq_laneq_s32(sums[m][g], codes, x[m], Q % 4);
      GEMKIT_PIN(sums[m][g]);
    }
  }
}

// Adds the half of a block that begins with quad Q0.
template <int Q0, int M, class Codes>
GEMKIT_INLINE void add_half(const Codes& source, const ActivationBlock* const* a, int32x4_t (&sums)[M][kQuarters]) {
  int8x16_t x[M];
#pragma GCC unroll 4
  for (int m = 0; m < M; m++) x[m] = vld1q_s8(a[m]->q + kQuad * Q0);
  add_quad<Q0>(source, x, sums);
  add_quad<Q0 + 1>(source, x, sums);
  add_quad<Q0 + 2>(source, x, sums);
  add_quad<Q0 + 3>(source, x, sums);
}

// Biased sums over one sub-block, sums[m][four rows], the spare part of each row's largest value included.
template <class F, int M, int Sub, class Codes>
GEMKIT_INLINE void sub_block_sums(const Codes& source, const ActivationBlock* const* a,
                                  int32x4_t (&sums)[M][kQuarters]) {
#pragma GCC unroll 4
  for (int m = 0; m < M; m++) {
    const int32x4_t start = vdupq_n_s32(start_of_sum<F>(*a[m], Sub));
#pragma GCC unroll 4
    for (int g = 0; g < kQuarters; g++) sums[m][g] = start;
  }
  if constexpr (F::kSub == 1 || Sub == 0) add_half<0>(source, a, sums);
  if constexpr (F::kSub == 1 || Sub == 1) add_half<4>(source, a, sums);
#pragma GCC unroll 4
  for (int m = 0; m < M; m++) {
    const int quad = a[m]->quad;
    int32_t spare;
    std::memcpy(&spare, a[m]->spare, 4);
    if (F::kSub == 2 && quad / 4 != Sub) spare = 0;
    const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(spare));
#pragma GCC unroll 4
    for (int g = 0; g < kQuarters; g++) {
      sums[m][g] = vdotq_s32(sums[m][g], source.quad(g, quad), x);
      GEMKIT_PIN(sums[m][g]);
    }
  }
}

GEMKIT_INLINE f32x16 as_floats(const int32x4_t (&sums)[kQuarters]) {
  return {vreinterpretq_f32_s32(sums[0]), vreinterpretq_f32_s32(sums[1]), vreinterpretq_f32_s32(sums[2]),
          vreinterpretq_f32_s32(sums[3])};
}

// f += dot · scale · scale_x of one sub-block, with the roundings of the contract.
template <class F, int M, int Sub, class Codes>
GEMKIT_INLINE void add_sub_block(f32x16 (&f)[M], const Codes& source, const ActivationBlock* const* a, f32x16 scale) {
  const f32x16 shifted_scale = scale * set1(-kRoundMagic);
  int32x4_t sums[M][kQuarters];
  sub_block_sums<F, M, Sub>(source, a, sums);
#pragma GCC unroll 4
  for (int m = 0; m < M; m++) f[m] = fma(fma(as_floats(sums[m]), scale, shifted_scale), set1(a[m]->scale), f[m]);
}

// One block: scale_of(sub-block) and minimum_of() give the sixteen rows' factors.
template <class F, int M, class Codes, class Scale, class Minimum>
GEMKIT_INLINE void add_block(f32x16 (&f)[M], const Codes& source, const ActivationBlock* const* a, Scale scale_of,
                             Minimum minimum_of) {
  add_sub_block<F, M, 0>(f, source, a, scale_of(0));
  if constexpr (F::kSub == 2) add_sub_block<F, M, 1>(f, source, a, scale_of(1));
  if constexpr (F::kMinimum) {
    const f32x16 minimum = minimum_of();
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) f[m] = fma(minimum, set1(a[m]->scaled_sum), f[m]);
  }
}

template <class F>
static void unpack_codes(const uint8_t* record, const uint8_t*, uint8_t* codes) {
  const RecordCodes<F> source{record};
  for (int q = 0; q < kQuads; q++)
    for (int g = 0; g < kQuarters; g++)
      vst1q_u8(codes + kVector * q + kQuarterVector * g, vreinterpretq_u8_s8(source.quad(g, q)));
}

static int64_t peak_int8(int64_t rounds) {
  constexpr int kChains = 16;
  int32x4_t sum[kChains];
  for (int i = 0; i < kChains; i++) sum[i] = vdupq_n_s32(i);
  const int8x16_t w = vdupq_n_s8(3), x = vdupq_n_s8(5);
  for (int64_t r = 0; r < rounds; r++)
#pragma GCC unroll 16
    for (int i = 0; i < kChains; i++) {
      sum[i] = vdotq_s32(sum[i], w, x);
      GEMKIT_PIN(sum[i]);
    }
  int32x4_t total = sum[0];
  for (int i = 1; i < kChains; i++) total = vaddq_s32(total, sum[i]);
  volatile int32_t sink = vaddvq_s32(total);
  (void)sink;
  return rounds * kChains * 32;
}

}  // namespace gemkit::neon

#include "sixteen_rows.h"

GEMKIT_KERNEL_TABLE(neon)
