// Attention over pages, written once over f32x16. Every query's scores, maximum, weights and sums are formed in the order of
// absolute positions, so the result does not depend on which queries share a call, nor on where the visible span begins:
// positions outside a query's view weigh exactly zero.
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

// scores[m][s - first] for one page, all positions of it; masked ones are -inf
template <int M, class Element>
static void score_page(const Attend& a, int64_t page, int64_t first, const int64_t* lowest, const int64_t* highest) {
  const Element* keys = reinterpret_cast<const Element*>(a.pages[page] + a.keys_offset);
  for (int g = 0; g < kPagePositions / 16; g++, keys += a.head_dim * 16) {
    const int64_t s = page * kPagePositions + g * 16;
    bool any = false;
    for (int m = 0; m < M; m++) any |= s <= highest[m] && s + 15 >= lowest[m];
    float* out = a.scores + (s - first);
    if (!any) {
      for (int m = 0; m < M; m++) store(out + m * a.scores_stride, set1(-INFINITY));
      continue;
    }
    f32x16 acc[M];
    for (int m = 0; m < M; m++) acc[m] = zero();
    accumulate<M>(acc, a.head_dim, [&](int64_t k) { return load_cache(keys + k * 16); }, a.queries);
    for (int m = 0; m < M; m++) {
      f32x16 v = a.softcap > 0 ? cap_lanes(acc[m], a.softcap) : acc[m];
      float* row = out + m * a.scores_stride;
      store(row, v);
      for (int64_t i = 0; i < 16; i++)
        if (s + i < lowest[m] || s + i > highest[m]) row[i] = -INFINITY;
    }
  }
}

template <int M, class Element>
static void weigh_page(const Attend& a, int64_t page, int64_t first) {
  const Element* values = reinterpret_cast<const Element*>(a.pages[page] + a.values_offset);
  const float* weights[M];
  for (int m = 0; m < M; m++) weights[m] = a.scores + m * a.scores_stride + (page * kPagePositions - first);
  for (int64_t h = 0; h < a.head_dim; h += 16) {
    f32x16 acc[M];
    for (int m = 0; m < M; m++) acc[m] = load(a.out[m] + h);
    accumulate<M>(acc, kPagePositions, [&](int64_t k) { return load_cache(values + k * a.head_dim + h); }, weights);
    for (int m = 0; m < M; m++) store(a.out[m] + h, acc[m]);
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
    case 1: return attend_queries<1, Element>(a);
    case 2: return attend_queries<2, Element>(a);
    case 3: return attend_queries<3, Element>(a);
    case 4: return attend_queries<4, Element>(a);
    case 5: return attend_queries<5, Element>(a);
    default: return attend_queries<6, Element>(a);
  }
}

// Elements past float16's range are held at its ends.
static void write_cache(const CacheWrite& w) {
  const int64_t group = w.slot / 16, lane = w.slot % 16;
  if (!w.half) {
    float* keys = reinterpret_cast<float*>(w.page + w.keys_offset) + group * w.head_dim * 16 + lane;
    for (int64_t h = 0; h < w.head_dim; h++) keys[h * 16] = w.key[h];
    std::memcpy(reinterpret_cast<float*>(w.page + w.values_offset) + w.slot * w.head_dim, w.value, w.head_dim * sizeof(float));
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
