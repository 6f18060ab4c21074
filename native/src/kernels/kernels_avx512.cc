// AVX-512 with VNNI: one vpdpbusd multiplies a quad of sixteen rows and sums it exactly in int32.
// With GEMKIT_SIMDE the same source runs on any processor through SIMDe's emulation of the intrinsics, for the tests.
#define GEMKIT_ISA avx512
#define GEMKIT_AVX512 1
#if defined(GEMKIT_SIMDE)  // fewer shapes: emulated code is slow to compile
#define GEMKIT_FUSED_ROWS 2
#define GEMKIT_TILE_ROWS 3
#else
#define GEMKIT_FUSED_ROWS 8
#define GEMKIT_TILE_ROWS 10  // as many chains as the products' latency takes; their pointers fit the registers
#endif
#include "int8_driver.h"

namespace gemkit::avx512 {

constexpr int kAhead = 2048;  // bytes prefetched ahead of the record being read

GEMKIT_INLINE __m512i load512(const uint8_t* p) { return _mm512_loadu_si512(reinterpret_cast<const __m512i*>(p)); }
GEMKIT_INLINE __m512i shifted(__m512i v, int by) {
  return by >= 0 ? _mm512_sll_epi16(v, _mm_cvtsi32_si128(by)) : _mm512_srl_epi16(v, _mm_cvtsi32_si128(-by));
}

// Codes of quad q of sixteen rows, from a packed record.
template <class F>
GEMKIT_INLINE __m512i quad_codes(const uint8_t* record, int q) {
  const __m512i nibble = _mm512_set1_epi8(15);
  const __m512i v = load512(record + kVector * (q / 2));
  const uint8_t* residual = record + kPlane;
  if constexpr (F::R == 4) {
    const __m512i w = load512(residual + kVector * (q / 2));
    return q & 1 ? _mm512_or_si512(_mm512_andnot_si512(nibble, v), _mm512_and_si512(shifted(w, -4), nibble))
                 : _mm512_or_si512(shifted(_mm512_and_si512(v, nibble), 4), _mm512_and_si512(w, nibble));
  }
  __m512i codes = _mm512_and_si512(q & 1 ? shifted(v, -4) : v, nibble);
  if constexpr (F::R == 1)
    codes = _mm512_or_si512(codes, _mm512_and_si512(shifted(load512(residual), 4 - q), _mm512_set1_epi8(16)));
  if constexpr (F::R == 2)
    codes = _mm512_or_si512(
        codes, _mm512_and_si512(shifted(load512(residual + kVector * (q / 4)), 4 - 2 * (q % 4)), _mm512_set1_epi8(48)));
  return codes;
}

template <class F>
struct RecordCodes {
  const uint8_t* record;
  GEMKIT_MEMBER __m512i quad(int q) const { return quad_codes<F>(record, q); }
};
template <class F>
struct ChunkCodes {
  const uint8_t* block;
  GEMKIT_MEMBER __m512i quad(int64_t q) const { return load512(block + kVector * q); }
};

// sum += codes · q, one quad of activations for all sixteen rows.
GEMKIT_INLINE void add_products(__m512i& sum, __m512i codes, const int8_t* q) {
#if defined(__GNUC__) && !defined(GEMKIT_SIMDE)
  // GCC 12 broadcasts by an instruction of its own, and the processor issues few enough as it is
  asm volatile("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*reinterpret_cast<const int8_t (*)[4]>(q)));
#else
  int32_t x;
  std::memcpy(&x, q, sizeof x);
  sum = _mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi32(x));
#endif
}

// f[m] += (the block's product), with the roundings of the contract. Sums begin at the float 1.5·2^23 as bits, less the
// offset's share, so that they need no conversion.
template <class F, int M, class Codes, class Scale, class Minimum>
GEMKIT_INLINE void add_block(f32x16 (&f)[M], const Codes& source, const ActivationBlock* const (&a)[M], Scale scale_of,
                             Minimum minimum_of) {
  const __m512i start = _mm512_set1_epi32(kMagicBits);
#pragma GCC unroll 2
  for (int sub = 0; sub < F::kSub; sub++) {
#if defined(__GNUC__)
    if (F::kSub > 1) asm volatile("" ::: "memory");  // else both halves begin at once and do not fit the registers
#endif
    __m512i sums[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      sums[m] = start;
      if constexpr (F::kOffsetLog2 >= 0)
        sums[m] = _mm512_sub_epi32(start,
                                   _mm512_slli_epi32(_mm512_set1_epi32(activation_sum<F>(*a[m], sub)), F::kOffsetLog2));
    }
    constexpr int kSubQuads = kQuads / F::kSub;
#pragma GCC unroll 8
    for (int q = sub * kSubQuads; q < (sub + 1) * kSubQuads; q++) {
      const __m512i codes = source.quad(q);
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) add_products(sums[m], codes, a[m]->q + kQuad * q);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const int64_t quad = a[m]->quad;
      add_products(sums[m], source.quad(quad), F::kSub == 1 ? a[m]->spare : a[m]->halves[sub]);
    }
    const f32x16 scale = scale_of(sub), shifted_scale = scale * set1(-kRoundMagic);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
      f[m] = fma(fma({_mm512_castsi512_ps(sums[m])}, scale, shifted_scale), set1(a[m]->scale), f[m]);
  }
  if constexpr (F::kMinimum) {
    const f32x16 minimum = minimum_of();
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) f[m] = fma(minimum, set1(a[m]->scaled_sum), f[m]);
  }
}

template <class F>
static void unpack_codes(const uint8_t* record, const uint8_t*, uint8_t* codes) {
  for (int q = 0; q < kQuads; q++)
    _mm512_storeu_si512(reinterpret_cast<__m512i*>(codes + kVector * q), quad_codes<F>(record, q));
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

}  // namespace gemkit::avx512

#include "sixteen_rows.h"

GEMKIT_KERNEL_TABLE(avx512)
