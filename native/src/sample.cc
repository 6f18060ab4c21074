// Penalties, bias, top-k, top-p, min-p and the draw.
#include "sample.h"

#include <algorithm>
#include <cmath>
#include <unordered_map>
#include <vector>

namespace gemkit {
namespace {

struct Candidate {
  float logit;
  int32_t id;
};
bool before(const Candidate& a, const Candidate& b) { return a.logit > b.logit || (a.logit == b.logit && a.id < b.id); }

// The k best candidates in descending order.
std::vector<Candidate> best(const float* logits, int64_t vocab, int64_t k) {
  std::vector<Candidate> heap;  // the worst kept one on top
  heap.reserve(static_cast<size_t>(k));
  float bar = -INFINITY;
  for (int64_t i = 0; i < vocab; i++) {
    if (static_cast<int64_t>(heap.size()) == k && !(logits[i] > bar)) continue;
    if (std::isnan(logits[i])) continue;
    if (static_cast<int64_t>(heap.size()) == k) {
      std::pop_heap(heap.begin(), heap.end(), before);
      heap.pop_back();
    }
    heap.push_back({logits[i], static_cast<int32_t>(i)});
    std::push_heap(heap.begin(), heap.end(), before);
    if (static_cast<int64_t>(heap.size()) == k) bar = heap.front().logit;
  }
  std::sort_heap(heap.begin(), heap.end(), before);
  return heap;
}

void change(float* logits, int64_t vocab, const SamplingParams& p) {
  if (p.penalises()) {
    std::unordered_map<int32_t, int64_t> generated;  // 0: only in the prompt
    for (int64_t i = 0; i < p.history_length; i++) {
      if (p.history[i] < 0 || p.history[i] >= vocab) continue;
      generated[p.history[i]] += i >= p.prompt_length;
    }
    const float repetition = static_cast<float>(p.repetition_penalty),
                presence = static_cast<float>(p.presence_penalty), frequency = static_cast<float>(p.frequency_penalty);
    for (const auto& [id, count] : generated) {
      float& l = logits[id];
      l = l > 0 ? l / repetition : l * repetition;
      if (count > 0) {
        l -= presence;
        l -= frequency * static_cast<float>(count);
      }
    }
  }
  for (int64_t i = 0; i < p.bias_count; i++)
    if (p.bias_ids[i] >= 0 && p.bias_ids[i] < vocab) logits[p.bias_ids[i]] += p.bias_values[i];
  // A NaN is never chosen, not even where all probabilities round to 0
  for (int64_t id = 0; p.mask && id < vocab; id++)
    if (!(p.mask[id / 32] >> id % 32 & 1)) logits[id] = NAN;
}

double uniform(uint64_t seed, int64_t counter) {
  uint64_t z = seed + 0x9E3779B97F4A7C15ull * (static_cast<uint64_t>(counter) + 1);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  z ^= z >> 31;
  return static_cast<double>(z >> 11) * 0x1p-53;
}

// Candidates in descending order, sorted only as far as they are asked for: first the top-k, or bands of falling
// logits.
class Descending {
 public:
  Descending(const float* logits, int64_t vocab, int64_t top_k, float largest, double temperature)
      : logits_(logits), vocab_(vocab), largest_(largest), temperature_(temperature) {
    if (top_k > 0 && top_k < vocab) {
      sorted_ = best(logits, vocab, top_k);
      complete_ = true;
    }
  }
  double weight(float logit) const {
    return std::exp((static_cast<double>(logit) - static_cast<double>(largest_)) / temperature_);
  }
  // Sum of all weights: of the top-k in descending order, or of the whole row by id.
  double total() const {
    double sum = 0;
    if (complete_)
      for (const Candidate& c : sorted_) sum += weight(c.logit);
    else
      for (int64_t i = 0; i < vocab_; i++)
        if (!std::isnan(logits_[i])) sum += weight(logits_[i]);
    return sum;
  }
  // Candidate number i, or nullptr past the last.
  const Candidate* at(size_t i) {
    while (i >= sorted_.size() && !complete_) extend();
    return i < sorted_.size() ? &sorted_[i] : nullptr;
  }

 private:
  void extend() {
    const float above = floor_;
    depth_ = depth_ == 0 ? 4 : 2 * depth_;
    floor_ = depth_ < 1e6 ? static_cast<float>(static_cast<double>(largest_) - depth_ * temperature_) : -INFINITY;
    complete_ = !(floor_ > -INFINITY);
    const size_t first = sorted_.size();
    for (int64_t i = 0; i < vocab_; i++)
      if (logits_[i] >= floor_ && (first == 0 || logits_[i] < above))
        sorted_.push_back({logits_[i], static_cast<int32_t>(i)});
    std::sort(sorted_.begin() + static_cast<std::ptrdiff_t>(first), sorted_.end(), before);
  }

  const float* logits_;
  int64_t vocab_;
  float largest_;
  double temperature_;
  double depth_ = 0;
  float floor_ = INFINITY;
  bool complete_ = false;
  std::vector<Candidate> sorted_;
};

int32_t pick(const float* logits, int64_t vocab, const SamplingParams& p, const Kernels& kernels) {
  const Extent largest = kernels.largest(logits, vocab);
  if (largest.arg < 0) return -1;
  if (p.greedy() || !std::isfinite(largest.max)) return static_cast<int32_t>(largest.arg);

  Descending order(logits, vocab, p.top_k, largest.max, p.temperature);
  // Top-p and min-p both keep a prefix of the descending order.
  size_t kept = SIZE_MAX;
  double total = order.total();
  if (p.top_p < 1 || p.min_p > 0) {
    double reached = 0;
    kept = 0;
    for (const Candidate* c; (c = order.at(kept));) {
      const double w = order.weight(c->logit);
      if (w < p.min_p || (p.top_p < 1 && kept > 0 && reached >= p.top_p * total)) break;
      reached += w;
      kept++;
    }
    total = reached;
  }
  const double target = uniform(p.seed, p.counter) * total;
  double reached = 0;
  int32_t id = static_cast<int32_t>(largest.arg);
  for (size_t i = 0; i < kept; i++) {
    const Candidate* c = order.at(i);
    if (!c) break;
    id = c->id;
    reached += order.weight(c->logit);
    if (reached > target) break;
  }
  return id;
}

}  // namespace

int32_t choose(float* logits, int64_t vocab, const SamplingParams& p, const Kernels& kernels) {
  change(logits, vocab, p);
  return pick(logits, vocab, p, kernels);
}

int32_t choose_among(float* logits, int64_t vocab, const std::vector<int32_t>& panels, const SamplingParams& p,
                     const Kernels& kernels) {
  change(logits, vocab, p);
  std::vector<float> known;
  known.reserve(panels.size() * kPanelRows);
  for (int32_t panel : panels) {
    const int64_t first = int64_t{panel} * kPanelRows;
    known.insert(known.end(), logits + first, logits + std::min(vocab, first + kPanelRows));
  }
  const int32_t at = pick(known.data(), static_cast<int64_t>(known.size()), p, kernels);
  return at < 0 ? at : panels[static_cast<size_t>(at / kPanelRows)] * kPanelRows + at % kPanelRows;
}

int64_t largest_ids(const float* logits, int64_t vocab, int64_t n, int32_t* ids) {
  const std::vector<Candidate> sorted = best(logits, vocab, std::min(n, vocab));
  for (size_t i = 0; i < sorted.size(); i++) ids[i] = sorted[i].id;
  return static_cast<int64_t>(sorted.size());
}

}  // namespace gemkit
