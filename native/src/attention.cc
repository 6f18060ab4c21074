// Attention in a step: queries and keys rotated, keys and values cached, and who attends to what. Either blocks of
// queries are dealt out, or, where there are few, the pages that they see.
//
// H head width, N query heads, K kv heads, G = N/K, T new tokens of all sequences.
#include <algorithm>
#include <cmath>

#include "model.h"

namespace gemkit {
namespace {

// Attention is divided by pages where there are fewer kv heads of sequences than this for each thread, and no sequence
// has more queries a kv head than that.
constexpr int64_t kSpreadItems = 4, kSpreadQueries = 2 * kAttendQueries;

}  // namespace

// Whether this step's attention is divided by pages, and the room that it then needs.
std::string Model::prepare_attention() {
  const int64_t size = team_.size(), G = plan_.heads / plan_.kv_heads, H = plan_.head_dim;
  spread_ = size > 1 && input_.sequences * plan_.kv_heads < kSpreadItems * size;
  for (int64_t s = 0; s < input_.sequences; s++)
    spread_ &= (input_.starts[s + 1] - input_.starts[s]) * G <= kSpreadQueries;
  if (!spread_) return {};
  int64_t most = 0;
  for (const LayerPlan& layer : plan_.layers) {
    int64_t parts = 0;
    for (int64_t s = 0; s < input_.sequences; s++) {
      const int64_t count = input_.starts[s + 1] - input_.starts[s], first = input_.positions[s];
      const Range pages = visible_pages(layer, first, first + count - 1);
      parts += (pages.end - pages.begin) * count * plan_.heads;
    }
    most = std::max(most, parts);
  }
  if (static_cast<size_t>(most) <= parts_.size()) return {};
  const int64_t grown = std::max<int64_t>(most, static_cast<int64_t>(parts_.size()) * 3 / 2);
  const int64_t bytes = grown * H * static_cast<int64_t>(sizeof(float));
  parts_.clear();
  if (!part_outs_.allocate(static_cast<size_t>(bytes))) return out_of_memory("attention", bytes);
  for (int64_t i = 0; i < grown; i++) parts_.push_back({0, 0, part_outs_.as<float>() + i * H});
  return {};
}

// q and k: norm, rotation, query scale; k and v into their page. Dealt out by head.
void Model::rotate_and_cache(const LayerPlan& layer, int64_t layer_in_group, int rank, int size) {
  const int64_t H = plan_.head_dim, N = plan_.heads, K = plan_.kv_heads, half = H / 2, T = input_.tokens;
  const int64_t q_ld = padded(N * H), kv_ld = padded(K * H);
  const Range mine = share(T * (N + K), rank, size);
  for (int64_t i = mine.begin; i < mine.end; i++) {
    const int64_t t = i / (N + K), n = i % (N + K);
    const float* cosine = cosine_ + (layer.rope * T + t) * half;
    const float* sine = sine_ + (layer.rope * T + t) * half;
    auto rotate = [&](float* x, int32_t norm) {
      if (norm >= 0) kernels_.rms_norm(x, vector(norm), x, H, plan_.norm_eps);
      kernels_.rope(x, cosine, sine, half);
    };
    if (n < N) {
      float* q = q_ + t * q_ld + n * H;
      rotate(q, layer.q_norm);
      kernels_.scale(q, plan_.query_scale, H);
      continue;
    }
    const int64_t head = n - N, keys = keys_offset(layer_in_group, head);
    float* k = k_ + t * kv_ld + head * H;
    rotate(k, layer.k_norm);
    if (!all_finite(k, H) || !all_finite(v_ + t * kv_ld + head * H, H)) damaged_.store(true, std::memory_order_relaxed);
    const int32_t s = token_sequence_[t];
    const int64_t position = input_.positions[s] + (t - input_.starts[s]);
    const auto& table = input_.tables[layer.group];
    const int32_t id = table.pages[s * table.width + position / kPagePositions];
    kernels_.write_cache({k, v_ + t * kv_ld + head * H, H, groups_[layer.group].pages[id], keys, keys + cache_block(),
                          static_cast<int>(position % kPagePositions), !options_.float_activations});
  }
}

// What a query at `position`, and later ones, see in a layer: the first position, and the pages up to one's own.
int64_t Model::lowest_visible(const LayerPlan& layer, int64_t position) const {
  const int64_t window = groups_[layer.group].window;
  return window > 0 && position >= window ? position - window + 1 : 0;
}
Range Model::visible_pages(const LayerPlan& layer, int64_t first, int64_t last) const {
  return {lowest_visible(layer, first) / kPagePositions, last / kPagePositions + 1};
}

// Joins some pages to the attention of some queries of one sequence and kv head: page after page, that all may pass
// over it while it is in the cache.
void Model::attend_pages(const LayerPlan& layer, int64_t layer_in_group, const QueryBlock& block, Range pages,
                         Attended* attended, int64_t apart) {
  const int64_t H = plan_.head_dim, N = plan_.heads, G = N / plan_.kv_heads, q_ld = padded(N * H);
  const int64_t tiles = (block.count + kAttendQueries - 1) / kAttendQueries, tile = (block.count + tiles - 1) / tiles;
  const uint8_t* const* table = pages_[layer.group].data() + block.sequence * input_.tables[layer.group].width;
  const int64_t keys = keys_offset(layer_in_group, block.kv_head);
  Attend a;
  a.head_dim = H, a.window = groups_[layer.group].window, a.softcap = plan_.attention_softcap;
  a.half = !options_.float_activations;
  for (int64_t page = pages.begin; page < pages.end; page++, attended += apart) {
    a.keys = table[page] + keys, a.values = a.keys + cache_block(), a.first = page * kPagePositions;
    for (int64_t at = 0; at < block.count; at += tile) {
      const float* queries[kAttendQueries];
      int64_t positions[kAttendQueries];
      a.count = static_cast<int>(std::min(tile, block.count - at));
      for (int64_t i = 0; i < a.count; i++) {
        const int64_t q = block.first + at + i, t = input_.starts[block.sequence] + q / G;
        queries[i] = q_ + t * q_ld + (block.kv_head * G + q % G) * H;
        positions[i] = input_.positions[block.sequence] + q / G;
      }
      a.queries = queries, a.positions = positions, a.attended = attended + at;
      a.next = page + 1 < pages.end && at + tile >= block.count ? table[page + 1] + keys : nullptr;
      kernels_.attend(a);
    }
  }
}

// Divides by the sum of the weights, and quantises for the next product.
void Model::finish_attention(const LayerPlan& layer, const Attended& attended) {
  const int64_t H = plan_.head_dim, at = attended.out - attended_, ld = padded(plan_.heads * H);
  kernels_.scale(attended.out, 1.0f / attended.sum, H);
  if (quantised(layer.o_proj))
    kernels_.quantise(attended.out, attended_int8_.row(at / ld) + at % ld / kBlock, H / kBlock);
}

// Blocks of queries (tokens by heads of one kv head) are dealt out in turn: later tokens see more and cost more. Where
// there are too few for all threads, pages are divided instead.
void Model::attend(const LayerPlan& layer, int64_t layer_in_group, size_t phase, int rank, int size) {
  const int64_t H = plan_.head_dim, N = plan_.heads, K = plan_.kv_heads, G = N / K, q_ld = padded(N * H);
  if (spread_) return attend_spread(layer, layer_in_group, rank, size);
  const int64_t even = (input_.tokens * N + 4 * size - 1) / (4 * size);
  const int64_t most = std::min(kBlockQueries, (even + kAttendQueries - 1) / kAttendQueries * kAttendQueries);
  auto take = [&] { return dealt_[phase].fetch_add(1, std::memory_order_relaxed); };
  int64_t item = 0, mine = deals(size) ? take() : rank;
  for (int32_t s = 0; s < input_.sequences; s++) {
    const int64_t count = (input_.starts[s + 1] - input_.starts[s]) * G;
    for (int64_t n = 0; n < K; n++)
      for (int64_t at = 0; at < count; at += most) {
        if (item++ != mine) continue;
        mine = deals(size) ? take() : mine + size;
        const QueryBlock block{s, n, at, std::min(most, count - at)};
        Attended attended[kBlockQueries];
        for (int64_t i = 0; i < block.count; i++)
          attended[i] = {-INFINITY, 0,
                         attended_ + (input_.starts[s] + (at + i) / G) * q_ld + (n * G + (at + i) % G) * H};
        const Range pages =
            visible_pages(layer, input_.positions[s] + at / G, input_.positions[s] + (at + block.count - 1) / G);
        attend_pages(layer, layer_in_group, block, pages, attended, 0);
        for (int64_t i = 0; i < block.count; i++) finish_attention(layer, attended[i]);
      }
  }
}

// Each thread takes about as many positions, in whole pages, and leaves their sums in parts_; then the pages of each
// query are joined in order.
void Model::attend_spread(const LayerPlan& layer, int64_t layer_in_group, int rank, int size) {
  const int64_t H = plan_.head_dim, N = plan_.heads, K = plan_.kv_heads, G = N / K, q_ld = padded(N * H);
  auto queries = [&](int64_t s) { return (input_.starts[s + 1] - input_.starts[s]) * G; };
  auto last = [&](int64_t s) { return input_.positions[s] + queries(s) / G - 1; };
  auto visible = [&](int64_t s) { return visible_pages(layer, input_.positions[s], last(s)); };
  int64_t total = 0;
  for (int64_t s = 0; s < input_.sequences; s++)
    total += K * (last(s) + 1 - lowest_visible(layer, input_.positions[s]));
  int64_t before = 0;  // positions of the kv heads so far
  Attended* part = parts_.data();
  for (int32_t s = 0; s < input_.sequences; s++) {
    const Range pages = visible(s);
    const int64_t count = queries(s), lowest = lowest_visible(layer, input_.positions[s]), end = last(s) + 1;
    for (int64_t n = 0; n < K; n++, before += end - lowest, part += (pages.end - pages.begin) * count) {
      Range mine{pages.end, pages.begin};
      for (int64_t page = pages.begin; page < pages.end; page++) {
        // A page belongs to the thread in whose share its middle lies
        const int64_t from = std::max(lowest, page * kPagePositions), to = std::min(end, (page + 1) * kPagePositions);
        if ((2 * (before - lowest) + from + to) * size / (2 * total) != rank) continue;
        mine = {std::min(mine.begin, page), page + 1};
      }
      if (mine.begin >= mine.end) continue;
      Attended* own = part + (mine.begin - pages.begin) * count;
      for (int64_t i = 0; i < (mine.end - mine.begin) * count; i++) own[i].largest = -INFINITY;
      attend_pages(layer, layer_in_group, {s, n, 0, count}, mine, own, count);
    }
  }
  team_.barrier();
  const Range heads = share(input_.tokens * N, rank, size);
  part = parts_.data();
  for (int64_t s = 0; s < input_.sequences; s++) {
    const Range pages = visible(s);
    const int64_t count = queries(s), width = pages.end - pages.begin;
    for (int64_t n = 0; n < K; n++, part += width * count)
      for (int64_t q = 0; q < count; q++) {
        const int64_t t = input_.starts[s] + q / G, head = n * G + q % G;
        if (t * N + head < heads.begin || t * N + head >= heads.end) continue;
        Attended all{-INFINITY, 0, attended_ + t * q_ld + head * H};
        for (int64_t page = 0; page < width; page++) kernels_.join(all, part[page * count + q], H);
        finish_attention(layer, all);
      }
  }
}

}  // namespace gemkit
