// AVX2 + FMA + F16C. Codes stay below 2^6 (or are split into two nibbles), so the products of vpmaddubsw can be summed in
// int16 without saturating: at most 8 quads of 4-bit codes, 4 of 5-bit, 2 of 6-bit.
#define GEMKIT_ISA avx2
#define GEMKIT_AVX2 1
#define GEMKIT_FUSED_ROWS 4
#define GEMKIT_TILE_ROWS 4
#include "int8_driver.h"

namespace gemkit::avx2 {

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

  GEMKIT_INLINE __m256i shifted(__m256i v, int by) { return by >= 0 ? _mm256_slli_epi16(v, by) : _mm256_srli_epi16(v, -by); }

  inline __attribute__((always_inline)) void quads(int j, __m256i (&codes)[2], __m256i (&low)[2]) const {
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i v = load256(record + 64 * j + 32 * half);
    codes[0] = _mm256_and_si256(v, nibble);
    codes[1] = _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble);
    if constexpr (F::R == 1) {
      const __m256i r = load256(record + 256 + 32 * half), bit = _mm256_set1_epi8(16);
      codes[0] = _mm256_or_si256(codes[0], _mm256_and_si256(shifted(r, 4 - 2 * j), bit));
      codes[1] = _mm256_or_si256(codes[1], _mm256_and_si256(shifted(r, 3 - 2 * j), bit));
    }
    if constexpr (F::R == 2) {
      const __m256i r = load256(record + 256 + 64 * (j / 2) + 32 * half), bits = _mm256_set1_epi8(48);
      codes[0] = _mm256_or_si256(codes[0], _mm256_and_si256(shifted(r, 4 - 4 * (j % 2)), bits));
      codes[1] = _mm256_or_si256(codes[1], _mm256_and_si256(shifted(r, 2 - 4 * (j % 2)), bits));
    }
    if constexpr (F::R == 4) {
      const __m256i r = load256(record + 256 + 64 * j + 32 * half);
      low[0] = _mm256_and_si256(r, nibble);
      low[1] = _mm256_and_si256(_mm256_srli_epi16(r, 4), nibble);
    }
  }
};

// Codes of any one quad of eight rows, `quad` not known in advance.
template <class F>
GEMKIT_INLINE void one_quad(const RecordCodes<F>& source, int quad, __m256i& codes, __m256i& low) {
  const uint8_t *record = source.record, *residual = record + 256 + 32 * source.half;
  const __m256i nibble = _mm256_set1_epi8(15);
  const __m128i by = _mm_cvtsi32_si128(4 * (quad & 1));
  codes = _mm256_and_si256(_mm256_srl_epi16(load256(record + 64 * (quad / 2) + 32 * source.half), by), nibble);
  if constexpr (F::R == 1) {
    const __m256i bit = _mm256_and_si256(_mm256_srl_epi16(load256(residual), _mm_cvtsi32_si128(quad)), _mm256_set1_epi8(1));
    codes = _mm256_or_si256(codes, _mm256_slli_epi16(bit, 4));
  }
  if constexpr (F::R == 2) {
    const __m256i r = _mm256_srl_epi16(load256(residual + 64 * (quad / 4)), _mm_cvtsi32_si128(2 * (quad % 4)));
    codes = _mm256_or_si256(codes, _mm256_slli_epi16(_mm256_and_si256(r, _mm256_set1_epi8(3)), 4));
  }
  if constexpr (F::R == 4) low = _mm256_and_si256(_mm256_srl_epi16(load256(residual + 64 * (quad / 2)), by), nibble);
}

// The same from an unpacked chunk: 64 bytes a quad (R = 4: 64 of high, then 64 of low nibbles).
template <class F>
struct ChunkCodes {
  const uint8_t* block;
  int half;
  inline __attribute__((always_inline)) void quads(int j, __m256i (&codes)[2], __m256i (&low)[2]) const {
    for (int i = 0; i < 2; i++) {
      const int q = 2 * j + i;
      const uint8_t* p = block + (F::R == 4 ? 128 : 64) * q + 32 * half;
      codes[i] = _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
      if constexpr (F::R == 4) low[i] = _mm256_load_si256(reinterpret_cast<const __m256i*>(p + 64));
    }
  }
};

template <class F>
GEMKIT_INLINE void one_quad(const ChunkCodes<F>& source, int quad, __m256i& codes, __m256i& low) {
  const uint8_t* p = source.block + (F::R == 4 ? 128 : 64) * quad + 32 * source.half;
  codes = load256(p);
  if constexpr (F::R == 4) low = load256(p + 64);
}

// Exact int32 sums over a block of code · q, eight rows by M activation rows; sums[sub-block][m].
template <class F, int M, class Codes>
GEMKIT_INLINE void block_sums(const Codes& source, const ActivationBlock* const* a, __m256i (&sums)[F::kSub][M]) {
  const __m256i ones = _mm256_set1_epi16(1), sixteens = _mm256_set1_epi16(16);
  constexpr int kPerFlush = F::R == 1 ? 2 : F::R == 2 ? 1 : 4;  // pairs of quads that int16 can hold
  __m256i part[M], part_low[M];
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    __m256i codes[2], low[2];
    source.quads(j, codes, low);
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      const bool fresh = j % kPerFlush == 0 && i == 0;
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        const __m256i x = broadcast4(a[m]->q + 8 * j + 4 * i);
        const __m256i s = _mm256_maddubs_epi16(codes[i], x);
        part[m] = fresh ? s : _mm256_add_epi16(part[m], s);
        if constexpr (F::R == 4) {
          const __m256i t = _mm256_maddubs_epi16(low[i], x);
          part_low[m] = fresh ? t : _mm256_add_epi16(part_low[m], t);
        }
      }
    }
    if (j % kPerFlush == kPerFlush - 1) {
      const int sub = F::kSub == 2 ? j / 2 : 0;
      const bool fresh = F::kSub == 2 ? j % 2 == 0 : j < kPerFlush;
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        __m256i s = _mm256_madd_epi16(part[m], F::R == 4 ? sixteens : ones);
        if constexpr (F::R == 4) s = _mm256_add_epi32(s, _mm256_madd_epi16(part_low[m], ones));
        sums[sub][m] = fresh ? s : _mm256_add_epi32(sums[sub][m], s);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
    __m256i codes, low;
    one_quad<F>(source, a[m]->quad, codes, low);
    const __m256i x = broadcast4(a[m]->spare);
    __m256i s = _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), F::R == 4 ? sixteens : ones);
    if constexpr (F::R == 4) s = _mm256_add_epi32(s, _mm256_madd_epi16(_mm256_maddubs_epi16(low, x), ones));
    if constexpr (F::kSub == 2) {
      const __m256i later = _mm256_set1_epi32(a[m]->quad < 4 ? 0 : -1);
      sums[0][m] = _mm256_add_epi32(sums[0][m], _mm256_andnot_si256(later, s));
      sums[1][m] = _mm256_add_epi32(sums[1][m], _mm256_and_si256(later, s));
    } else {
      sums[0][m] = _mm256_add_epi32(sums[0][m], s);
    }
  }
}

// f += (sum − offset · sum q) · scale · scale_x, with the roundings of the contract.
template <class F>
GEMKIT_INLINE __m256 fold(__m256 f, __m256i sum, int32_t activation_sum, __m256 scale, __m256 shifted_scale, float scale_x) {
  __m256i start = _mm256_set1_epi32(kMagicBits);
  if constexpr (F::kOffsetLog2 >= 0) start = _mm256_set1_epi32(kMagicBits - (activation_sum << F::kOffsetLog2));
  const __m256 biased = _mm256_castsi256_ps(_mm256_add_epi32(sum, start));
  return _mm256_fmadd_ps(_mm256_fmadd_ps(biased, scale, shifted_scale), _mm256_set1_ps(scale_x), f);
}

GEMKIT_INLINE __m256 half8(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
GEMKIT_INLINE __m256 bytes8(const uint8_t* p, bool is_signed) {
  const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(is_signed ? _mm256_cvtepi8_epi32(b) : _mm256_cvtepu8_epi32(b));
}

// Scales of sub-block h and the minimum for eight rows of a record; `super` precedes the record's group of eight.
template <class F>
GEMKIT_INLINE __m256 record_scale(const uint8_t* record, const uint8_t* super, int h, int half) {
  if constexpr (!F::kQuant) return half8(record + F::kScales + 16 * half);
  return _mm256_mul_ps(half8(super + 16 * half), bytes8(record + F::kScales + 16 * h + 8 * half, !F::kMinimum));
}
template <class F>
GEMKIT_INLINE __m256 record_minimum(const uint8_t* record, const uint8_t* super, int half) {
  if constexpr (!F::kQuant) return half8(record + F::kScales + 32 + 16 * half);
  const __m256 m = _mm256_mul_ps(half8(super + 32 + 16 * half), bytes8(record + F::kScales + 16 + 8 * half, false));
  return _mm256_xor_ps(m, _mm256_set1_ps(-0.0f));
}

template <class F>
GEMKIT_INLINE int32_t activation_sum(const ActivationBlock& a, int sub) {
  if constexpr (F::kSub == 1) return a.sum;
  return sub == 0 ? a.first_sum : a.sum - a.first_sum;
}

template <class F, int M>
static void fused_panel(const Product& product, int64_t m, int64_t p) {
  constexpr int kAhead = 2048;  // bytes prefetched ahead of the record being read
  const Packed& w = *product.w;
  const ActivationBlock* a[M];
  for (int i = 0; i < M; i++) a[i] = product.a->blocks + (m + i) * product.a->per_row;
  __m256 f[2][M];
  for (int i = 0; i < M; i++) f[0][i] = f[1][i] = _mm256_setzero_ps();
  const __m256 magic = _mm256_set1_ps(-kRoundMagic);
  const uint8_t *record = w.panel(p), *super = record;
  for (int64_t b = 0; b < w.blocks(); b++) {
    if (F::kQuant && b % 8 == 0) super = record, record += F::kSuperBytes;
    for (int line = 0; line < F::kRecord; line += 64) _mm_prefetch(reinterpret_cast<const char*>(record + kAhead + line), _MM_HINT_T0);
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      __m256i sums[F::kSub][M];
      block_sums<F, M>(RecordCodes<F>{record, half}, a, sums);
#pragma GCC unroll 2
      for (int h = 0; h < F::kSub; h++) {
        const __m256 scale = record_scale<F>(record, super, h, half), shifted = _mm256_mul_ps(scale, magic);
#pragma GCC unroll 8
        for (int i = 0; i < M; i++)
          f[half][i] = fold<F>(f[half][i], sums[h][i], activation_sum<F>(*a[i], h), scale, shifted, a[i]->scale);
      }
      if constexpr (F::kMinimum) {
        const __m256 minimum = record_minimum<F>(record, super, half);
        for (int i = 0; i < M; i++) f[half][i] = _mm256_fmadd_ps(minimum, _mm256_set1_ps(a[i]->scaled_sum), f[half][i]);
      }
    }
    record += F::kRecord;
    for (int i = 0; i < M; i++) a[i]++;
  }
  for (int i = 0; i < M; i++)
    for (int half = 0; half < 2; half++)
      _mm256_storeu_ps(product.y + (m + i) * product.ldy + p * kPanelRows + 8 * half, f[half][i]);
}

template <class F>
static void unpack_chunk(const Packed& w, int64_t p, int64_t b0, int count, Chunk& chunk) {
  for (int b = 0; b < count; b++) {
    const uint8_t* record = w.record(p, b0 + b);
    const uint8_t* super = F::kQuant ? w.record(p, (b0 + b) / 8 * 8) - F::kSuperBytes : nullptr;
    for (int half = 0; half < 2; half++) {
      const RecordCodes<F> source{record, half};
      for (int j = 0; j < 4; j++) {
        __m256i codes[2], low[2];
        source.quads(j, codes, low);
        for (int i = 0; i < 2; i++) {
          uint8_t* to = chunk.codes + (F::R == 4 ? 1024 : 512) * b + (F::R == 4 ? 128 : 64) * (2 * j + i) + 32 * half;
          _mm256_store_si256(reinterpret_cast<__m256i*>(to), codes[i]);
          if constexpr (F::R == 4) _mm256_store_si256(reinterpret_cast<__m256i*>(to + 64), low[i]);
        }
      }
      for (int h = 0; h < F::kSub; h++)
        _mm256_store_ps(chunk.scale[b * F::kSub + h] + 8 * half, record_scale<F>(record, super, h, half));
      if constexpr (F::kMinimum) _mm256_store_ps(chunk.minimum[b] + 8 * half, record_minimum<F>(record, super, half));
    }
  }
}

template <class F, int M>
static void tile(const Chunk& chunk, int count, const ActivationBlock* const* rows, float* const* y, bool first) {
  const __m256 magic = _mm256_set1_ps(-kRoundMagic);
  for (int half = 0; half < 2; half++) {
    const ActivationBlock* a[M];
    __m256 f[M];
    for (int i = 0; i < M; i++) a[i] = rows[i], f[i] = first ? _mm256_setzero_ps() : _mm256_loadu_ps(y[i] + 8 * half);
    for (int b = 0; b < count; b++) {
      __m256i sums[F::kSub][M];
      block_sums<F, M>(ChunkCodes<F>{chunk.codes + (F::R == 4 ? 1024 : 512) * b, half}, a, sums);
#pragma GCC unroll 2
      for (int h = 0; h < F::kSub; h++) {
        const __m256 scale = _mm256_load_ps(chunk.scale[b * F::kSub + h] + 8 * half), shifted = _mm256_mul_ps(scale, magic);
#pragma GCC unroll 8
        for (int i = 0; i < M; i++) f[i] = fold<F>(f[i], sums[h][i], activation_sum<F>(*a[i], h), scale, shifted, a[i]->scale);
      }
      if constexpr (F::kMinimum) {
        const __m256 minimum = _mm256_load_ps(chunk.minimum[b] + 8 * half);
        for (int i = 0; i < M; i++) f[i] = _mm256_fmadd_ps(minimum, _mm256_set1_ps(a[i]->scaled_sum), f[i]);
      }
      for (int i = 0; i < M; i++) a[i]++;
    }
    for (int i = 0; i < M; i++) _mm256_storeu_ps(y[i] + 8 * half, f[i]);
  }
}

static int64_t peak_int8(int64_t rounds) {
  constexpr int kChains = 8;
  __m256i sum[kChains];
  for (int i = 0; i < kChains; i++) sum[i] = _mm256_set1_epi8(static_cast<char>(i));
  const __m256i w = _mm256_set1_epi8(3), x = _mm256_set1_epi8(5);
  for (int64_t r = 0; r < rounds; r++)
#pragma GCC unroll 8
    for (int i = 0; i < kChains; i++) {
      __m256i product;
      asm volatile("vpmaddubsw %2, %1, %0" : "=x"(product) : "x"(w), "x"(x));
      asm volatile("vpaddw %1, %0, %0" : "+x"(sum[i]) : "x"(product));
    }
  return rounds * kChains * 64;
}

GEMKIT_KERNEL_TABLE("avx2")

}  // namespace gemkit::avx2

namespace gemkit {
const Kernels* avx2_kernels() { return &avx2::kTable; }
}  // namespace gemkit
