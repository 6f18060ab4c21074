// The float inner loops, written once over f32x16. Included by each instruction set's translation unit after simd.h.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace gemkit::GEMKIT_ISA {

// acc[u][m] = fma(w_u[k], x[m][k], acc[u][m]) for k in [0, n); load(u, k) gives sixteen lanes.
template <int U, int M, class Load>
GEMKIT_INLINE void accumulate(f32x16 (&acc)[U][M], int64_t n, Load load_lanes, const float* const* x) {
  for (int64_t k = 0; k < n; k++) {
    f32x16 w[U];
#pragma GCC unroll 4
    for (int u = 0; u < U; u++) w[u] = load_lanes(u, k);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const f32x16 v = set1(x[m][k]);
#pragma GCC unroll 4
      for (int u = 0; u < U; u++) acc[u][m] = fma(w[u], v, acc[u][m]);
    }
  }
}

GEMKIT_INLINE f32x16 load_element(const float* p) { return load(p); }
GEMKIT_INLINE f32x16 load_element(const uint16_t* p) { return load_f16(p); }

// Rows [m, m + M) of panel p.
template <int M, class Element, class Load>
static void float_panel(const Product& product, int64_t m, int64_t p, Load load_lanes) {
  const Element* w = reinterpret_cast<const Element*>(product.w->panel(p));
  const float* x[M];
  f32x16 acc[1][M];
  for (int i = 0; i < M; i++) x[i] = product.x + (m + i) * product.ldx, acc[0][i] = zero();
  accumulate<1, M>(acc, product.w->cols, [&](int, int64_t k) { return load_lanes(w + k * kPanelRows); }, x);
  for (int i = 0; i < M; i++) store(product.y + (m + i) * product.ldy + p * kPanelRows, acc[0][i]);
}

template <class Element, class Load>
static void matmul_float(const Product& product, int64_t m0, int64_t m1, int64_t p0, int64_t p1, Load load_lanes) {
  // A panel stays in the cache while all rows pass over it
  for (int64_t p = p0; p < p1; p++) {
    int64_t m = m0;
    for (; m + 6 <= m1; m += 6) float_panel<6, Element>(product, m, p, load_lanes);
    for (; m + 2 <= m1; m += 2) float_panel<2, Element>(product, m, p, load_lanes);
    for (; m < m1; m++) float_panel<1, Element>(product, m, p, load_lanes);
  }
}

// Lanes past the end of a row: the tail is worked through a padded copy, so the order of sums never depends on n % 16
// code paths.
template <class F>
GEMKIT_INLINE void for_lanes(int64_t n, F f) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) f(i, 16);
  if (i < n) f(i, static_cast<int>(n - i));
}
GEMKIT_INLINE f32x16 load_some(const float* p, int count) {
  if (count == 16) return load(p);
  alignas(64) float t[16] = {};
  std::memcpy(t, p, count * sizeof(float));
  return load(t);
}
GEMKIT_INLINE void store_some(float* p, f32x16 a, int count) {
  if (count == 16) return store(p, a);
  alignas(64) float t[16];
  store(t, a);
  std::memcpy(p, t, count * sizeof(float));
}

static void rms_norm(const float* x, const float* weight, float* y, int64_t n, float eps) {
  f32x16 sum = zero();
  for_lanes(n, [&](int64_t i, int count) {
    f32x16 v = load_some(x + i, count);
    sum = fma(v, v, sum);
  });
  const float mean = reduce_add(sum) / static_cast<float>(n);
  const f32x16 inverse = set1(1.0f / std::sqrt(mean + eps));
  for_lanes(n, [&](int64_t i, int count) {
    store_some(y + i, load_some(x + i, count) * inverse * load_some(weight + i, count), count);
  });
}

static void add(float* x, const float* y, int64_t n) {
  for_lanes(n,
            [&](int64_t i, int count) { store_some(x + i, load_some(x + i, count) + load_some(y + i, count), count); });
}

static void scale(float* x, float by, int64_t n) {
  const f32x16 s = set1(by);
  for_lanes(n, [&](int64_t i, int count) { store_some(x + i, load_some(x + i, count) * s, count); });
}

GEMKIT_INLINE f32x16 cap_lanes(f32x16 x, float cap) { return tanh(x / set1(cap)) * set1(cap); }

static void softcap(float* x, float cap, int64_t n) {
  for_lanes(n, [&](int64_t i, int count) { store_some(x + i, cap_lanes(load_some(x + i, count), cap), count); });
}

// tanh form: 0.5·x·(1 + tanh(u)) = x / (1 + exp(−2u)),  u = sqrt(2/π)·(x + 0.044715·x³)
static void gelu_multiply(float* gate, const float* up, int64_t n) {
  for_lanes(n, [&](int64_t i, int count) {
    f32x16 x = load_some(gate + i, count);
    f32x16 u = fma(x * x * x, set1(0.044715f), x) * set1(-2.0f * 0.7978845608028654f);
    store_some(gate + i, x / (set1(1.0f) + exp(u)) * load_some(up + i, count), count);
  });
}

// Pairs (i, i + half), the published "rotate half" layout.
static void rope(float* x, const float* cosine, const float* sine, int64_t half) {
  for_lanes(half, [&](int64_t i, int count) {
    f32x16 a = load_some(x + i, count), b = load_some(x + half + i, count);
    f32x16 c = load_some(cosine + i, count), s = load_some(sine + i, count);
    store_some(x + i, a * c - b * s, count);
    store_some(x + half + i, b * c + a * s, count);
  });
}

// Four bytes, the lowest first.
GEMKIT_INLINE void store_spare(int8_t* to, uint32_t bytes) {
  for (int i = 0; i < 4; i++) to[i] = static_cast<int8_t>(bytes >> 8 * i & 255);
}

static void quantise(const float* x, ActivationBlock* block, int64_t blocks) {
  const f32x16 magic = set1(kRoundMagic);
  auto clamped = [](f32x16 v) { return min(max(v, set1(-127.0f)), set1(127.0f)); };
  for (const ActivationBlock* end = block + blocks; block < end; x += kBlock, block++) {
    const f32x16 v0 = load(x), v1 = load(x + 16), a0 = abs(v0), a1 = abs(v1);
    const auto [largest, second] = largest2(a0, a1);
    const uint32_t at_largest = equal_mask(a0, set1(largest)) | equal_mask(a1, set1(largest)) << 16;
    const int k = at_largest ? lowest_bit(at_largest) : 0;                  // none is equal where the values are NaN
    const float reach = second > 0.5f * largest ? second : 0.5f * largest;  // 127 steps
    const float inverse = reach > 0 ? 127.0f / reach : 0.0f;
    const f32x16 q0 = clamped(fma(v0, set1(inverse), magic) - magic);
    const f32x16 q1 = clamped(fma(v1, set1(inverse), magic) - magic);
    store_i8(block->q, q0), store_i8(block->q + 16, q1);
    // Sums of whole numbers are exact in any order; from the registers, not from the bytes just written
    const float whole = fused(x[k], inverse, kRoundMagic) - kRoundMagic;
    const float kept = whole < -127.0f ? -127.0f : whole > 127.0f ? 127.0f : whole;
    const int rest = whole >= -254.0f && whole <= 254.0f ? static_cast<int>(whole - kept) : 0;
    int32_t first = static_cast<int32_t>(reduce_add(q0)), last = static_cast<int32_t>(reduce_add(q1));
    (k < 16 ? first : last) += rest;
    const uint32_t spare = static_cast<uint32_t>(static_cast<uint8_t>(rest)) << 8 * (k % 4);
    store_spare(block->spare, spare);
    store_spare(block->halves[0], k < 16 ? spare : 0), store_spare(block->halves[1], k < 16 ? 0 : spare);
    block->quad = k / 4;
    block->sum = first + last;
    block->first_sum = first;
    block->scale = reach / 127.0f;
    block->scaled_sum = block->scale * static_cast<float>(block->sum);
  }
}

static Extent largest(const float* x, int64_t n) {
  f32x16 best = set1(-INFINITY);
  for_lanes(n, [&](int64_t i, int count) {
    best = count == 16 ? max(load(x + i), best) : best;
    for (int k = 0; count < 16 && k < count; k++) best = max(set1(x[i + k]), best);
  });
  const float value = reduce_max(best);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    if (const uint32_t mask = equal_mask(load(x + i), set1(value))) return {value, i + lowest_bit(mask)};
  for (; i < n; i++)
    if (x[i] == value) return {value, i};
  return {value, -1};
}

static double sum_exp(const float* x, int64_t n, float shift) {
  const f32x16 s = set1(shift);
  double total = 0;
  f32x16 sum = zero();
  int64_t since = 0;
  for_lanes(n, [&](int64_t i, int count) {
    f32x16 e = exp(load_some(x + i, count) - s);
    if (count < 16) {
      alignas(64) float t[16];
      store(t, e);
      for (int k = count; k < 16; k++) t[k] = 0;
      e = load(t);
    }
    sum = sum + e;
    if (++since == 64) total += reduce_add(sum), sum = zero(), since = 0;
  });
  return total + reduce_add(sum);
}

static uint32_t screen(const ScreenPanel& s) {
  f32x16 sum = zero();
  for (int64_t b = 0; b < s.blocks; b++) {
    const f32x16 norm = from_u8(s.norms + kPanelRows * b);
    sum = fma(s.proven ? norm : norm * norm, set1(s.sizes[b]), sum);
  }
  alignas(64) float sums[kPanelRows];
  store(sums, sum);
  uint32_t mask = 0;
  for (int i = 0; i < kPanelRows; i++) {
    const float bound = s.reach * (s.proven ? sums[i] : std::sqrt(sums[i]));
    mask |= static_cast<uint32_t>(!(s.approx[i] + bound < s.threshold)) << i;
  }
  return mask;
}

static void panel_largest(const float* y, int64_t panels, float* largest) {
  for (int64_t p = 0; p < panels; p++) largest[p] = reduce_max(load(y + kPanelRows * p));
}

static uint64_t read_memory(const uint8_t* p, int64_t bytes) {
  const int64_t quarter = bytes / 4 / 64 * 64;
  f32x16 s[4] = {zero(), zero(), zero(), zero()};
  for (int64_t i = 0; i < quarter; i += 64)
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) s[k] = max(s[k], load(reinterpret_cast<const float*>(p + k * quarter + i)));
  return static_cast<uint64_t>(reduce_max(max(max(s[0], s[1]), max(s[2], s[3]))) != 0.0f);
}

}  // namespace gemkit::GEMKIT_ISA
