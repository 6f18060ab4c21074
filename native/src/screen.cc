#include "screen.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <utility>
#include <vector>

#include "kernels/half.h"
#include "model.h"

namespace gemkit {
namespace {

// Each product of a block is a float product of an exact sum, added with one rounding to at most kMaxDim / 32 others.
// Their relative errors, and those of the screen's own float arithmetic, stay below this share of ‖w_b‖ · ‖x_b‖.
constexpr double kRounding = 1e-4;
constexpr float kMargin = 1.0001f;
// Without a proof: so many standard deviations of an error whose 32 parts per block have signs of their own.
constexpr float kDeviations = 8.0f;
// Beyond this share of its panels a row is cheaper to compute in full.
constexpr int64_t kLimitDivisor = 2;
constexpr int64_t kLeastScreened = 128;  // panels taken at once: each piece begins new streams of reads
// A soft-cap flattens differences: near it, and within this distance, the screen decides nothing.
constexpr float kFlat = 0.998f, kCapSlack = 0.02f;

bool greater(const Seed& a, const Seed& b) { return a.value > b.value; }

int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

Packed plane_of(const Packed& head) {
  Packed p;
  p.format = find_format(kQ4_0);
  p.rows = head.rows, p.cols = head.cols;
  return p;
}

}  // namespace

bool worth_screening(const Packed& head) {
  if (!head.format || !head.format->quantised() || head.rows < 4096) return false;
  return head.panel_bytes() > plane_of(head).panel_bytes() * 5 / 4;
}

int64_t screen_bytes(const Packed& head) {
  return rounded(static_cast<int64_t>(plane_of(head).bytes())) + rounded(head.panels() * head.blocks() * kPanelRows) +
         2 * rounded(head.panels() * 4) + rounded(head.cols * 4) + static_cast<int64_t>(kArenaSlack);
}

Screen screen_at(const Packed& head, const uint8_t* data) {
  Screen s;
  s.plane = plane_of(head);
  s.plane.data = data;
  s.norms = data + rounded(static_cast<int64_t>(s.plane.bytes()));
  s.units = reinterpret_cast<const float*>(s.norms + rounded(head.panels() * head.blocks() * kPanelRows));
  s.longest = s.units + rounded(head.panels() * 4) / 4;
  s.sizes = s.longest + rounded(head.panels() * 4) / 4;
  return s;
}

void build_screen(const Packed& head, const std::vector<float>& usual, uint8_t* data) {
  const Screen screen = screen_at(head, data);
  double mean = 0;
  for (float u : usual) mean += u / static_cast<double>(usual.size());
  std::vector<float> sizes(usual.size(), 1.0f);
  if (std::isfinite(mean) && mean > 0)
    for (size_t k = 0; k < sizes.size(); k++)
      sizes[k] = static_cast<float>(std::sqrt(std::max(usual[k] / mean, 1.0 / 64)));
  std::memcpy(const_cast<float*>(screen.sizes), sizes.data(), sizes.size() * 4);
  const FormatInfo& q4 = *screen.plane.format;
  const int64_t blocks = head.blocks();
  std::vector<float> row(static_cast<size_t>(head.cols));
  std::vector<uint8_t> file(static_cast<size_t>(blocks * 18 * kPanelRows));
  std::vector<double> norms(static_cast<size_t>(blocks * kPanelRows));
  for (int64_t p = 0; p < head.panels(); p++) {
    std::fill(norms.begin(), norms.end(), 0.0);
    const int64_t rows = std::min<int64_t>(kPanelRows, head.rows - p * kPanelRows);
    for (int64_t i = 0; i < rows; i++) {
      unpack_row(head, p * kPanelRows + i, row.data());
      for (int64_t b = 0; b < blocks; b++) {
        const float* w = row.data() + b * kBlock;
        float widest = 0;
        for (int k = 0; k < kBlock; k++)
          if (std::fabs(w[k]) > std::fabs(widest)) widest = w[k];
        uint8_t* block = file.data() + (i * blocks + b) * 18;
        const uint16_t step_bits = float_to_half(widest / -8.0f);
        std::memcpy(block, &step_bits, 2);
        const float step = half_to_float(step_bits), inverse = step != 0 ? 1.0f / step : 0.0f;
        double error = 0, size = 0;
        int codes[kBlock];
        for (int k = 0; k < kBlock; k++) {
          const float code = std::nearbyint(w[k] * inverse);
          codes[k] = code > 7 ? 15 : code > -8 ? static_cast<int>(code) + 8 : 0;  // NaN: 0
          const double d = sizes[static_cast<size_t>(b * kBlock + k)], v = static_cast<double>(step) * (codes[k] - 8);
          error += (w[k] - v) * (w[k] - v) * d * d, size += w[k] * w[k] * d * d;
        }
        for (int k = 0; k < 16; k++) block[2 + k] = static_cast<uint8_t>(codes[k] | codes[k + 16] << 4);
        norms[static_cast<size_t>(b * kPanelRows + i)] = std::sqrt(error) + kRounding * std::sqrt(size);
      }
    }
    double widest = 0, longest = 0;
    bool finite = true;
    for (int64_t i = 0; i < kPanelRows; i++) {
      double square = 0;
      for (int64_t b = 0; b < blocks; b++) {
        const double n = norms[static_cast<size_t>(b * kPanelRows + i)];
        square += n * n;
      }
      longest = std::max(longest, std::sqrt(square));
    }
    for (double n : norms) widest = std::max(widest, n), finite = finite && std::isfinite(n);
    const float unit = finite ? static_cast<float>(widest / 255 * 1.000001) : INFINITY;
    const_cast<float*>(screen.units)[p] = unit;
    const_cast<float*>(screen.longest)[p] = finite ? static_cast<float>(longest * 1.000001) : INFINITY;
    uint8_t* bytes = const_cast<uint8_t*>(screen.norms) + p * blocks * kPanelRows;
    for (size_t j = 0; j < norms.size(); j++)
      bytes[j] = finite && unit > 0 ? static_cast<uint8_t>(std::min(255.0, std::ceil(norms[j] / unit))) : 255;
    // The packer counts panels from the matrix's first row
    Packed one = screen.plane;
    one.rows = rows, one.data = nullptr;
    pack_panels(q4, file.data(), one, const_cast<uint8_t*>(screen.plane.panel(p)), 0, 1);
  }
}

int64_t Model::screen_bytes() const {
  const Packed& head = packed_[plan_.head];
  return options_.float_activations || !worth_screening(head) ? 0 : gemkit::screen_bytes(head);
}

int64_t Model::token_bytes() const {
  int64_t bytes = 0;
  const std::vector<bool> of_adapter = adapter_tensors(plan_);
  for (size_t i = 0; i < packed_.size(); i++) {
    const int32_t tensor = static_cast<int32_t>(i);
    if (!packed_[i].format || of_adapter[i] || (tensor == plan_.embed && tensor != plan_.head)) continue;
    bytes += tensor == plan_.head && has_screen() ? screen_bytes() : static_cast<int64_t>(packed_[i].bytes());
  }
  return bytes;
}

std::string Model::make_screen(uint8_t* data) {
  std::vector<float> usual;
  if (std::string e = measure_inputs(usual); !e.empty()) return e;
  build_screen(packed_[plan_.head], usual, data);
  return {};
}

// What each of the head's inputs usually measures: the root mean square over a few short texts of ids from all over the
// vocabulary, always the same. Other steps may run between them.
std::string Model::measure_inputs(std::vector<float>& usual) {
  constexpr int32_t kTexts = 8, kLength = 8, kFirst = 300, kStride = 29989, kBos = 2;
  const int32_t length = static_cast<int32_t>(std::min<int64_t>({kLength, options_.max_tokens, plan_.context}));
  const int64_t D = plan_.hidden;
  std::vector<Arena> pages(groups_.size());
  for (size_t g = 0; g < groups_.size(); g++)
    if (!pages[g].allocate(static_cast<size_t>(groups_[g].page_bytes))) return "not enough memory for a page";
  std::vector<double> squares(static_cast<size_t>(D), 0.0);
  std::vector<float> out(static_cast<size_t>(length * D));
  for (int32_t text = 0; text < kTexts; text++) {
    std::vector<int32_t> ids(1, static_cast<int32_t>(std::min<int64_t>(kBos, plan_.vocab - 1)));
    while (static_cast<int32_t>(ids.size()) < length) {
      const int64_t n = text * kLength + static_cast<int64_t>(ids.size());
      ids.push_back(static_cast<int32_t>((kFirst + n * kStride) % plan_.vocab));
    }
    const int32_t starts[] = {0, length}, position = 0;
    const std::lock_guard<std::mutex> lock(step_mutex_);
    StepInput input;
    input.sequences = 1, input.tokens = length;
    input.ids = ids.data(), input.starts = starts, input.positions = &position;
    std::vector<int32_t> own(groups_.size());
    std::vector<int64_t> reserved(groups_.size());
    for (size_t g = 0; g < groups_.size(); g++) {
      own[g] = static_cast<int32_t>(groups_[g].pages.size());
      groups_[g].pages.push_back(pages[g].data);
      reserved[g] = std::exchange(groups_[g].reserved, own[g] + 1);
      input.tables.push_back({&own[g], 1});
    }
    const std::string error = hidden_locked(input, out.data());
    for (size_t g = 0; g < groups_.size(); g++) groups_[g].pages.pop_back(), groups_[g].reserved = reserved[g];
    if (!error.empty()) return error;
    for (size_t i = 0; i < out.size(); i++)
      squares[i % static_cast<size_t>(D)] += static_cast<double>(out[i]) * out[i] / (kTexts * length);
  }
  usual.clear();
  for (double s : squares) usual.push_back(static_cast<float>(std::sqrt(s)));
  return {};
}

std::string Model::attach_screen(const uint8_t* data, int64_t bytes) {
  if (bytes != screen_bytes() || bytes == 0 || reinterpret_cast<uintptr_t>(data) % 16)
    return "the screen is not that of this model";
  const std::lock_guard<std::mutex> lock(step_mutex_);
  screen_ = screen_at(packed_[plan_.head], data);
  screen_data_ = data;
  screen_losses_ = screen_pause_ = 0;
  return {};
}

std::vector<int32_t> Model::take_screen_counts() {
  const std::lock_guard<std::mutex> lock(step_mutex_);
  return std::move(screen_counts_);
}

void Model::use_screen(bool use) {
  const std::lock_guard<std::mutex> lock(step_mutex_);
  use_screen_ = use;
  screen_losses_ = screen_pause_ = 0;
}

// The token of a row whose screen has run; -1 where a logit is not finite.
int32_t Model::choose_screened(size_t m, const SamplingParams& params) {
  const ScreenRow& row = screen_work_[m];
  float* logits = logits_ + static_cast<int64_t>(m) * padded(plan_.vocab);
  // A row of the head that is not finite fails every bound, so that its panel is among those computed
  if (std::any_of(row.failed.begin(), row.failed.end(), [](char f) { return f != 0; }))
    return all_finite(logits, plan_.vocab) ? choose(logits, plan_.vocab, params, kernels_) : -1;
  std::vector<int32_t> scanned, panels;
  for (const auto& part : row.scanned) scanned.insert(scanned.end(), part.begin(), part.end());
  std::merge(row.first.begin(), row.first.end(), scanned.begin(), scanned.end(), std::back_inserter(panels));
  for (const int32_t panel : panels) {
    const int64_t first = int64_t{panel} * kPanelRows;
    if (!all_finite(logits + first, std::min<int64_t>(plan_.vocab - first, kPanelRows))) return -1;
  }
  return choose_among(logits, plan_.vocab, panels, params, kernels_);
}

// After so many steps in a row most of whose rows took the whole head, the screen is left out for a while: with some
// weights, random ones for one, it never decides.
void Model::weigh_screen(size_t rows) {
  constexpr int kLosses = 8, kPause = 512;
  size_t lost = 0;
  for (size_t m = 0; m < rows; m++) {
    const std::vector<char>& failed = screen_work_[m].failed;
    lost += std::find(failed.begin(), failed.end(), 1) != failed.end();
  }
  screen_losses_ = 2 * lost > rows ? screen_losses_ + 1 : 0;
  if (screen_losses_ >= kLosses) screen_pause_ = kPause, screen_losses_ = kLosses - 1;
}

bool Model::can_screen(const std::vector<SampleRequest>& wanted) const {
  if (!screen_.plane.format || !use_screen_ || wanted.empty() || wanted.size() > kScreenRows) return false;
  for (const SampleRequest& w : wanted) {
    const bool greedy = w.params.temperature <= 0 || w.params.top_k == 1;
    if (w.logprob || w.top > 0 || (!greedy && (w.params.top_k < 1 || w.params.top_k > kScreenTop))) return false;
  }
  return true;
}

// Leaves in logits_ what the head gives wherever a row may be among the largest, and notes the panels. normed_ and
// normed_int8_ hold the inputs.
void Model::screen_rows(const std::vector<SampleRequest>& wanted, int rank, int size) {
  const Packed& head = packed_[plan_.head];
  const int64_t V = plan_.vocab, ld = padded(V), D = padded(plan_.hidden), panels = head.panels(),
                blocks = head.blocks(), M = static_cast<int64_t>(wanted.size());
  const Range mine = share(panels, rank, size);
  auto exact = [&](int64_t m, int64_t p) {
    float* y = logits_ + m * ld + p * kPanelRows;
    kernels_.matmul({&head, &normed_int8_, normed_, D, logits_, ld}, m, m + 1, p, p + 1);
    if (plan_.final_softcap > 0) kernels_.softcap(y, plan_.final_softcap, kPanelRows);
  };
  if (rank == 0) begin_screen(wanted);
  deal_out(dealt_.back(), panels, kLeastScreened, size, [&](Range r) {
    kernels_.matmul({&screen_.plane, &normed_int8_, nullptr, 0, logits_, ld}, 0, M, r.begin, r.end);
    for (int64_t m = 0; m < M; m++)
      kernels_.panel_largest(logits_ + m * ld + r.begin * kPanelRows, r.end - r.begin,
                             screen_work_[m].panel_largest.data() + r.begin);
  });
  team_.barrier();

  // The panels with the largest values of the copy, and those of tokens whose logits are changed by hand, come first.
  for (int64_t m = 0; m < M; m++) keep_largest(screen_work_[m], mine, screen_work_[m].best[rank]);
  team_.barrier();
  if (rank == 0)
    for (int64_t m = 0; m < M; m++) gather_seeds(screen_work_[m]);
  team_.barrier();
  for (int64_t m = 0; m < M; m++) {
    const std::vector<int32_t>& first = screen_work_[m].first;
    for (size_t i = static_cast<size_t>(rank); i < first.size(); i += static_cast<size_t>(size)) exact(m, first[i]);
  }
  team_.barrier();
  if (rank == 0)
    for (int64_t m = 0; m < M; m++) find_threshold(screen_work_[m], wanted[m], logits_ + m * ld);
  team_.barrier();

  for (int64_t m = 0; m < M; m++) {
    ScreenRow& row = screen_work_[m];
    const int64_t limit = (mine.end - mine.begin) / kLimitDivisor;
    int64_t count = 0;
    for (int64_t p = mine.begin; p < mine.end && count <= limit && !row.failed[0]; p++) {
      if (row.panel_largest[p] == INFINITY) continue;  // computed already
      float* y = logits_ + m * ld + p * kPanelRows;
      if (!(row.panel_largest[p] + screen_.longest[p] * row.most < row.threshold) &&
          kernels_.screen({screen_.norms + p * blocks * kPanelRows, row.sizes.data(), blocks, y,
                           row.reach * screen_.units[p], row.threshold, row.proven})) {
        exact(m, p);
        row.scanned[rank].push_back(static_cast<int32_t>(p));
        count++;
      }
    }
    row.counts[rank] = static_cast<int32_t>(count);
    if (count > limit) row.failed[1 + rank] = 1;
  }
  team_.barrier();
  // Rows that take the whole head take it together, and so do those between them
  int64_t first_failed = M, last_failed = -1;
  for (int64_t m = 0; m < M; m++) {
    ScreenRow& row = screen_work_[m];
    const bool failed = std::any_of(row.failed.begin(), row.failed.end(), [](char f) { return f != 0; });
    if (failed) first_failed = std::min(first_failed, m), last_failed = m;
    if (rank == 0 && screen_counts_.size() < (size_t{1} << 20)) {
      int32_t count = static_cast<int32_t>(row.first.size());
      for (int32_t c : row.counts) count += c;
      screen_counts_.push_back(failed ? -1 : count);
    }
  }
  if (first_failed <= last_failed) {
    kernels_.matmul({&head, &normed_int8_, normed_, D, logits_, ld}, first_failed, last_failed + 1, mine.begin,
                    mine.end);
    for (int64_t m = first_failed; plan_.final_softcap > 0 && m <= last_failed; m++)
      kernels_.softcap(logits_ + m * ld + mine.begin * kPanelRows, plan_.final_softcap,
                       (mine.end - mine.begin) * kPanelRows);
  }
  team_.barrier();
}

// Before the threads begin.
void Model::size_screen(size_t rows) {
  screen_work_.resize(kScreenRows);
  for (size_t m = 0; m < rows; m++)
    screen_work_[m].panel_largest.resize(static_cast<size_t>(packed_[plan_.head].panels()));
}

// What a step needs to know of each row before its logits.
void Model::begin_screen(const std::vector<SampleRequest>& wanted) {
  const Packed& head = packed_[plan_.head];
  const size_t threads = static_cast<size_t>(team_.size());
  for (size_t m = 0; m < wanted.size(); m++) {
    const SamplingParams& p = wanted[m].params;
    ScreenRow& row = screen_work_[m];
    row.best.resize(threads), row.scanned.resize(threads);
    for (auto& scanned : row.scanned) scanned.clear();
    row.counts.assign(threads, 0), row.failed.assign(threads + 1, 0);
    row.rank = p.temperature <= 0 || p.top_k == 1 ? 1 : p.top_k;
    row.seeds = static_cast<size_t>(row.rank) + 3;
    row.proven = row.rank == 1;
    row.altered.clear();
    if (p.repetition_penalty != 1 || p.presence_penalty != 0 || p.frequency_penalty != 0)
      row.altered.assign(p.history, p.history + p.history_length);
    row.altered.insert(row.altered.end(), p.bias_ids, p.bias_ids + p.bias_count);
    std::sort(row.altered.begin(), row.altered.end());
    row.altered.erase(std::unique(row.altered.begin(), row.altered.end()), row.altered.end());
    row.altered.erase(
        std::remove_if(row.altered.begin(), row.altered.end(), [&](int32_t id) { return id < 0 || id >= plan_.vocab; }),
        row.altered.end());
    // Sizes of the activations by block: a proof adds norms, a deviation adds squares
    row.sizes.resize(static_cast<size_t>(head.blocks()));
    const ActivationBlock* a = normed_int8_.blocks + static_cast<int64_t>(m) * normed_int8_.per_row;
    double total = 0, widest = 0;
    for (int64_t b = 0; b < head.blocks(); b++) {
      double square = 0;
      for (int k = 0; k < kBlock; k++) {
        const int q = a[b].q[k] + (k / 4 == a[b].quad ? a[b].spare[k % 4] : 0);
        const double x = q / static_cast<double>(screen_.sizes[b * kBlock + k]);
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
}

// The row.seeds largest panels of a range, in any order.
void Model::keep_largest(const ScreenRow& row, Range panels, std::vector<Seed>& best) {
  best.clear();
  float least = -INFINITY;  // of those kept so far, where there are enough
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

void Model::gather_seeds(ScreenRow& row) {
  std::vector<Seed> all;
  for (const auto& best : row.best) all.insert(all.end(), best.begin(), best.end());
  const auto end = all.begin() + static_cast<std::ptrdiff_t>(std::min(row.seeds, all.size()));
  std::nth_element(all.begin(), end, all.end(), greater);
  row.first.clear();
  for (auto s = all.begin(); s != end; ++s) row.first.push_back(s->panel);
  for (int32_t id : row.altered) row.first.push_back(id / kPanelRows);
  std::sort(row.first.begin(), row.first.end());
  row.first.erase(std::unique(row.first.begin(), row.first.end()), row.first.end());
  for (int32_t p : row.first) row.panel_largest[static_cast<size_t>(p)] = INFINITY;
}

// The logit that a row must be able to reach: the wanted-th largest of those that are known and not changed by hand.
void Model::find_threshold(ScreenRow& row, const SampleRequest& wanted, const float* logits) {
  (void)wanted;
  std::vector<float> known;
  for (int32_t p : row.first)
    for (int64_t id = int64_t{p} * kPanelRows; id < std::min<int64_t>(plan_.vocab, (p + 1) * kPanelRows); id++)
      if (!std::isnan(logits[id]) && !std::binary_search(row.altered.begin(), row.altered.end(), id))
        known.push_back(logits[id]);
  if (static_cast<int64_t>(known.size()) < row.rank) {
    row.failed[0] = 1;
    return;
  }
  const auto nth = known.begin() + (row.rank - 1);
  std::nth_element(known.begin(), nth, known.end(), std::greater<float>());
  row.threshold = *nth;
  if (const float cap = plan_.final_softcap; cap > 0) {
    if (!(std::fabs(row.threshold) < kFlat * cap))
      row.failed[0] = 1;
    else
      row.threshold = cap * std::atanh(row.threshold / cap) - kCapSlack;
  }
  if (!std::isfinite(row.threshold)) row.failed[0] = 1;
}

}  // namespace gemkit
