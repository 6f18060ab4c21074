// Scalars: conversions between float32 and the two 16-bit formats, and the fused multiply-add.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace gemkit {

static inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

static inline float half_to_float(uint16_t h) {
  uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000 | (mantissa << 13) | (mantissa ? 0x400000 : 0));
  if (exponent) return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
  if (!mantissa) return bits_to_float(sign);
  int shift = 0;
  for (; !(mantissa & 1024); shift++) mantissa <<= 1;
  return bits_to_float(sign | (static_cast<uint32_t>(113 - shift) << 23) | ((mantissa & 1023) << 13));
}

// Nearest, ties to even.
static inline uint16_t float_to_half(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  const uint32_t sign = u >> 16 & 0x8000;
  u &= 0x7fffffff;
  if (u > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (u >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (u < 0x33000001) return static_cast<uint16_t>(sign);  // half of the smallest subnormal, or less
  uint32_t kept, rest, shift;
  if (u < 0x38800000) {  // subnormal in float16
    const uint32_t mantissa = (u & 0x7fffff) | 0x800000;
    shift = 126 - (u >> 23);
    kept = mantissa >> shift, rest = mantissa & ((1u << shift) - 1);
  } else {
    shift = 13;
    kept = (u - 0x38000000) >> 13, rest = u & 0x1fff;
  }
  const uint32_t half = 1u << (shift - 1);
  if (rest > half || (rest == half && (kept & 1))) kept++;
  return static_cast<uint16_t>(sign | kept);
}

static inline float bf16_to_float(uint16_t b) { return bits_to_float(static_cast<uint32_t>(b) << 16); }

// a · b + c, rounded once.
static inline float fused(float a, float b, float c) {
#if defined(__MINGW32__) && !defined(__FMA__)                            // whose std::fma rounds twice
  const double product = static_cast<double>(a) * b, sum = product + c;  // the product is exact
  // What the sum lost, by which its last bit is made odd: the second rounding then cannot be misled by a tie
  const double from_c = sum - product, lost = (product - (sum - from_c)) + (c - from_c);
  uint64_t bits;
  std::memcpy(&bits, &sum, 8);
  if ((lost > 0 || lost < 0) && !(bits & 1)) bits += (lost > 0) == (sum > 0) ? 1 : ~uint64_t{0};
  double odd;
  std::memcpy(&odd, &bits, 8);
  return static_cast<float>(odd);
#else
  return std::fma(a, b, c);
#endif
}

}  // namespace gemkit
