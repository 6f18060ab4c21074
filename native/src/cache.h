// The paged key-value cache: page memory by group of layers that have one window. A page's inner layout is in
// kernels/kernels.h.
#pragma once
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "os.h"
#include "plan.h"
#include "threads.h"

namespace gemkit {

struct CacheGroup {
  int64_t window = 0, layers = 0, page_bytes = 0;
  int64_t reserved = 0;  // pages that may be used; more may be allocated
  std::vector<uint8_t*> pages;
  std::vector<Arena> slabs;

  // First position that a query at `position`, and later ones, see.
  int64_t lowest_visible(int64_t position) const {
    return window > 0 && position >= window ? position - window + 1 : 0;
  }
  // Pages that queries at positions first to last see.
  Range visible_pages(int64_t first, int64_t last) const {
    return {lowest_visible(first) / kPagePositions, last / kPagePositions + 1};
  }
};

struct Cache {
  std::vector<CacheGroup> groups;
  std::vector<int64_t> layer_in_group;  // by layer
  int64_t kv_heads = 0;
  int64_t block_bytes = 0;  // keys, or values, of one layer and kv head in a page
  bool half = true;         // elements are f16

  // Where the keys of a layer and kv head begin in a page; the values follow.
  int64_t keys_offset(size_t layer, int64_t kv_head) const {
    return (layer_in_group[layer] * kv_heads + kv_head) * 2 * block_bytes;
  }
};

void lay_out_cache(const ModelPlan& plan, bool half, Cache& cache);

// Pages of group `group` become at least `pages`; their contents stay. Returns an error or nothing.
std::string reserve_pages(Cache& cache, int64_t group, int64_t pages);

}  // namespace gemkit
