// The search: seeds, a threshold from them, then a scan of all panels against it.
#include "screen_search.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <iterator>

namespace gemkit {
namespace {

constexpr size_t kScreenRows = kHeadRows;  // most sequences of a step whose head is screened
constexpr int64_t kScreenTop = 128;        // largest top-k
constexpr float kMargin = 1.0001f;
// Without a proof: this many standard deviations of an error whose 32 parts per block have independent signs.
constexpr float kDeviations = 8.0f;
// Beyond this share of its panels a row is cheaper to compute in full.
constexpr int64_t kLimitDivisor = 2;
constexpr int64_t kSmallestPiece = 128;  // panels taken at once: each piece begins new streams of reads
// A soft-cap flattens differences: near it, and within this distance, the screen decides nothing.
constexpr float kFlat = 0.998f, kCapSlack = 0.02f;

bool greater(const ScreenedPanel& a, const ScreenedPanel& b) { return a.value > b.value; }

template <class T>
void sort_unique(std::vector<T>& v) {
  std::sort(v.begin(), v.end());
  v.erase(std::unique(v.begin(), v.end()), v.end());
}

// Sets up a row's search from its request and its input to the head.
void begin_row(SearchRow& row, const Screen& screen, const Step& s, const ActivationBlock* a, const SamplingParams& p,
               size_t threads) {
  row.best.resize(threads), row.scanned.resize(threads);
  for (auto& scanned : row.scanned) scanned.clear();
  row.counts.assign(threads, 0), row.failed.assign(threads + 1, 0);
  row.rank = p.greedy() ? 1 : p.top_k;
  row.seeds = static_cast<size_t>(row.rank) + 3;
  row.proven = row.rank == 1;
  row.altered.clear();
  if (p.penalises()) row.altered.assign(p.history, p.history + p.history_length);
  row.altered.insert(row.altered.end(), p.bias_ids, p.bias_ids + p.bias_count);
  std::erase_if(row.altered, [&](int32_t id) { return id < 0 || id >= s.plan.vocab; });
  sort_unique(row.altered);
  // Sizes of the activations by block: a proof adds norms, a deviation adds squares
  const int64_t blocks = screen.plane.blocks();
  row.sizes.resize(static_cast<size_t>(blocks));
  double total = 0, widest = 0;
  for (int64_t b = 0; b < blocks; b++) {
    double square = 0;
    for (int k = 0; k < kBlock; k++) {
      const int q = a[b].q[k] + (k / kQuad == a[b].quad ? a[b].spare[k % kQuad] : 0);
      const double x = q / static_cast<double>(screen.sizes[b * kBlock + k]);
      square += x * x;
    }
    square *= static_cast<double>(a[b].scale) * a[b].scale;
    row.sizes[static_cast<size_t>(b)] = static_cast<float>(row.proven ? std::sqrt(square) : square / kBlock);
    total += square, widest = std::max(widest, square / kBlock);
  }
  row.reach = row.proven ? kMargin : kMargin * kDeviations;
  // No less than what the blocks give one by one
  row.most = row.reach * static_cast<float>(std::sqrt(row.proven ? total : widest));
  if (!std::isfinite(row.most)) row.failed[0] = 1;
}

// The row.seeds largest panels of a range, in any order.
void keep_largest(const SearchRow& row, Range panels, std::vector<ScreenedPanel>& best) {
  best.clear();
  float least = -INFINITY;  // minimum of those kept so far, where there are enough
  for (int64_t p = panels.begin; p < panels.end; p++) {
    const float value = row.panel_largest[p];
    if (!(value > least) || !std::isfinite(value)) continue;
    best.push_back({value, static_cast<int32_t>(p)});
    if (best.size() < 4 * row.seeds) continue;
    std::nth_element(best.begin(), best.begin() + static_cast<std::ptrdiff_t>(row.seeds - 1), best.end(), greater);
    best.resize(row.seeds);
    least = best.back().value;
  }
  if (best.size() <= row.seeds) return;
  std::nth_element(best.begin(), best.begin() + static_cast<std::ptrdiff_t>(row.seeds), best.end(), greater);
  best.resize(row.seeds);
}

// The first panels to compute: those with the largest values of the copy, and those of altered ids.
void gather_seeds(SearchRow& row) {
  std::vector<ScreenedPanel> all;
  for (const auto& best : row.best) all.insert(all.end(), best.begin(), best.end());
  const auto end = all.begin() + static_cast<std::ptrdiff_t>(std::min(row.seeds, all.size()));
  std::nth_element(all.begin(), end, all.end(), greater);
  row.first.clear();
  for (auto s = all.begin(); s != end; ++s) row.first.push_back(s->panel);
  for (int32_t id : row.altered) row.first.push_back(id / kPanelRows);
  sort_unique(row.first);
  for (int32_t p : row.first) row.panel_largest[static_cast<size_t>(p)] = INFINITY;
}

// The logit that a row must be able to reach: the rank-th largest of those that are known and not altered.
void find_threshold(SearchRow& row, const ModelPlan& plan, const float* logits) {
  std::vector<float> known;
  for (int32_t p : row.first)
    for (int64_t id = int64_t{p} * kPanelRows; id < std::min<int64_t>(plan.vocab, (p + 1) * kPanelRows); id++)
      if (!std::isnan(logits[id]) && !std::binary_search(row.altered.begin(), row.altered.end(), id))
        known.push_back(logits[id]);
  if (static_cast<int64_t>(known.size()) < row.rank) {
    row.failed[0] = 1;
    return;
  }
  const auto nth = known.begin() + (row.rank - 1);
  std::nth_element(known.begin(), nth, known.end(), std::greater<float>());
  row.threshold = *nth;
  if (const float cap = plan.final_softcap; cap > 0) {
    if (!(std::fabs(row.threshold) < kFlat * cap))
      row.failed[0] = 1;
    else
      row.threshold = cap * std::atanh(row.threshold / cap) - kCapSlack;
  }
  if (!std::isfinite(row.threshold)) row.failed[0] = 1;
}

}  // namespace

bool SearchRow::any_failed() const { return std::find(failed.begin(), failed.end(), 1) != failed.end(); }

bool use_search(ScreenSearch& search, const std::vector<SampleRequest>& requests) {
  if (!search.available() || !search.enabled || requests.empty() || requests.size() > kScreenRows) return false;
  for (const SampleRequest& r : requests)
    if (r.params.logprobs >= 0 || r.params.mask ||
        (!r.params.greedy() && (r.params.top_k < 1 || r.params.top_k > kScreenTop)))
      return false;
  if (search.pause-- > 0) return false;
  search.pause = 0;
  return true;
}

void begin_search(ScreenSearch& search, const Step& s, const std::vector<SampleRequest>& requests) {
  search.rows.resize(kScreenRows);
  for (size_t m = 0; m < requests.size(); m++)
    search.rows[m].panel_largest.resize(static_cast<size_t>(s.weights.matrix(s.plan.head).panels()));
  search.queue.store(0, std::memory_order_relaxed);
}

void search_rows(ScreenSearch& search, const Step& s, const std::vector<SampleRequest>& requests, const Worker& w) {
  const Screen& screen = search.screen;
  const Rows &inputs = s.scratch.normed, &logits = s.scratch.logits;
  const int64_t panels = screen.plane.panels(), blocks = screen.plane.blocks(),
                M = static_cast<int64_t>(requests.size());
  const Range mine = w.share(panels);
  for (int64_t m = 0; w.rank == 0 && m < M; m++)
    begin_row(search.rows[m], screen, s, inputs.int8.row(m), requests[m].params, static_cast<size_t>(w.size));
  guided_for(search.queue, panels, kSmallestPiece, w.size, [&](Range r) {
    s.kernels.matmul({&screen.plane, &inputs.int8, nullptr, 0, logits.data, logits.ld}, 0, M, r.begin, r.end);
    for (int64_t m = 0; m < M; m++)
      s.kernels.panel_largest(logits.row(m) + r.begin * kPanelRows, r.end - r.begin,
                              search.rows[m].panel_largest.data() + r.begin);
  });
  w.barrier();
  for (int64_t m = 0; m < M; m++) keep_largest(search.rows[m], mine, search.rows[m].best[w.rank]);
  w.barrier();
  for (int64_t m = 0; w.rank == 0 && m < M; m++) gather_seeds(search.rows[m]);
  w.barrier();
  for (int64_t m = 0; m < M; m++) {
    const std::vector<int32_t>& first = search.rows[m].first;
    for (size_t i = static_cast<size_t>(w.rank); i < first.size(); i += static_cast<size_t>(w.size))
      head_product(s, m, m + 1, {first[i], first[i] + 1});
  }
  w.barrier();
  for (int64_t m = 0; w.rank == 0 && m < M; m++) find_threshold(search.rows[m], s.plan, logits.row(m));
  w.barrier();

  for (int64_t m = 0; m < M; m++) {
    SearchRow& row = search.rows[m];
    const int64_t limit = (mine.end - mine.begin) / kLimitDivisor;
    int64_t count = 0;
    for (int64_t p = mine.begin; p < mine.end && count <= limit && !row.failed[0]; p++) {
      if (row.panel_largest[p] == INFINITY) continue;  // computed already
      if (!(row.panel_largest[p] + screen.longest[p] * row.most < row.threshold) &&
          s.kernels.screen({screen.norms + p * blocks * kPanelRows, row.sizes.data(), blocks,
                            logits.row(m) + p * kPanelRows, row.reach * screen.units[p], row.threshold, row.proven})) {
        head_product(s, m, m + 1, {p, p + 1});
        row.scanned[w.rank].push_back(static_cast<int32_t>(p));
        count++;
      }
    }
    row.counts[w.rank] = static_cast<int32_t>(count);
    if (count > limit) row.failed[1 + w.rank] = 1;
  }
  w.barrier();
  // Rows that take the whole head take it together, and so do those between them
  int64_t first_failed = M, last_failed = -1;
  for (int64_t m = 0; m < M; m++) {
    const SearchRow& row = search.rows[m];
    const bool failed = row.any_failed();
    if (failed) first_failed = std::min(first_failed, m), last_failed = m;
    if (w.rank == 0 && search.counts.size() < (size_t{1} << 20)) {
      int32_t count = static_cast<int32_t>(row.first.size());
      for (int32_t c : row.counts) count += c;
      search.counts.push_back(failed ? -1 : count);
    }
  }
  if (first_failed <= last_failed) head_product(s, first_failed, last_failed + 1, mine);
  w.barrier();
}

int32_t choose_found(const ScreenSearch& search, const Step& s, size_t m, const SamplingParams& params) {
  const SearchRow& row = search.rows[m];
  float* logits = s.scratch.logits.row(static_cast<int64_t>(m));
  // A row of the head that is not finite fails every bound, so that its panel is among those computed
  if (row.any_failed()) return all_finite(logits, s.plan.vocab) ? choose(logits, s.plan.vocab, params, s.kernels) : -1;
  std::vector<int32_t> scanned, panels;
  for (const auto& part : row.scanned) scanned.insert(scanned.end(), part.begin(), part.end());
  std::merge(row.first.begin(), row.first.end(), scanned.begin(), scanned.end(), std::back_inserter(panels));
  for (const int32_t panel : panels) {
    const int64_t first = int64_t{panel} * kPanelRows;
    if (!all_finite(logits + first, std::min<int64_t>(s.plan.vocab - first, kPanelRows))) return -1;
  }
  return choose_among(logits, s.plan.vocab, panels, params, s.kernels);
}

// After this many steps in a row in which most rows took the whole head, the screen is left out for a while: with some
// weights, random ones for example, it never decides.
void end_search(ScreenSearch& search, size_t rows) {
  constexpr int kLosses = 8, kPause = 512;
  size_t lost = 0;
  for (size_t m = 0; m < rows; m++) lost += search.rows[m].any_failed();
  search.losses = 2 * lost > rows ? search.losses + 1 : 0;
  if (search.losses >= kLosses) search.pause = kPause, search.losses = kLosses - 1;
}

}  // namespace gemkit
