// AVX2 + FMA + F16C. Codes stay below 2^6 (or are split into two nibbles), so the products of vpmaddubsw can be summed
// in int16 without saturating: at most 8 quads of 4-bit codes, 4 of 5-bit, 2 of 6-bit.
#define GEMKIT_ISA avx2
#define GEMKIT_AVX2 1
#define GEMKIT_FUSED_ROWS 3
#define GEMKIT_TILE_ROWS 4
#include "int8_driver.h"

namespace gemkit::avx2 {

// A panel is two halves of kHalfRows rows, and so is a plane vector.
constexpr int kHalfRows = kPanelRows / 2, kHalfVector = kVector / 2;

GEMKIT_INLINE __m256i load256(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
GEMKIT_INLINE __m256i broadcast4(const int8_t* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return _mm256_set1_epi32(v);
}

// Codes of quads 2j and 2j+1 of eight rows, from a packed record. For R = 4, `low` holds the low nibbles.
template <class F>
struct RecordCodes {
  const uint8_t* record;
  int half;

  GEMKIT_INLINE __m256i shifted(__m256i v, int by) {
    return by >= 0 ? _mm256_slli_epi16(v, by) : _mm256_srli_epi16(v, -by);
  }

  GEMKIT_MEMBER void quads(int j, __m256i (&codes)[2], __m256i (&low)[2]) const {
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i v = load256(record + kVector * j + kHalfVector * half);
    codes[0] = _mm256_and_si256(v, nibble);
    codes[1] = _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble);
    if constexpr (F::R == 1) {
      const __m256i r = load256(record + kPlane + kHalfVector * half), bit = _mm256_set1_epi8(16);
      codes[0] = _mm256_or_si256(codes[0], _mm256_and_si256(shifted(r, 4 - 2 * j), bit));
      codes[1] = _mm256_or_si256(codes[1], _mm256_and_si256(shifted(r, 3 - 2 * j), bit));
    }
    if constexpr (F::R == 2) {
      const __m256i r = load256(record + kPlane + kVector * (j / 2) + kHalfVector * half), bits = _mm256_set1_epi8(48);
      codes[0] = _mm256_or_si256(codes[0], _mm256_and_si256(shifted(r, 4 - 4 * (j % 2)), bits));
      codes[1] = _mm256_or_si256(codes[1], _mm256_and_si256(shifted(r, 2 - 4 * (j % 2)), bits));
    }
    if constexpr (F::R == 4) {
      const __m256i r = load256(record + kPlane + kVector * j + kHalfVector * half);
      low[0] = _mm256_and_si256(r, nibble);
      low[1] = _mm256_and_si256(_mm256_srli_epi16(r, 4), nibble);
    }
  }
};

// Codes of any one quad of eight rows, `quad` not known in advance.
template <class F>
GEMKIT_INLINE void one_quad(const RecordCodes<F>& source, int quad, __m256i& codes, __m256i& low) {
  const uint8_t *record = source.record, *residual = record + kPlane + kHalfVector * source.half;
  const __m256i nibble = _mm256_set1_epi8(15);
  const __m128i by = _mm_cvtsi32_si128(4 * (quad & 1));
  codes = _mm256_and_si256(_mm256_srl_epi16(load256(record + kVector * (quad / 2) + kHalfVector * source.half), by),
                           nibble);
  if constexpr (F::R == 1) {
    const __m256i bit =
        _mm256_and_si256(_mm256_srl_epi16(load256(residual), _mm_cvtsi32_si128(quad)), _mm256_set1_epi8(1));
    codes = _mm256_or_si256(codes, _mm256_slli_epi16(bit, 4));
  }
  if constexpr (F::R == 2) {
    const __m256i r = _mm256_srl_epi16(load256(residual + kVector * (quad / 4)), _mm_cvtsi32_si128(2 * (quad % 4)));
    codes = _mm256_or_si256(codes, _mm256_slli_epi16(_mm256_and_si256(r, _mm256_set1_epi8(3)), 4));
  }
  if constexpr (F::R == 4)
    low = _mm256_and_si256(_mm256_srl_epi16(load256(residual + kVector * (quad / 2)), by), nibble);
}

// The same from an unpacked chunk, a plane vector for each quad; 8-bit codes are stored less their offset, whole
// (whole_sums).
template <class F>
struct ChunkCodes {
  const uint8_t* block;
  int half;
  GEMKIT_MEMBER __m256i quad(int q) const {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(block + kVector * q + kHalfVector * half));
  }
  GEMKIT_MEMBER void quads(int j, __m256i (&codes)[2], __m256i (&)[2]) const {
    for (int i = 0; i < 2; i++) codes[i] = quad(2 * j + i);
  }
};

template <class F>
GEMKIT_INLINE void one_quad(const ChunkCodes<F>& source, int quad, __m256i& codes, __m256i&) {
  codes = source.quad(quad);
}

// Adds to sums[sub-block][half][m] what the spare part of each row's largest value contributes.
template <class F, int M, int Halves, class Codes>
GEMKIT_INLINE void spare_sums(const Codes (&source)[Halves], const ActivationBlock* const* a,
                              __m256i (&sums)[F::kSub][Halves][M]) {
  const __m256i ones = _mm256_set1_epi16(1), sixteens = _mm256_set1_epi16(16);
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
    const __m256i x = broadcast4(a[m]->spare);
    const int quad = a[m]->quad;
#pragma GCC unroll 4
    for (int h = 0; h < Halves; h++) {
      __m256i codes, low;
      one_quad<F>(source[h], quad, codes, low);
      __m256i s = _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), F::R == 4 ? sixteens : ones);
      if constexpr (F::R == 4) s = _mm256_add_epi32(s, _mm256_madd_epi16(_mm256_maddubs_epi16(low, x), ones));
      if constexpr (F::kSub == 2) {
        const __m256i later = _mm256_set1_epi32(quad < 4 ? 0 : -1);
        sums[0][h][m] = _mm256_add_epi32(sums[0][h][m], _mm256_andnot_si256(later, s));
        sums[1][h][m] = _mm256_add_epi32(sums[1][h][m], _mm256_and_si256(later, s));
      } else {
        sums[0][h][m] = _mm256_add_epi32(sums[0][h][m], s);
      }
    }
  }
}

// Exact int32 sums over a block of code · q, eight rows a half by M activation rows.
template <class F, int M, int Halves, class Codes>
GEMKIT_INLINE void block_sums(const Codes (&source)[Halves], const ActivationBlock* const* a,
                              __m256i (&sums)[F::kSub][Halves][M]) {
  const __m256i ones = _mm256_set1_epi16(1), sixteens = _mm256_set1_epi16(16);
  constexpr int kPerFlush = F::R == 1 ? 2 : F::R == 2 ? 1 : 4;  // pairs of quads that int16 can hold
  __m256i part[Halves][M], part_low[Halves][M];
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    __m256i codes[Halves][2], low[Halves][2];
#pragma GCC unroll 4
    for (int h = 0; h < Halves; h++) source[h].quads(j, codes[h], low[h]);
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      const bool fresh = j % kPerFlush == 0 && i == 0;
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        const __m256i x = broadcast4(a[m]->q + kQuad * (2 * j + i));
#pragma GCC unroll 4
        for (int h = 0; h < Halves; h++) {
          const __m256i s = _mm256_maddubs_epi16(codes[h][i], x);
          part[h][m] = fresh ? s : _mm256_add_epi16(part[h][m], s);
          GEMKIT_PIN(part[h][m]);
          if constexpr (F::R == 4) {
            const __m256i t = _mm256_maddubs_epi16(low[h][i], x);
            part_low[h][m] = fresh ? t : _mm256_add_epi16(part_low[h][m], t);
            GEMKIT_PIN(part_low[h][m]);
          }
        }
      }
    }
    if (j % kPerFlush == kPerFlush - 1) {
      const int sub = F::kSub == 2 ? j / 2 : 0;
      const bool fresh = F::kSub == 2 ? j % 2 == 0 : j < kPerFlush;
#pragma GCC unroll 8
      for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int h = 0; h < Halves; h++) {
          __m256i s = _mm256_madd_epi16(part[h][m], F::R == 4 ? sixteens : ones);
          if constexpr (F::R == 4) s = _mm256_add_epi32(s, _mm256_madd_epi16(part_low[h][m], ones));
          sums[sub][h][m] = fresh ? s : _mm256_add_epi32(sums[sub][h][m], s);
        }
    }
  }
  spare_sums<F, M, Halves>(source, a, sums);
}

// The same for 8-bit codes less their offset: |w| · (q with the sign of w). Two such products just fit into int16
// (2 · 128 · 127), so each is widened at once. That still takes fewer instructions than two nibbles apart.
template <int M, int Halves, class Codes>
GEMKIT_INLINE void whole_sums(const Codes (&source)[Halves], const ActivationBlock* const* a,
                              __m256i (&sums)[1][Halves][M]) {
  const __m256i ones = _mm256_set1_epi16(1);
  auto product = [&](__m256i w, __m256i size, __m256i x) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(size, _mm256_sign_epi8(x, w)), ones);
  };
#pragma GCC unroll 8
  for (int q = 0; q < kQuads; q++) {
    __m256i w[Halves], size[Halves];
#pragma GCC unroll 4
    for (int h = 0; h < Halves; h++) w[h] = source[h].quad(q), size[h] = _mm256_abs_epi8(w[h]);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const __m256i x = broadcast4(a[m]->q + kQuad * q);
#pragma GCC unroll 4
      for (int h = 0; h < Halves; h++) {
        const __m256i s = product(w[h], size[h], x);
        sums[0][h][m] = q == 0 ? s : _mm256_add_epi32(sums[0][h][m], s);
        GEMKIT_PIN(sums[0][h][m]);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
    const __m256i x = broadcast4(a[m]->spare);
    const int quad = a[m]->quad;
#pragma GCC unroll 4
    for (int h = 0; h < Halves; h++) {
      const __m256i w = source[h].quad(quad);
      sums[0][h][m] = _mm256_add_epi32(sums[0][h][m], product(w, _mm256_abs_epi8(w), x));
    }
  }
}

// f += (sum − offset · sum q) · scale · scale_x, with the roundings of the contract; Centred: the codes had no offset
// any more.
template <class F, bool Centred>
GEMKIT_INLINE __m256 fold(__m256 f, __m256i sum, int32_t activation_sum, __m256 scale, __m256 shifted_scale,
                          float scale_x) {
  __m256i start = _mm256_set1_epi32(kMagicBits);
  if constexpr (F::kOffsetLog2 >= 0 && !Centred)
    start = _mm256_set1_epi32(kMagicBits - (activation_sum << F::kOffsetLog2));
  const __m256 biased = _mm256_castsi256_ps(_mm256_add_epi32(sum, start));
  return _mm256_fmadd_ps(_mm256_fmadd_ps(biased, scale, shifted_scale), _mm256_set1_ps(scale_x), f);
}

GEMKIT_INLINE __m256 half8(const uint8_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
GEMKIT_INLINE __m256 bytes8(const uint8_t* p, bool is_signed) {
  const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(is_signed ? _mm256_cvtepi8_epi32(b) : _mm256_cvtepu8_epi32(b));
}

// Scales of sub-block h and the minimum for eight rows of a record; `super` precedes the record's group of eight.
template <class F>
GEMKIT_INLINE __m256 record_scale(const uint8_t* record, const uint8_t* super, int h, int half) {
  if constexpr (!F::kQuant) return half8(record + F::kScales + kPanelHalves / 2 * half);
  return _mm256_mul_ps(half8(super + kPanelHalves / 2 * half),
                       bytes8(record + F::kScales + kPanelRows * h + kHalfRows * half, !F::kMinimum));
}
template <class F>
GEMKIT_INLINE __m256 record_minimum(const uint8_t* record, const uint8_t* super, int half) {
  if constexpr (!F::kQuant) return half8(record + F::kScales + kPanelHalves + kPanelHalves / 2 * half);
  const __m256 m = _mm256_mul_ps(half8(super + kPanelHalves + kPanelHalves / 2 * half),
                                 bytes8(record + F::kScales + kPanelRows + kHalfRows * half, false));
  return _mm256_xor_ps(m, _mm256_set1_ps(-0.0f));
}

// Folds a block's sums into f[half][m], given its scales and minima.
template <class F, int M, int Halves, bool Centred, class Scale, class Minimum>
GEMKIT_INLINE void fold_block(__m256 (&f)[Halves][M], const __m256i (&sums)[F::kSub][Halves][M],
                              const ActivationBlock* const* a, Scale scale_of, Minimum minimum_of) {
  const __m256 magic = _mm256_set1_ps(-kRoundMagic);
#pragma GCC unroll 4
  for (int h = 0; h < Halves; h++) {
#pragma GCC unroll 2
    for (int sub = 0; sub < F::kSub; sub++) {
      const __m256 scale = scale_of(sub, h), shifted = _mm256_mul_ps(scale, magic);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++)
        f[h][m] =
            fold<F, Centred>(f[h][m], sums[sub][h][m], activation_sum<F>(*a[m], sub), scale, shifted, a[m]->scale);
    }
    if constexpr (F::kMinimum) {
      const __m256 minimum = minimum_of(h);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) f[h][m] = _mm256_fmadd_ps(minimum, _mm256_set1_ps(a[m]->scaled_sum), f[h][m]);
    }
  }
}

// Panels p, p + apart, … together: they share the broadcasts of the activations and keep more reads in flight. Far
// apart, so that each is a stream of its own to the prefetchers.
template <class F, int M, int Panels>
GEMKIT_NOINLINE static void fused_panel(const Product& product, int64_t m, int64_t p, int64_t apart) {
  constexpr int kAhead = 1024;  // bytes prefetched ahead of the record being read
  // Halves of panels worked on together, as many as the registers hold
  constexpr int kHalves = F::R == 4 && M > 2 ? 1 : 2;
  const Packed& w = *product.w;
  const int64_t blocks = w.blocks();
  const ActivationBlock* a[M];
  __m256 f[2 * Panels / kHalves][kHalves][M];
  for (int i = 0; i < M; i++) {
    a[i] = product.a->blocks + (m + i) * product.a->per_row;
    for (int h = 0; h < 2 * Panels; h++) f[h / kHalves][h % kHalves][i] = _mm256_setzero_ps();
  }
  const uint8_t *record[Panels], *super[Panels];
  for (int n = 0; n < Panels; n++) record[n] = super[n] = w.panel(p + n * apart);
  for (int64_t b = 0; b < blocks; b++) {
#pragma GCC unroll 2
    for (int n = 0; n < Panels; n++) {
      if (F::kQuant && b % kSuperBlocks == 0) super[n] = record[n], record[n] += F::kSuperBytes;
#pragma GCC unroll 16
      for (int line = 0; line < F::kRecord; line += 64)
        _mm_prefetch(reinterpret_cast<const char*>(record[n] + kAhead + line), _MM_HINT_T0);
    }
#pragma GCC unroll 2
    for (int h0 = 0; h0 < 2 * Panels; h0 += kHalves) {
      RecordCodes<F> source[kHalves];
#pragma GCC unroll 4
      for (int h = 0; h < kHalves; h++) source[h] = {record[(h0 + h) / 2], (h0 + h) % 2};
      __m256i sums[F::kSub][kHalves][M];
      block_sums<F, M, kHalves>(source, a, sums);
      fold_block<F, M, kHalves, false>(
          f[h0 / kHalves], sums, a,
          [&](int sub, int h) { return record_scale<F>(record[(h0 + h) / 2], super[(h0 + h) / 2], sub, (h0 + h) % 2); },
          [&](int h) { return record_minimum<F>(record[(h0 + h) / 2], super[(h0 + h) / 2], (h0 + h) % 2); });
    }
    for (int n = 0; n < Panels; n++) record[n] += F::kRecord;
    for (int i = 0; i < M; i++) a[i]++;
  }
  for (int i = 0; i < M; i++)
    for (int h = 0; h < 2 * Panels; h++)
      _mm256_storeu_ps(product.y + (m + i) * product.ldy + (p + h / 2 * apart) * kPanelRows + kHalfRows * (h % 2),
                       f[h / kHalves][h % kHalves][i]);
}

template <class F, int M>
static void fused_panels(const Product& product, int64_t m, int64_t p0, int64_t p1) {
  int64_t p = p0;
  if constexpr (M == 1) {
    const int64_t half = (p1 - p0) / 2;
    for (; p < p0 + half; p++) fused_panel<F, M, 2>(product, m, p, half);
    p += half;
  }
  for (; p < p1; p++) fused_panel<F, M, 1>(product, m, p, 0);
}

template <class F>
static void unpack_codes(const uint8_t* record, const uint8_t* next, uint8_t* to) {
  // This panel's products take long enough
#pragma GCC unroll 16
  for (int line = 0; line < F::kRecord; line += 64) prefetch(next + line);
  for (int half = 0; half < 2; half++) {
    const RecordCodes<F> source{record, half};
    for (int j = 0; j < kQuads / 2; j++) {
      __m256i codes[2], low[2];
      source.quads(j, codes, low);
      for (int i = 0; i < 2; i++) {
        if constexpr (F::R == 4) {
          const __m256i code = _mm256_or_si256(_mm256_slli_epi16(codes[i], 4), low[i]);
          codes[i] = _mm256_xor_si256(code, _mm256_set1_epi8(-128));  // less 128
        }
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + kVector * (2 * j + i) + kHalfVector * half), codes[i]);
      }
    }
  }
}

template <class F, int M>
GEMKIT_NOINLINE static void tile(const Chunk& chunk, int count, const ActivationBlock* const* rows, float* const* y,
                                 bool first) {
  constexpr int Halves = 2;
  const ActivationBlock* a[M];
  alignas(32) float f[Halves][M][kHalfRows];
  for (int i = 0; i < M; i++) {
    a[i] = rows[i];
    for (int h = 0; h < Halves; h++)
      _mm256_store_ps(f[h][i], first ? _mm256_setzero_ps() : _mm256_loadu_ps(y[i] + kHalfRows * h));
  }
  for (int b = 0; b < count; b++) {
    ChunkCodes<F> source[Halves];
    for (int h = 0; h < Halves; h++) source[h] = {chunk.codes + kUnpacked * b, h};
    __m256i sums[F::kSub][Halves][M];
    if constexpr (F::R == 4)
      whole_sums<M, Halves>(source, a, sums);
    else
      block_sums<F, M, Halves>(source, a, sums);
    __m256 g[Halves][M];
    for (int h = 0; h < Halves; h++)
      for (int i = 0; i < M; i++) g[h][i] = _mm256_load_ps(f[h][i]);
    fold_block<F, M, Halves, F::R == 4>(
        g, sums, a, [&](int sub, int h) { return _mm256_load_ps(chunk.scale[b * F::kSub + sub] + kHalfRows * h); },
        [&](int h) { return _mm256_load_ps(chunk.minimum[b] + kHalfRows * h); });
    for (int h = 0; h < Halves; h++)
      for (int i = 0; i < M; i++) _mm256_store_ps(f[h][i], g[h][i]);
    for (int i = 0; i < M; i++) a[i]++;
  }
  for (int i = 0; i < M; i++)
    for (int h = 0; h < Halves; h++) _mm256_storeu_ps(y[i] + kHalfRows * h, _mm256_load_ps(f[h][i]));
}

static int64_t peak_int8(int64_t rounds) {
  __m256i s0 = _mm256_setzero_si256(), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0, t;
  const __m256i w = _mm256_set1_epi8(3), x = _mm256_set1_epi8(5);
#define GEMKIT_STEP(sum)                                            \
  asm volatile("vpmaddubsw %2, %1, %0" : "=x"(t) : "x"(w), "x"(x)); \
  asm volatile("vpaddw %1, %0, %0" : "+x"(sum) : "x"(t));
  for (int64_t r = 0; r < rounds; r++) {
    GEMKIT_STEP(s0)
    GEMKIT_STEP(s1) GEMKIT_STEP(s2) GEMKIT_STEP(s3) GEMKIT_STEP(s4) GEMKIT_STEP(s5) GEMKIT_STEP(s6) GEMKIT_STEP(s7)
  }
#undef GEMKIT_STEP
  return rounds * 8 * 64;
}

}  // namespace gemkit::avx2

GEMKIT_KERNEL_TABLE(avx2)
