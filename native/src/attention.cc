// Attention is divided among threads by blocks of queries, in a queue, or, where there are few queries, by the pages
// that they see: partial sums per page, merged in the order of pages. Both give the same bits.
//
// H head width, N query heads, K kv heads, G = N/K, T new tokens of all sequences.
#include "step.h"

#include <algorithm>
#include <cmath>

namespace gemkit {
namespace {

// Attention is split by pages where there are fewer kv heads of sequences than this for each thread, and no sequence
// has more queries a kv head than that.
constexpr int64_t kSplitItems = 4, kSplitQueries = 2 * kTileQueries;
constexpr int64_t kBlockQueries = 48;  // most queries that pass over a page together

// Queries [first, first + count) of a sequence: tokens by the heads of one kv head.
struct QueryBlock {
  int32_t sequence;
  int64_t kv_head, first, count;
};

const CacheGroup& group_of(const Step& s, size_t layer) { return s.cache.groups[s.plan.layers[layer].group]; }

// Pages that a sequence's new tokens see.
Range pages_of(const Step& s, const CacheGroup& group, int64_t sequence) {
  const int64_t first = s.input.positions[sequence];
  return group.visible_pages(first, first + s.input.count(sequence) - 1);
}

// The attention output of query q of a sequence and kv head.
float* output_of(const Step& s, int64_t sequence, int64_t kv_head, int64_t q) {
  const int64_t G = s.plan.heads / s.plan.kv_heads;
  return s.scratch.attention.row(s.input.starts[sequence] + q / G) + (kv_head * G + q % G) * s.plan.head_dim;
}

// Merges some pages into the partial attention of a block's queries: page after page, so that all queries read a page
// while it is in the processor's cache. partials: [count], the next page's `stride` further on.
void attend_pages(const Step& s, size_t layer, const QueryBlock& block, Range pages, PartialAttention* partials,
                  int64_t stride) {
  const int32_t group = s.plan.layers[layer].group;
  const int64_t H = s.plan.head_dim, G = s.plan.heads / s.plan.kv_heads;
  const int64_t tiles = (block.count + kTileQueries - 1) / kTileQueries, size = (block.count + tiles - 1) / tiles;
  const uint8_t* const* table = s.pages[group].data() + block.sequence * s.input.tables[group].width;
  const int64_t keys = s.cache.keys_offset(layer, block.kv_head);
  AttentionTile tile{
      .head_dim = H, .window = group_of(s, layer).window, .softcap = s.plan.attention_softcap, .half = s.cache.half};
  for (int64_t page = pages.begin; page < pages.end; page++, partials += stride) {
    tile.keys = table[page] + keys, tile.values = tile.keys + s.cache.block_bytes, tile.first = page * kPagePositions;
    for (int64_t at = 0; at < block.count; at += size) {
      const float* queries[kTileQueries];
      int64_t positions[kTileQueries];
      tile.count = static_cast<int>(std::min(size, block.count - at));
      for (int64_t i = 0; i < tile.count; i++) {
        const int64_t q = block.first + at + i, t = s.input.starts[block.sequence] + q / G;
        queries[i] = s.scratch.q.row(t) + (block.kv_head * G + q % G) * H;
        positions[i] = s.input.positions[block.sequence] + q / G;
      }
      tile.queries = queries, tile.positions = positions, tile.partials = partials + at;
      tile.next = page + 1 < pages.end && at + size >= block.count ? table[page + 1] + keys : nullptr;
      s.kernels.attend(tile);
    }
  }
}

// Divides by the sum of the weights, and quantises for the next product.
void finish(const Step& s, size_t layer, const PartialAttention& attention) {
  const Rows& rows = s.scratch.attention;
  const int64_t H = s.plan.head_dim, at = attention.out - rows.data;
  s.kernels.scale(attention.out, 1.0f / attention.sum, H);
  if (s.weights.quantised(s.plan.layers[layer].o_proj))
    s.kernels.quantise(attention.out, rows.int8.row(at / rows.ld) + at % rows.ld / kBlock, H / kBlock);
}

// Blocks of queries, in turn or from the queue: later tokens see more and cost more.
void attend_blocks(Step& s, size_t layer, const Worker& w) {
  const int64_t N = s.plan.heads, K = s.plan.kv_heads, G = N / K;
  const int64_t even = (s.input.tokens * N + 4 * w.size - 1) / (4 * w.size);
  const int64_t most = std::min(kBlockQueries, (even + kTileQueries - 1) / kTileQueries * kTileQueries);
  auto next = [&](int64_t mine) {
    return s.dynamic ? s.queue(layer, kAttention).fetch_add(1, std::memory_order_relaxed) : mine + w.size;
  };
  int64_t item = 0, mine = next(w.rank - w.size);
  for (int32_t sequence = 0; sequence < s.input.sequences; sequence++) {
    const int64_t count = s.input.count(sequence) * G, first = s.input.positions[sequence];
    for (int64_t n = 0; n < K; n++)
      for (int64_t at = 0; at < count; at += most) {
        if (item++ != mine) continue;
        mine = next(mine);
        const QueryBlock block{sequence, n, at, std::min(most, count - at)};
        PartialAttention partials[kBlockQueries];
        for (int64_t i = 0; i < block.count; i++) partials[i] = {-INFINITY, 0, output_of(s, sequence, n, at + i)};
        const Range pages = group_of(s, layer).visible_pages(first + at / G, first + (at + block.count - 1) / G);
        attend_pages(s, layer, block, pages, partials, 0);
        for (int64_t i = 0; i < block.count; i++) finish(s, layer, partials[i]);
      }
  }
}

// Each thread takes about as many positions, in whole pages, and leaves their sums in s.partials; then the pages of
// each query are merged in order.
void attend_split(Step& s, size_t layer, const Worker& w) {
  const int64_t H = s.plan.head_dim, N = s.plan.heads, K = s.plan.kv_heads, G = N / K;
  const CacheGroup& group = group_of(s, layer);
  auto lowest = [&](int64_t sequence) { return group.lowest_visible(s.input.positions[sequence]); };
  auto end = [&](int64_t sequence) { return s.input.positions[sequence] + s.input.count(sequence); };
  int64_t total = 0;
  for (int64_t i = 0; i < s.input.sequences; i++) total += K * (end(i) - lowest(i));
  int64_t before = 0;  // positions of the kv heads so far
  PartialAttention* partials = s.partials.data();
  for (int32_t i = 0; i < s.input.sequences; i++) {
    const Range pages = pages_of(s, group, i);
    const int64_t count = s.input.count(i) * G, visible = end(i) - lowest(i);
    for (int64_t n = 0; n < K; n++, before += visible, partials += (pages.end - pages.begin) * count) {
      Range mine{pages.end, pages.begin};
      for (int64_t page = pages.begin; page < pages.end; page++) {
        // A page belongs to the thread that has its middle position
        const int64_t from = std::max(lowest(i), page * kPagePositions),
                      to = std::min(end(i), (page + 1) * kPagePositions);
        if ((2 * (before - lowest(i)) + from + to) * w.size / (2 * total) != w.rank) continue;
        mine = {std::min(mine.begin, page), page + 1};
      }
      if (mine.begin >= mine.end) continue;
      PartialAttention* own = partials + (mine.begin - pages.begin) * count;
      for (int64_t p = 0; p < (mine.end - mine.begin) * count; p++) own[p].max = -INFINITY;
      attend_pages(s, layer, {i, n, 0, count}, mine, own, count);
    }
  }
  w.barrier();
  const Range heads = w.share(s.input.tokens * N);
  partials = s.partials.data();
  for (int64_t i = 0; i < s.input.sequences; i++) {
    const Range pages = pages_of(s, group, i);
    const int64_t count = s.input.count(i) * G, width = pages.end - pages.begin;
    for (int64_t n = 0; n < K; n++, partials += width * count)
      for (int64_t q = 0; q < count; q++) {
        const int64_t head = (s.input.starts[i] + q / G) * N + n * G + q % G;
        if (head < heads.begin || head >= heads.end) continue;
        PartialAttention all{-INFINITY, 0, output_of(s, i, n, q)};
        for (int64_t page = 0; page < width; page++) s.kernels.merge(all, partials[page * count + q], H);
        finish(s, layer, all);
      }
  }
}

}  // namespace

std::string begin_attention(Step& s, int threads) {
  const int64_t G = s.plan.heads / s.plan.kv_heads;
  s.split_by_pages = threads > 1 && s.input.sequences * s.plan.kv_heads < kSplitItems * threads;
  for (int64_t i = 0; i < s.input.sequences; i++) s.split_by_pages &= s.input.count(i) * G <= kSplitQueries;
  if (!s.split_by_pages) return {};
  int64_t most = 0;
  for (const CacheGroup& group : s.cache.groups) {
    int64_t count = 0;
    for (int64_t i = 0; i < s.input.sequences; i++) {
      const Range pages = pages_of(s, group, i);
      count += (pages.end - pages.begin) * s.input.count(i) * s.plan.heads;
    }
    most = std::max(most, count);
  }
  const int64_t size = static_cast<int64_t>(s.partials.size());
  if (most <= size) return {};
  const int64_t grown = std::max(most, size * 3 / 2), H = s.plan.head_dim;
  const int64_t bytes = grown * H * static_cast<int64_t>(sizeof(float));
  s.partials.clear();
  if (!s.partial_outs.allocate(static_cast<size_t>(bytes))) return out_of_memory("attention", bytes);
  for (int64_t i = 0; i < grown; i++) s.partials.push_back({0, 0, s.partial_outs.as<float>() + i * H});
  return {};
}

void rotate_and_cache(Step& s, size_t layer, const Worker& w) {
  const LayerPlan& l = s.plan.layers[layer];
  const int64_t H = s.plan.head_dim, N = s.plan.heads, K = s.plan.kv_heads;
  const StepInput::Table& table = s.input.tables[l.group];
  const Range mine = w.share(s.input.tokens * (N + K));
  for (int64_t i = mine.begin; i < mine.end; i++) {
    const int64_t t = i / (N + K), n = i % (N + K), angles = l.rope * s.input.tokens + t;
    auto rotate = [&](float* x, int32_t norm) {
      if (norm >= 0) s.kernels.rms_norm(x, s.weights.vector(norm), x, H, s.plan.norm_eps);
      s.kernels.rope(x, s.scratch.cosine.row(angles), s.scratch.sine.row(angles), H / 2);
    };
    if (n < N) {
      float* q = s.scratch.q.row(t) + n * H;
      rotate(q, l.q_norm);
      s.kernels.scale(q, s.plan.query_scale, H);
      continue;
    }
    const int64_t head = n - N, keys = s.cache.keys_offset(layer, head), position = s.position(t);
    float *k = s.scratch.k.row(t) + head * H, *v = s.scratch.v.row(t) + head * H;
    rotate(k, l.k_norm);
    if (!all_finite(k, H) || !all_finite(v, H)) s.damaged.store(true, std::memory_order_relaxed);
    const int32_t id = table.pages[s.token_sequence[t] * table.width + position / kPagePositions];
    s.kernels.write_cache({k, v, H, s.cache.groups[l.group].pages[id], keys, keys + s.cache.block_bytes,
                           static_cast<int>(position % kPagePositions), s.cache.half});
  }
}

void attend(Step& s, size_t layer, const Worker& w) {
  s.split_by_pages ? attend_split(s, layer, w) : attend_blocks(s, layer, w);
}

}  // namespace gemkit
