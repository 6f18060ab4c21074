// AVX-512 with VNNI: one vpdpbusd multiplies a quad of sixteen rows and sums it exactly in int32.
// With GEMKIT_SIMDE the same source runs on any processor through SIMDe's emulation of the intrinsics, for the tests.
#define GEMKIT_ISA avx512
#define GEMKIT_AVX512 1
#if defined(GEMKIT_SIMDE)  // fewer shapes: emulated code is slow to compile
#define GEMKIT_FUSED_ROWS 2
#define GEMKIT_TILE_ROWS 3
#else
#define GEMKIT_FUSED_ROWS 8
#define GEMKIT_TILE_ROWS 12
#endif
#include "int8_driver.h"

namespace gemkit::avx512 {

GEMKIT_INLINE __m512i load512(const uint8_t* p) { return _mm512_loadu_si512(reinterpret_cast<const __m512i*>(p)); }
GEMKIT_INLINE __m512i broadcast4(const int8_t* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return _mm512_set1_epi32(v);
}
GEMKIT_INLINE __m512i shifted(__m512i v, int by) {
  return by >= 0 ? _mm512_sll_epi16(v, _mm_cvtsi32_si128(by)) : _mm512_srl_epi16(v, _mm_cvtsi32_si128(-by));
}

// Codes of quad q of sixteen rows, from a packed record.
template <class F>
GEMKIT_INLINE __m512i quad_codes(const uint8_t* record, int q) {
  const __m512i nibble = _mm512_set1_epi8(15);
  const __m512i v = load512(record + 64 * (q / 2));
  const uint8_t* residual = record + 256;
  if constexpr (F::R == 4) {
    const __m512i w = load512(residual + 64 * (q / 2));
    return q & 1 ? _mm512_or_si512(_mm512_andnot_si512(nibble, v), _mm512_and_si512(shifted(w, -4), nibble))
                 : _mm512_or_si512(shifted(_mm512_and_si512(v, nibble), 4), _mm512_and_si512(w, nibble));
  }
  __m512i codes = _mm512_and_si512(q & 1 ? shifted(v, -4) : v, nibble);
  if constexpr (F::R == 1)
    codes = _mm512_or_si512(codes, _mm512_and_si512(shifted(load512(residual), 4 - q), _mm512_set1_epi8(16)));
  if constexpr (F::R == 2)
    codes = _mm512_or_si512(
        codes, _mm512_and_si512(shifted(load512(residual + 64 * (q / 4)), 4 - 2 * (q % 4)), _mm512_set1_epi8(48)));
  return codes;
}

template <class F>
struct RecordCodes {
  const uint8_t* record;
  inline __attribute__((always_inline)) __m512i quad(int q) const { return quad_codes<F>(record, q); }
};
template <class F>
struct ChunkCodes {
  const uint8_t* block;
  inline __attribute__((always_inline)) __m512i quad(int q) const { return load512(block + 64 * q); }
};

template <class F>
GEMKIT_INLINE int32_t start_of_sum(const ActivationBlock& a, int sub) {
  if constexpr (F::kOffsetLog2 < 0) return kMagicBits;
  const int32_t sum = F::kSub == 1 ? a.sum : sub == 0 ? a.first_sum : a.sum - a.first_sum;
  return kMagicBits - sum * (1 << (F::kOffsetLog2 < 0 ? 0 : F::kOffsetLog2));
}

// Biased sums of code · q over a block, sums[sub-block][m], as floats 1.5·2^23 + dot.
template <class F, int M, class Codes>
GEMKIT_INLINE void block_sums(const Codes& source, const ActivationBlock* const* a, __m512i (&sums)[F::kSub][M]) {
  for (int h = 0; h < F::kSub; h++)
    for (int m = 0; m < M; m++) sums[h][m] = _mm512_set1_epi32(start_of_sum<F>(*a[m], h));
#pragma GCC unroll 8
  for (int q = 0; q < 8; q++) {
    const __m512i codes = source.quad(q);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      __m512i& sum = sums[F::kSub == 2 ? q / 4 : 0][m];
      sum = _mm512_dpbusd_epi32(sum, codes, broadcast4(a[m]->q + 4 * q));
      GEMKIT_PIN(sum);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) {
    const int quad = a[m]->quad;
    const __m512i codes = source.quad(quad), x = broadcast4(a[m]->spare);
    if constexpr (F::kSub == 2) {
      const __m512i zero = _mm512_setzero_si512();
      sums[0][m] = _mm512_dpbusd_epi32(sums[0][m], codes, quad < 4 ? x : zero);
      sums[1][m] = _mm512_dpbusd_epi32(sums[1][m], codes, quad < 4 ? zero : x);
    } else {
      sums[0][m] = _mm512_dpbusd_epi32(sums[0][m], codes, x);
    }
  }
}

GEMKIT_INLINE f32x16 fold(f32x16 f, __m512i biased, f32x16 scale, f32x16 shifted_scale, float scale_x) {
  return fma(fma({_mm512_castsi512_ps(biased)}, scale, shifted_scale), set1(scale_x), f);
}

template <class F>
GEMKIT_INLINE f32x16 record_scale(const uint8_t* record, const uint8_t* super, int h) {
  const uint8_t* scales = record + F::kScales;
  if constexpr (!F::kQuant) return load_f16(reinterpret_cast<const uint16_t*>(scales));
  const f32x16 d = load_f16(reinterpret_cast<const uint16_t*>(super));
  if constexpr (F::kMinimum) return d * from_u8(scales);
  return d * from_i8(reinterpret_cast<const int8_t*>(scales + 16 * h));
}
template <class F>
GEMKIT_INLINE f32x16 record_minimum(const uint8_t* record, const uint8_t* super) {
  if constexpr (!F::kQuant) return load_f16(reinterpret_cast<const uint16_t*>(record + F::kScales + 32));
  const f32x16 m = load_f16(reinterpret_cast<const uint16_t*>(super + 32)) * from_u8(record + F::kScales + 16);
  return m * set1(-1.0f);
}

template <class F, int M>
GEMKIT_NOINLINE static void fused_panel(const Product& product, int64_t m, int64_t p) {
  constexpr int kAhead = 2048;
  const Packed& w = *product.w;
  const ActivationBlock* a[M];
  f32x16 f[M];
  for (int i = 0; i < M; i++) a[i] = product.a->blocks + (m + i) * product.a->per_row, f[i] = zero();
  const f32x16 magic = set1(-kRoundMagic);
  const uint8_t *record = w.panel(p), *super = record;
  for (int64_t b = 0; b < w.blocks(); b++) {
    if (F::kQuant && b % 8 == 0) super = record, record += F::kSuperBytes;
    for (int line = 0; line < F::kRecord; line += 64) __builtin_prefetch(record + kAhead + line);
    __m512i sums[F::kSub][M];
    block_sums<F, M>(RecordCodes<F>{record}, a, sums);
    for (int h = 0; h < F::kSub; h++) {
      const f32x16 scale = record_scale<F>(record, super, h), shifted_scale = scale * magic;
      for (int i = 0; i < M; i++) f[i] = fold(f[i], sums[h][i], scale, shifted_scale, a[i]->scale);
    }
    if constexpr (F::kMinimum) {
      const f32x16 minimum = record_minimum<F>(record, super);
      for (int i = 0; i < M; i++) f[i] = fma(minimum, set1(a[i]->scaled_sum), f[i]);
    }
    record += F::kRecord;
    for (int i = 0; i < M; i++) a[i]++;
  }
  for (int i = 0; i < M; i++) store(product.y + (m + i) * product.ldy + p * kPanelRows, f[i]);
}

template <class F, int M>
static void fused_panels(const Product& product, int64_t m, int64_t p0, int64_t p1) {
  for (int64_t p = p0; p < p1; p++) fused_panel<F, M>(product, m, p);
}

template <class F>
static void unpack_chunk(const Packed& w, int64_t p, int64_t b0, int count, Chunk& chunk) {
  for (int b = 0; b < count; b++) {
    const uint8_t* record = w.record(p, b0 + b);
    const uint8_t* super = F::kQuant ? w.record(p, (b0 + b) / 8 * 8) - F::kSuperBytes : nullptr;
    for (int q = 0; q < 8; q++)
      _mm512_storeu_si512(reinterpret_cast<__m512i*>(chunk.codes + 512 * b + 64 * q), quad_codes<F>(record, q));
    for (int h = 0; h < F::kSub; h++) store(chunk.scale[b * F::kSub + h], record_scale<F>(record, super, h));
    if constexpr (F::kMinimum) store(chunk.minimum[b], record_minimum<F>(record, super));
  }
}

template <class F, int M>
GEMKIT_NOINLINE static void tile(const Chunk& chunk, int count, const ActivationBlock* const* rows, float* const* y,
                                 bool first) {
  const f32x16 magic = set1(-kRoundMagic);
  const ActivationBlock* a[M];
  f32x16 f[M];
  for (int i = 0; i < M; i++) a[i] = rows[i], f[i] = first ? zero() : load(y[i]);
  for (int b = 0; b < count; b++) {
    __m512i sums[F::kSub][M];
    block_sums<F, M>(ChunkCodes<F>{chunk.codes + 512 * b}, a, sums);
    for (int h = 0; h < F::kSub; h++) {
      const f32x16 scale = load(chunk.scale[b * F::kSub + h]), shifted_scale = scale * magic;
      for (int i = 0; i < M; i++) f[i] = fold(f[i], sums[h][i], scale, shifted_scale, a[i]->scale);
    }
    if constexpr (F::kMinimum) {
      const f32x16 minimum = load(chunk.minimum[b]);
      for (int i = 0; i < M; i++) f[i] = fma(minimum, set1(a[i]->scaled_sum), f[i]);
    }
    for (int i = 0; i < M; i++) a[i]++;
  }
  for (int i = 0; i < M; i++) store(y[i], f[i]);
}

static int64_t peak_int8(int64_t rounds) {
  constexpr int kChains = 12;
  __m512i sum[kChains];
  for (int i = 0; i < kChains; i++) sum[i] = _mm512_set1_epi32(i);
  const __m512i w = _mm512_set1_epi8(3), x = _mm512_set1_epi8(5);
  for (int64_t r = 0; r < rounds; r++)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; i++) {
#if defined(GEMKIT_SIMDE)
      sum[i] = _mm512_dpbusd_epi32(sum[i], w, x);
#else
      asm volatile("vpdpbusd %2, %1, %0" : "+v"(sum[i]) : "v"(w), "v"(x));
#endif
    }
  __m512i total = sum[0];
  for (int i = 1; i < kChains; i++) total = _mm512_add_epi32(total, sum[i]);
  alignas(64) volatile int32_t sink[16];
  _mm512_storeu_si512(const_cast<int32_t*>(sink), total);
  return rounds * kChains * 128;
}

GEMKIT_KERNEL_TABLE("avx512")

}  // namespace gemkit::avx512

namespace gemkit {
const Kernels* avx512_kernels() { return &avx512::kTable; }
}  // namespace gemkit
