// Attention over pages, written once over f32x16. Every query's scores, maximum, weights and sums are formed in the
// order of absolute positions, so the result does not depend on which queries share a call, nor on where the visible
// span begins: positions outside a query's view weigh exactly zero.
#pragma once
#include "float_kernels.h"

namespace gemkit::GEMKIT_ISA {

template <class Element>
GEMKIT_INLINE f32x16 load_cache(const Element* p) {
  if constexpr (sizeof(Element) == 2)
    return load_f16(reinterpret_cast<const uint16_t*>(p));
  else
    return load(reinterpret_cast<const float*>(p));
}

// With few queries, several groups of lanes go together: each sum is one chain of dependent operations.
template <int M>
constexpr int kTogether = M == 1   ? 4
                          : M <= 3 ? 2
                                   : 1;

// acc[u][m] = fma(w_u[k], x[m][k], acc[u][m]) for k in [0, n); load(u, k) gives sixteen lanes.
template <int U, int M, class Load>
GEMKIT_INLINE void accumulate_groups(f32x16 (&acc)[U][M], int64_t n, Load load_lanes, const float* const* x) {
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

// scores[m][s - first] for one page, all positions of it; masked ones are -inf
template <int M, class Element>
static void score_page(const Attend& a, int64_t page, int64_t first, const int64_t* lowest, const int64_t* highest) {
  constexpr int U = kTogether<M>;
  const Element* keys = reinterpret_cast<const Element*>(a.pages[page] + a.keys_offset);
  for (int g = 0; g < kPagePositions / 16; g += U, keys += U * a.head_dim * 16) {
    const int64_t s0 = page * kPagePositions + g * 16;
    float* out = a.scores + (s0 - first);
    bool any = false;
    for (int m = 0; m < M; m++) any |= s0 <= highest[m] && s0 + 16 * U - 1 >= lowest[m];
    if (!any) {
      for (int m = 0; m < M; m++)
        for (int u = 0; u < U; u++) store(out + m * a.scores_stride + 16 * u, set1(-INFINITY));
      continue;
    }
    f32x16 acc[U][M];
    for (int u = 0; u < U; u++)
      for (int m = 0; m < M; m++) acc[u][m] = zero();
    // The values of these positions are needed next, in strides that no hardware prefetcher follows
    const uint8_t* next = a.pages[page] + a.values_offset + g * 16 * a.head_dim * static_cast<int64_t>(sizeof(Element));
    accumulate_groups<U, M>(
        acc, a.head_dim,
        [&](int u, int64_t k) {
          if (u == 0) prefetch(next + k * 16 * U * static_cast<int64_t>(sizeof(Element)));
          return load_cache(keys + (u * a.head_dim + k) * 16);
        },
        a.queries);
    for (int u = 0; u < U; u++)
      for (int m = 0; m < M; m++) {
        float* row = out + m * a.scores_stride + 16 * u;
        const int64_t s = s0 + 16 * u;
        store(row, a.softcap > 0 ? cap_lanes(acc[u][m], a.softcap) : acc[u][m]);
        if (s >= lowest[m] && s + 15 <= highest[m]) continue;
        for (int64_t i = 0; i < 16; i++)
          if (s + i < lowest[m] || s + i > highest[m]) row[i] = -INFINITY;
      }
  }
}

template <int M, class Element>
static void weigh_page(const Attend& a, int64_t page, int64_t first) {
  constexpr int U = M <= 3 ? 2 : 1;  // head_dim is a multiple of 32
  const Element* values = reinterpret_cast<const Element*>(a.pages[page] + a.values_offset);
  const float* weights[M];
  for (int m = 0; m < M; m++) weights[m] = a.scores + m * a.scores_stride + (page * kPagePositions - first);
  for (int64_t h = 0; h < a.head_dim; h += 16 * U) {
    f32x16 acc[U][M];
    for (int u = 0; u < U; u++)
      for (int m = 0; m < M; m++) acc[u][m] = load(a.out[m] + h + 16 * u);
    accumulate_groups<U, M>(
        acc, kPagePositions, [&](int u, int64_t k) { return load_cache(values + k * a.head_dim + h + 16 * u); },
        weights);
    for (int u = 0; u < U; u++)
      for (int m = 0; m < M; m++) store(a.out[m] + h + 16 * u, acc[u][m]);
  }
}

template <int M, class Element>
static void attend_queries(const Attend& a) {
  int64_t lowest[M], highest[M], first = INT64_MAX, last = 0;
  for (int m = 0; m < M; m++) {
    highest[m] = a.positions[m];
    lowest[m] = a.window > 0 && highest[m] >= a.window ? highest[m] - a.window + 1 : 0;
    first = lowest[m] < first ? lowest[m] : first;
    last = highest[m] > last ? highest[m] : last;
  }
  const int64_t page0 = first / kPagePositions, page1 = last / kPagePositions + 1;
  first = page0 * kPagePositions;
  for (int64_t page = page0; page < page1; page++) score_page<M, Element>(a, page, first, lowest, highest);

  const int64_t span = (page1 - page0) * kPagePositions;
  float inverse[M];
  for (int m = 0; m < M; m++) {
    float* row = a.scores + m * a.scores_stride;
    f32x16 most = set1(-INFINITY);
    for (int64_t i = 0; i < span; i += 16) most = max(load(row + i), most);
    const f32x16 shift = set1(reduce_max(most));
    f32x16 sum = zero();
    for (int64_t i = 0; i < span; i += 16) {
      f32x16 e = exp(load(row + i) - shift);
      store(row + i, e);
      sum = sum + e;
    }
    inverse[m] = 1.0f / reduce_add(sum);
    for (int64_t h = 0; h < a.head_dim; h += 16) store(a.out[m] + h, zero());
  }
  for (int64_t page = page0; page < page1; page++) weigh_page<M, Element>(a, page, first);
  for (int m = 0; m < M; m++) scale(a.out[m], inverse[m], a.head_dim);
}

template <class Element>
static void attend_as(const Attend& a) {
  switch (a.count) {
    case 1:
      return attend_queries<1, Element>(a);
    case 2:
      return attend_queries<2, Element>(a);
    case 3:
      return attend_queries<3, Element>(a);
    case 4:
      return attend_queries<4, Element>(a);
    case 5:
      return attend_queries<5, Element>(a);
    default:
      return attend_queries<6, Element>(a);
  }
}

// Elements past float16's range are held at its ends.
static void write_cache(const CacheWrite& w) {
  const int64_t group = w.slot / 16, lane = w.slot % 16;
  if (!w.half) {
    float* keys = reinterpret_cast<float*>(w.page + w.keys_offset) + group * w.head_dim * 16 + lane;
    for (int64_t h = 0; h < w.head_dim; h++) keys[h * 16] = w.key[h];
    std::memcpy(reinterpret_cast<float*>(w.page + w.values_offset) + w.slot * w.head_dim, w.value,
                w.head_dim * sizeof(float));
    return;
  }
  const f32x16 most = set1(65504.0f), least = set1(-65504.0f);
  uint16_t* keys = reinterpret_cast<uint16_t*>(w.page + w.keys_offset) + group * w.head_dim * 16 + lane;
  uint16_t* values = reinterpret_cast<uint16_t*>(w.page + w.values_offset) + w.slot * w.head_dim;
  for (int64_t h = 0; h < w.head_dim; h += 16) {
    uint16_t t[16];
    store_f16(t, min(max(load(w.key + h), least), most));
    for (int i = 0; i < 16; i++) keys[(h + i) * 16] = t[i];
    store_f16(values + h, min(max(load(w.value + h), least), most));
  }
}

static void attend(const Attend& a) { a.half ? attend_as<uint16_t>(a) : attend_as<float>(a); }

}  // namespace gemkit::GEMKIT_ISA
