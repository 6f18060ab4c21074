// Memory of the key-value cache.
#include "cache.h"

#include <algorithm>

namespace gemkit {

void lay_out_cache(const ModelPlan& plan, bool half, Cache& cache) {
  cache.kv_heads = plan.kv_heads, cache.half = half;
  cache.block_bytes = kPagePositions * plan.head_dim * (half ? 2 : 4);
  for (int64_t window : plan.group_windows) cache.groups.emplace_back().window = window;
  for (const LayerPlan& l : plan.layers) cache.layer_in_group.push_back(cache.groups[l.group].layers++);
  for (CacheGroup& g : cache.groups) g.page_bytes = g.layers * plan.kv_heads * 2 * cache.block_bytes;
}

std::string reserve_pages(Cache& cache, int64_t group, int64_t pages) {
  if (group < 0 || group >= static_cast<int64_t>(cache.groups.size())) return "no such cache group";
  CacheGroup& g = cache.groups[group];
  int64_t more = pages - static_cast<int64_t>(g.pages.size());
  if (more <= 0) return g.reserved = std::max(g.reserved, pages), std::string();
  if (pages > int64_t{1} << 24 || more > INT64_MAX / 2 / g.page_bytes) return "too many cache pages";
  // A slab fills at least one huge page
  constexpr int64_t kSmallest = static_cast<int64_t>(kHugePage - kArenaSlack);
  more = std::max(more, kSmallest / g.page_bytes);
  const int64_t bytes = std::max(more * g.page_bytes, kSmallest);
  Arena slab;
  if (!slab.allocate(static_cast<size_t>(bytes))) return out_of_memory("the key-value cache", bytes);
  for (int64_t i = 0; i < more; i++) g.pages.push_back(slab.data + i * g.page_bytes);
  g.slabs.push_back(std::move(slab));
  g.reserved = pages;
  return {};
}

}  // namespace gemkit
