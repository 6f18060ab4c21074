// Attention over pages, written once over f32x16. Every query's scores, maximum, weights and sums are formed page by
// page in the order of absolute positions, so the result does not depend on which queries share a call, on how pages
// are divided among threads, nor on where the visible span begins: positions outside a query's view weigh exactly zero.
#pragma once
#include "float_kernels.h"

namespace gemkit::GEMKIT_ISA {

// With few queries, several groups of lanes go together: each sum is one chain of dependent operations.
template <int M>
constexpr int kTogether = M == 1 ? 4 : (M <= 3 ? 2 : 1);

// The page's positions that some query sees, rounded out to sixteens.
struct Span {
  int64_t begin, end;
};

// scores[m][i] for the positions of a span; those that a query does not see are −∞
template <int M, class Element>
GEMKIT_INLINE void score_page(const AttentionTile& a, Span span, float (&scores)[M][kPagePositions]) {
  constexpr int U = kTogether<M>;
  const int64_t H = a.head_dim;
  for (int64_t i = span.begin / (16 * U) * (16 * U); i < span.end; i += 16 * U) {
    f32x16 acc[U][M];
    for (int u = 0; u < U; u++)
      for (int m = 0; m < M; m++) acc[u][m] = zero();
    const Element* keys = reinterpret_cast<const Element*>(a.keys) + i * H;
    // The values of these positions are needed next, in strides that no hardware prefetcher follows
    const uint8_t* values = a.values + i * H * static_cast<int64_t>(sizeof(Element));
    accumulate<U, M>(
        acc, H,
        [&](int u, int64_t k) {
          if (u == 0) prefetch(values + k * 16 * U * static_cast<int64_t>(sizeof(Element)));
          return load_element(keys + (u * H + k) * 16);
        },
        a.queries);
    for (int m = 0; m < M; m++) {
      const int64_t highest = a.positions[m] - a.first;
      const int64_t lowest = a.window > 0 ? highest - a.window + 1 : 0;
      for (int u = 0; u < U; u++) {
        const int64_t at = i + 16 * u;
        store(scores[m] + at, a.softcap > 0 ? cap_lanes(acc[u][m], a.softcap) : acc[u][m]);
        if (at >= lowest && at + 15 <= highest) continue;
        for (int64_t k = at; k < at + 16; k++)
          if (k < lowest || k > highest) scores[m][k] = -INFINITY;
      }
    }
  }
}

// How the sums over two runs of positions become one: each is weighed by exp(its max − the larger max).
struct Merge {
  float max, to, later;
  bool begins;  // no earlier sum
};
GEMKIT_INLINE Merge weigh_merge(const PartialAttention& to, float later) {
  if (to.max == -INFINITY) return {later, 0, 1, true};
  const float largest = later > to.max ? later : to.max;
  return {largest, reduce_max(exp(set1(to.max - largest))), reduce_max(exp(set1(later - largest))), false};
}
GEMKIT_INLINE f32x16 merge_lanes(const Merge& j, f32x16 to, f32x16 later) {
  return fma(later, set1(j.later), to * set1(j.to));
}
GEMKIT_INLINE void merge_sums(const Merge& j, PartialAttention& to, float sum) {
  to.sum = j.begins ? sum : fused(sum, j.later, to.sum * j.to);
  to.max = j.max;
}

static void merge(PartialAttention& to, const PartialAttention& later, int64_t head_dim) {
  if (later.max == -INFINITY) return;
  const Merge j = weigh_merge(to, later.max);
  merge_sums(j, to, later.sum);
  for (int64_t h = 0; h < head_dim; h += 16) {
    const f32x16 v = load(later.out + h);
    store(to.out + h, j.begins ? v : merge_lanes(j, load(to.out + h), v));
  }
}

template <int M, class Element>
static void attend_page(const AttentionTile& a) {
  constexpr int U = M <= 3 ? 2 : 1;  // head_dim is a multiple of 32
  Span span{kPagePositions, 0};
  for (int m = 0; m < M; m++) {
    const int64_t highest = a.positions[m] - a.first, lowest = a.window > 0 ? highest - a.window + 1 : 0;
    if (highest < 0 || lowest >= kPagePositions) continue;
    span.begin = lowest < span.begin ? (lowest < 0 ? 0 : lowest / 16 * 16) : span.begin;
    const int64_t end = highest / 16 * 16 + 16;
    span.end = end > kPagePositions ? kPagePositions : end > span.end ? end : span.end;
  }
  if (span.begin >= span.end) return;
  alignas(64) float scores[M][kPagePositions];
  score_page<M, Element>(a, span, scores);

  Merge merges[M] = {};
  bool seen[M];
  for (int m = 0; m < M; m++) {
    f32x16 most = set1(-INFINITY), sum = zero();
    for (int64_t i = span.begin; i < span.end; i += 16) most = max(load(scores[m] + i), most);
    const float largest = reduce_max(most);
    seen[m] = largest != -INFINITY;
    const f32x16 shift = set1(seen[m] ? largest : 0.0f);
    for (int64_t i = span.begin; i < span.end; i += 16) {
      const f32x16 e = exp(load(scores[m] + i) - shift);
      store(scores[m] + i, e);
      sum = sum + e;
    }
    if (!seen[m]) continue;
    merges[m] = weigh_merge(a.partials[m], largest);
    merge_sums(merges[m], a.partials[m], reduce_add(sum));
  }

  const Element* values = reinterpret_cast<const Element*>(a.values) + span.begin * a.head_dim;
  const float* weights[M];
  for (int m = 0; m < M; m++) weights[m] = scores[m] + span.begin;
  const int64_t count = span.end - span.begin;
  const uint8_t* next = a.next ? a.next : a.keys;
  for (int64_t h = 0; h < a.head_dim; h += 16 * U) {
    f32x16 acc[U][M];
    for (int u = 0; u < U; u++)
      for (int m = 0; m < M; m++) acc[u][m] = zero();
    accumulate<U, M>(
        acc, count,
        [&](int u, int64_t k) {
          if (u == 0) prefetch(next + k * a.head_dim * static_cast<int64_t>(sizeof(Element)) + h * sizeof(Element));
          return load_element(values + k * a.head_dim + h + 16 * u);
        },
        weights);
    for (int m = 0; m < M; m++) {
      if (!seen[m]) continue;
      for (int u = 0; u < U; u++) {
        float* out = a.partials[m].out + h + 16 * u;
        store(out, merges[m].begins ? acc[u][m] : merge_lanes(merges[m], load(out), acc[u][m]));
      }
    }
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

static void attend(const AttentionTile& a) {
  with_constant<kTileQueries>(a.count - 1,
                              [&](auto i) { a.half ? attend_page<i + 1, uint16_t>(a) : attend_page<i + 1, float>(a); });
}

}  // namespace gemkit::GEMKIT_ISA
