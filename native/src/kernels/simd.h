// Sixteen float lanes, the same on every instruction set: each lane is plain IEEE arithmetic and every reduction has
// one fixed order, so code written over f32x16 gives the same bits on all of them. Included by the translation unit of
// one instruction set, which defines GEMKIT_ISA (the namespace) and one of GEMKIT_AVX512, GEMKIT_AVX2, GEMKIT_NEON or
// none (portable C++).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "half.h"

#if defined(GEMKIT_AVX512) && defined(GEMKIT_SIMDE)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <immintrin.h>
#include <simde/x86/avx512.h>
#elif defined(GEMKIT_AVX512) || defined(GEMKIT_AVX2)
#include <immintrin.h>
#elif defined(GEMKIT_NEON)
#include <arm_neon.h>
#endif

#if defined(_MSC_VER)
#define GEMKIT_INLINE static __forceinline
#define GEMKIT_NOINLINE __declspec(noinline)
#elif defined(__SANITIZE_ADDRESS__)  // called: with checks, inlined code takes the compiler three times as long
#define GEMKIT_INLINE static inline
#define GEMKIT_NOINLINE __attribute__((noinline))
#else
#define GEMKIT_INLINE static inline __attribute__((always_inline))
#define GEMKIT_NOINLINE __attribute__((noinline))
#endif

// Keeps a running sum where it is written: left alone, GCC delays a block's additions and spills every product
// meanwhile.
#if defined(__GNUC__) && \
    (defined(GEMKIT_AVX2) || defined(GEMKIT_NEON) || (defined(GEMKIT_AVX512) && !defined(GEMKIT_SIMDE)))
#if defined(GEMKIT_AVX512)
#define GEMKIT_PIN(sum) asm volatile("" : "+v"(sum))
#elif defined(GEMKIT_NEON)
#define GEMKIT_PIN(sum) asm volatile("" : "+w"(sum))
#else
#define GEMKIT_PIN(sum) asm volatile("" : "+x"(sum))
#endif
#else
#define GEMKIT_PIN(sum) (void)0
#endif

namespace gemkit::GEMKIT_ISA {

#if defined(GEMKIT_AVX512)

struct f32x16 {
  __m512 v;
};
GEMKIT_INLINE f32x16 zero() { return {_mm512_setzero_ps()}; }
GEMKIT_INLINE f32x16 set1(float x) { return {_mm512_set1_ps(x)}; }
GEMKIT_INLINE f32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
GEMKIT_INLINE void store(float* p, f32x16 a) { _mm512_storeu_ps(p, a.v); }
GEMKIT_INLINE f32x16 operator+(f32x16 a, f32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
GEMKIT_INLINE f32x16 operator-(f32x16 a, f32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
GEMKIT_INLINE f32x16 operator*(f32x16 a, f32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
GEMKIT_INLINE f32x16 operator/(f32x16 a, f32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
GEMKIT_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
GEMKIT_INLINE f32x16 max(f32x16 a, f32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
GEMKIT_INLINE f32x16 min(f32x16 a, f32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
GEMKIT_INLINE f32x16 abs(f32x16 a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff)))};
}
// a >= b ? x : y, lane by lane (y where either is NaN)
GEMKIT_INLINE f32x16 select_ge(f32x16 a, f32x16 b, f32x16 x, f32x16 y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ), y.v, x.v)};
}
// a · 2^n; n holds integers as 1.5·2^23 + n
GEMKIT_INLINE f32x16 scale_pow2(f32x16 a, f32x16 n) {
  return {
      _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), _mm512_slli_epi32(_mm512_castps_si512(n.v), 23)))};
}
#if !defined(GEMKIT_SIMDE)  // the emulation lacks these conversions
GEMKIT_INLINE void store_f16(uint16_t* p, f32x16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
GEMKIT_INLINE f32x16 load_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
GEMKIT_INLINE void store_i8(int8_t* p, f32x16 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}
GEMKIT_INLINE f32x16 load_bf16(const uint16_t* p) {
  __m512i w = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(w, 16))};
}
GEMKIT_INLINE f32x16 from_i8(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
GEMKIT_INLINE f32x16 from_u8(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}

#endif
// bit i: lane i of a equals lane i of b
GEMKIT_INLINE uint32_t equal_mask(f32x16 a, f32x16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
GEMKIT_INLINE __m256 lower8(f32x16 a) { return _mm512_castps512_ps256(a.v); }
GEMKIT_INLINE __m256 upper8(f32x16 a) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1)); }

#elif defined(GEMKIT_AVX2)

struct f32x16 {
  __m256 lo, hi;
};
GEMKIT_INLINE f32x16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
GEMKIT_INLINE f32x16 set1(float x) {
  __m256 v = _mm256_set1_ps(x);
  return {v, v};
}
GEMKIT_INLINE f32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
GEMKIT_INLINE void store(float* p, f32x16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
GEMKIT_INLINE f32x16 operator+(f32x16 a, f32x16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
GEMKIT_INLINE f32x16 operator-(f32x16 a, f32x16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
GEMKIT_INLINE f32x16 operator*(f32x16 a, f32x16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
GEMKIT_INLINE f32x16 operator/(f32x16 a, f32x16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
GEMKIT_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
GEMKIT_INLINE f32x16 max(f32x16 a, f32x16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
GEMKIT_INLINE f32x16 min(f32x16 a, f32x16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
GEMKIT_INLINE f32x16 abs(f32x16 a) {
  __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(a.lo, m), _mm256_and_ps(a.hi, m)};
}
GEMKIT_INLINE f32x16 select_ge(f32x16 a, f32x16 b, f32x16 x, f32x16 y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_GE_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_GE_OQ))};
}
GEMKIT_INLINE f32x16 scale_pow2(f32x16 a, f32x16 n) {
  auto part = [](__m256 x, __m256 e) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_castps_si256(e), 23)));
  };
  return {part(a.lo, n.lo), part(a.hi, n.hi)};
}
GEMKIT_INLINE f32x16 load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
GEMKIT_INLINE void store_f16(uint16_t* p, f32x16 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}
GEMKIT_INLINE void store_i8(int8_t* p, f32x16 a) {
  __m256i w = _mm256_packs_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi));
  w = _mm256_permute4x64_epi64(w, 0xD8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packs_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
}
GEMKIT_INLINE f32x16 load_bf16(const uint16_t* p) {
  auto part = [](const uint16_t* q) {
    __m256i w = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
  };
  return {part(p), part(p + 8)};
}
GEMKIT_INLINE f32x16 from_i8(const int8_t* p) {
  __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(b, 8)))};
}
GEMKIT_INLINE f32x16 from_u8(const uint8_t* p) {
  __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(b)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(b, 8)))};
}

GEMKIT_INLINE uint32_t equal_mask(f32x16 a, f32x16 b) {
  const int lo = _mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_EQ_OQ));
  const int hi = _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_EQ_OQ));
  return static_cast<uint32_t>(lo) | static_cast<uint32_t>(hi) << 8;
}
GEMKIT_INLINE __m256 lower8(f32x16 a) { return a.lo; }
GEMKIT_INLINE __m256 upper8(f32x16 a) { return a.hi; }

#elif defined(GEMKIT_NEON)

struct f32x16 {
  float32x4_t q0, q1, q2, q3;
};
GEMKIT_INLINE f32x16 set1(float x) {
  const float32x4_t v = vdupq_n_f32(x);
  return {v, v, v, v};
}
GEMKIT_INLINE f32x16 zero() { return set1(0.0f); }
GEMKIT_INLINE f32x16 load(const float* p) {
  return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)};
}
GEMKIT_INLINE void store(float* p, f32x16 a) {
  vst1q_f32(p, a.q0), vst1q_f32(p + 4, a.q1), vst1q_f32(p + 8, a.q2), vst1q_f32(p + 12, a.q3);
}
// The instructions for the larger and the smaller treat NaN and -0 differently from the other paths
GEMKIT_INLINE float32x4_t larger(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
GEMKIT_INLINE float32x4_t smaller(float32x4_t a, float32x4_t b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
#define GEMKIT_EACH2(name, of)                                               \
  GEMKIT_INLINE f32x16 name(f32x16 a, f32x16 b) {                            \
    return {of(a.q0, b.q0), of(a.q1, b.q1), of(a.q2, b.q2), of(a.q3, b.q3)}; \
  }
GEMKIT_EACH2(operator+, vaddq_f32)
GEMKIT_EACH2(operator-, vsubq_f32)
GEMKIT_EACH2(operator*, vmulq_f32)
GEMKIT_EACH2(operator/, vdivq_f32)
GEMKIT_EACH2(max, larger)
GEMKIT_EACH2(min, smaller)
#undef GEMKIT_EACH2
GEMKIT_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  return {vfmaq_f32(c.q0, a.q0, b.q0), vfmaq_f32(c.q1, a.q1, b.q1), vfmaq_f32(c.q2, a.q2, b.q2),
          vfmaq_f32(c.q3, a.q3, b.q3)};
}
GEMKIT_INLINE f32x16 abs(f32x16 a) { return {vabsq_f32(a.q0), vabsq_f32(a.q1), vabsq_f32(a.q2), vabsq_f32(a.q3)}; }
GEMKIT_INLINE f32x16 select_ge(f32x16 a, f32x16 b, f32x16 x, f32x16 y) {
  return {vbslq_f32(vcgeq_f32(a.q0, b.q0), x.q0, y.q0), vbslq_f32(vcgeq_f32(a.q1, b.q1), x.q1, y.q1),
          vbslq_f32(vcgeq_f32(a.q2, b.q2), x.q2, y.q2), vbslq_f32(vcgeq_f32(a.q3, b.q3), x.q3, y.q3)};
}
GEMKIT_INLINE f32x16 scale_pow2(f32x16 a, f32x16 n) {
  auto part = [](float32x4_t x, float32x4_t e) {
    return vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(x), vshlq_n_u32(vreinterpretq_u32_f32(e), 23)));
  };
  return {part(a.q0, n.q0), part(a.q1, n.q1), part(a.q2, n.q2), part(a.q3, n.q3)};
}
GEMKIT_INLINE f32x16 load_f16(const uint16_t* p) {
  auto part = [](const uint16_t* q) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(q))); };
  return {part(p), part(p + 4), part(p + 8), part(p + 12)};
}
GEMKIT_INLINE void store_f16(uint16_t* p, f32x16 a) {
  auto part = [](uint16_t* q, float32x4_t v) { vst1_u16(q, vreinterpret_u16_f16(vcvt_f16_f32(v))); };
  part(p, a.q0), part(p + 4, a.q1), part(p + 8, a.q2), part(p + 12, a.q3);
}
GEMKIT_INLINE f32x16 load_bf16(const uint16_t* p) {
  auto part = [](const uint16_t* q) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(q), 16)); };
  return {part(p), part(p + 4), part(p + 8), part(p + 12)};
}
GEMKIT_INLINE void store_i8(int8_t* p, f32x16 a) {
  auto part = [](float32x4_t x, float32x4_t y) {
    return vcombine_s16(vmovn_s32(vcvtq_s32_f32(x)), vmovn_s32(vcvtq_s32_f32(y)));
  };
  vst1q_s8(p, vcombine_s8(vmovn_s16(part(a.q0, a.q1)), vmovn_s16(part(a.q2, a.q3))));
}
GEMKIT_INLINE f32x16 from_i16(int16x8_t x, int16x8_t y) {
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(x))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(x))),
          vcvtq_f32_s32(vmovl_s16(vget_low_s16(y))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(y)))};
}
GEMKIT_INLINE f32x16 from_i8(const int8_t* p) { return from_i16(vmovl_s8(vld1_s8(p)), vmovl_s8(vld1_s8(p + 8))); }
GEMKIT_INLINE f32x16 from_u8(const uint8_t* p) {
  return from_i16(vreinterpretq_s16_u16(vmovl_u8(vld1_u8(p))), vreinterpretq_s16_u16(vmovl_u8(vld1_u8(p + 8))));
}
GEMKIT_INLINE uint32_t equal_mask(f32x16 a, f32x16 b) {
  const uint32_t bits[4] = {1, 2, 4, 8};
  const uint32x4_t bit = vld1q_u32(bits);
  auto part = [&](float32x4_t x, float32x4_t y) { return vandq_u32(vceqq_f32(x, y), bit); };
  const uint32x4_t low = vorrq_u32(part(a.q0, b.q0), vshlq_n_u32(part(a.q1, b.q1), 4));
  const uint32x4_t high = vorrq_u32(part(a.q2, b.q2), vshlq_n_u32(part(a.q3, b.q3), 4));
  return vaddvq_u32(vorrq_u32(low, vshlq_n_u32(high, 8)));
}

#else

struct f32x16 {
  float v[16];
};
#define GEMKIT_LANES(expression)                      \
  f32x16 r;                                           \
  for (int i = 0; i < 16; i++) r.v[i] = (expression); \
  return r
GEMKIT_INLINE f32x16 set1(float x) { GEMKIT_LANES(x); }
GEMKIT_INLINE f32x16 zero() { return set1(0.0f); }
GEMKIT_INLINE f32x16 load(const float* p) { GEMKIT_LANES(p[i]); }
GEMKIT_INLINE void store(float* p, f32x16 a) { std::memcpy(p, a.v, sizeof a.v); }
GEMKIT_INLINE f32x16 operator+(f32x16 a, f32x16 b) { GEMKIT_LANES(a.v[i] + b.v[i]); }
GEMKIT_INLINE f32x16 operator-(f32x16 a, f32x16 b) { GEMKIT_LANES(a.v[i] - b.v[i]); }
GEMKIT_INLINE f32x16 operator*(f32x16 a, f32x16 b) { GEMKIT_LANES(a.v[i] * b.v[i]); }
GEMKIT_INLINE f32x16 operator/(f32x16 a, f32x16 b) { GEMKIT_LANES(a.v[i] / b.v[i]); }
GEMKIT_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { GEMKIT_LANES(fused(a.v[i], b.v[i], c.v[i])); }
GEMKIT_INLINE f32x16 max(f32x16 a, f32x16 b) { GEMKIT_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
GEMKIT_INLINE f32x16 min(f32x16 a, f32x16 b) { GEMKIT_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
GEMKIT_INLINE f32x16 abs(f32x16 a) { GEMKIT_LANES(std::fabs(a.v[i])); }
GEMKIT_INLINE f32x16 select_ge(f32x16 a, f32x16 b, f32x16 x, f32x16 y) {
  GEMKIT_LANES(a.v[i] >= b.v[i] ? x.v[i] : y.v[i]);
}
GEMKIT_INLINE f32x16 scale_pow2(f32x16 a, f32x16 n) {
  f32x16 r;
  for (int i = 0; i < 16; i++) {
    uint32_t x, e;
    std::memcpy(&x, &a.v[i], 4);
    std::memcpy(&e, &n.v[i], 4);
    x += e << 23;
    std::memcpy(&r.v[i], &x, 4);
  }
  return r;
}
#undef GEMKIT_LANES

#endif

#if !defined(GEMKIT_AVX2) && !defined(GEMKIT_NEON) && (defined(GEMKIT_SIMDE) || !defined(GEMKIT_AVX512))
template <class T, class F>
GEMKIT_INLINE f32x16 load_as(const T* p, F convert) {
  f32x16 r;  // filled in place: GCC 12 with ThreadSanitizer miscompiles an array that is then loaded
  for (int i = 0; i < 16; i++) reinterpret_cast<float*>(&r)[i] = convert(p[i]);
  return r;
}
GEMKIT_INLINE f32x16 load_f16(const uint16_t* p) { return load_as(p, half_to_float); }
GEMKIT_INLINE f32x16 load_bf16(const uint16_t* p) { return load_as(p, bf16_to_float); }
GEMKIT_INLINE f32x16 from_i8(const int8_t* p) {
  return load_as(p, [](int8_t x) { return static_cast<float>(x); });
}
GEMKIT_INLINE f32x16 from_u8(const uint8_t* p) {
  return load_as(p, [](uint8_t x) { return static_cast<float>(x); });
}
GEMKIT_INLINE void store_i8(int8_t* p, f32x16 a) {
  alignas(64) float t[16];
  store(t, a);
  // NaN stores 0, as the vector paths' saturating conversions do after truncation
  for (int i = 0; i < 16; i++) p[i] = t[i] >= -128.0f && t[i] <= 127.0f ? static_cast<int8_t>(t[i]) : int8_t{0};
}
GEMKIT_INLINE void store_f16(uint16_t* p, f32x16 a) {
  alignas(64) float t[16];
  store(t, a);
  for (int i = 0; i < 16; i++) p[i] = float_to_half(t[i]);
}
#endif

// Calls f with n, from 0 to Count − 1, as a constant.
template <int Count, class F>
GEMKIT_INLINE void with_constant(int n, F f) {
  [&]<int... I>(std::integer_sequence<int, I...>) {
    (void)((n == I && (f(std::integral_constant<int, I>()), true)) || ...);
  }(std::make_integer_sequence<int, Count>());
}

GEMKIT_INLINE void prefetch(const uint8_t* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p);
#else
  (void)p;
#endif
}

GEMKIT_INLINE int lowest_bit(uint32_t mask) {
#if defined(__GNUC__)
  return __builtin_ctz(mask);
#else
  int i = 0;
  for (; !(mask & 1); i++) mask >>= 1;
  return i;
#endif
}

// Fixed tree: lane i with i+8, then i+4, i+2, i+1.
#if defined(GEMKIT_AVX512) || defined(GEMKIT_AVX2)
template <class Op8, class Op4, class Op1>
GEMKIT_INLINE float reduce(f32x16 a, Op8 op8, Op4 op4, Op1 op1) {
  const __m256 w = op8(lower8(a), upper8(a));
  __m128 v = op4(_mm256_castps256_ps128(w), _mm256_extractf128_ps(w, 1));
  v = op4(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(op1(v, _mm_shuffle_ps(v, v, 1)));
}
GEMKIT_INLINE float reduce_add(f32x16 a) {
  return reduce(
      a, [](__m256 x, __m256 y) { return _mm256_add_ps(x, y); }, [](__m128 x, __m128 y) { return _mm_add_ps(x, y); },
      [](__m128 x, __m128 y) { return _mm_add_ss(x, y); });
}
GEMKIT_INLINE float reduce_max(f32x16 a) {
  return reduce(
      a, [](__m256 x, __m256 y) { return _mm256_max_ps(x, y); }, [](__m128 x, __m128 y) { return _mm_max_ps(x, y); },
      [](__m128 x, __m128 y) { return _mm_max_ss(x, y); });
}
#elif defined(GEMKIT_NEON)
template <class Op>
GEMKIT_INLINE float reduce(f32x16 a, Op op) {
  float32x4_t v = op(op(a.q0, a.q2), op(a.q1, a.q3));
  v = op(v, vextq_f32(v, v, 2));
  return vgetq_lane_f32(op(v, vextq_f32(v, v, 1)), 0);
}
GEMKIT_INLINE float reduce_add(f32x16 a) {
  return reduce(a, [](float32x4_t x, float32x4_t y) { return vaddq_f32(x, y); });
}
GEMKIT_INLINE float reduce_max(f32x16 a) {
  return reduce(a, [](float32x4_t x, float32x4_t y) { return larger(x, y); });
}
#else
template <class Op>
GEMKIT_INLINE float reduce(f32x16 a, Op op) {
  for (int w = 8; w; w /= 2)
    for (int i = 0; i < w; i++) a.v[i] = op(a.v[i], a.v[i + w]);
  return a.v[0];
}
GEMKIT_INLINE float reduce_add(f32x16 a) {
  return reduce(a, [](float x, float y) { return x + y; });
}
GEMKIT_INLINE float reduce_max(f32x16 a) {
  return reduce(a, [](float x, float y) { return x > y ? x : y; });
}
GEMKIT_INLINE uint32_t equal_mask(f32x16 a, f32x16 b) {
  uint32_t mask = 0;
  for (int i = 0; i < 16; i++) mask |= static_cast<uint32_t>(a.v[i] == b.v[i]) << i;
  return mask;
}
#endif

// The two largest of the 32 values of a and b; equal ones count apart.
struct Largest2 {
  float first, second;
};
#if defined(GEMKIT_AVX512) || defined(GEMKIT_AVX2)
GEMKIT_INLINE Largest2 largest2(f32x16 a, f32x16 b) {
  const f32x16 high = max(a, b), low = min(a, b);
  const __m256 h8 = lower8(high), g8 = upper8(high);
  const __m256 first8 = _mm256_max_ps(h8, g8),
               second8 = _mm256_max_ps(_mm256_min_ps(h8, g8), _mm256_max_ps(lower8(low), upper8(low)));
  __m128 h = _mm256_castps256_ps128(first8), g = _mm256_extractf128_ps(first8, 1);
  __m128 first = _mm_max_ps(h, g);
  __m128 second =
      _mm_max_ps(_mm_min_ps(h, g), _mm_max_ps(_mm256_castps256_ps128(second8), _mm256_extractf128_ps(second8, 1)));
  h = first, g = _mm_movehl_ps(first, first);
  first = _mm_max_ps(h, g), second = _mm_max_ps(_mm_min_ps(h, g), _mm_max_ps(second, _mm_movehl_ps(second, second)));
  h = first, g = _mm_shuffle_ps(first, first, 1);
  first = _mm_max_ss(h, g);
  second = _mm_max_ss(_mm_min_ss(h, g), _mm_max_ss(second, _mm_shuffle_ps(second, second, 1)));
  return {_mm_cvtss_f32(first), _mm_cvtss_f32(second)};
}
#else
GEMKIT_INLINE Largest2 largest2(f32x16 a, f32x16 b) {
  auto larger_of = [](float x, float y) { return x > y ? x : y; };
  auto smaller_of = [](float x, float y) { return x < y ? x : y; };
  float first[16], second[16];
  store(first, max(a, b)), store(second, min(a, b));
  for (int w = 8; w; w /= 2)
    for (int i = 0; i < w; i++) {
      second[i] = larger_of(smaller_of(first[i], first[i + w]), larger_of(second[i], second[i + w]));
      first[i] = larger_of(first[i], first[i + w]);
    }
  return {first[0], second[0]};
}
#endif

constexpr float kRoundMagic =
    12582912.0f;  // 1.5·2^23: adding it rounds to the nearest integer, ties to even, for |x| < 2^22

// Within 2 units in the last place; 0 below -87.33, where float32 leaves its normal range.
GEMKIT_INLINE f32x16 exp(f32x16 x) {
  const f32x16 magic = set1(kRoundMagic), lowest = set1(-87.33654f);
  f32x16 y = min(max(x, lowest), set1(88.37626f));
  f32x16 shifted = fma(y, set1(1.44269504f), magic);
  f32x16 n = shifted - magic;
  f32x16 r = fma(n, set1(-0.693359375f), y);
  r = fma(n, set1(2.12194440e-4f), r);
  f32x16 p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, r * r, r + set1(1.0f));
  return select_ge(x, lowest, scale_pow2(p, shifted), zero());
}

GEMKIT_INLINE f32x16 tanh(f32x16 x) {
  // 1 - 2/(1 + e^2x) loses everything near 0, where x - x³/3 + … is used instead
  f32x16 big = set1(1.0f) - set1(2.0f) / (set1(1.0f) + exp(x + x));
  f32x16 s = x * x;
  f32x16 p = fma(s, set1(-0.05396825397f), set1(0.1333333333f));
  p = fma(p, s, set1(-0.3333333333f));
  f32x16 small = fma(p * s, x, x);
  return select_ge(abs(x), set1(0.15f), big, small);
}

}  // namespace gemkit::GEMKIT_ISA
