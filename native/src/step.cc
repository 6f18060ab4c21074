// The forward step. Every thread runs the same functions over its share of tokens (norms, caches), of weight rows
// (products) or of query tiles (attention); the summed dimension is never divided, so the thread count cannot change a
// bit.
//
// T new tokens of all sequences, D width, N query heads, K kv heads, G = N/K, H head width, F ffn width.
#include <algorithm>
#include <cmath>
#include <limits>

#include "model.h"

namespace gemkit {
namespace {

constexpr int64_t kVocabChunk = 8192;  // logits summed as one piece
constexpr int64_t kDealtTokens = 16;   // a step of fewer reads more than it computes: equal shares read best
constexpr int64_t kLeastPanels = 2;    // every piece passes over all activations
constexpr const char* kNotNumbers =
    "the model produced logits that are not numbers; the weights are damaged or out of range";

}  // namespace

void Model::embed(Range tokens) {
  const int64_t D = plan_.hidden, half = plan_.head_dim / 2, T = input_.tokens;
  for (int64_t t = tokens.begin; t < tokens.end; t++) {
    float* x = x_ + t * padded(D);
    unpack_row(packed_[plan_.embed], input_.ids[t], x);
    kernels_.scale(x, plan_.embed_scale, D);
    const int32_t s = token_sequence_[t];
    const float position = static_cast<float>(input_.positions[s] + (t - input_.starts[s]));
    for (size_t r = 0; r < plan_.ropes.size(); r++)
      for (int64_t i = 0; i < half; i++) {
        const double angle = static_cast<double>(position * inverse_frequencies_[r * half + i]);
        cosine_[(r * T + t) * half + i] = static_cast<float>(std::cos(angle));
        sine_[(r * T + t) * half + i] = static_cast<float>(std::sin(angle));
      }
  }
}

void Model::normalise(int32_t norm, bool quantise, Range tokens) {
  const int64_t D = plan_.hidden, ld = padded(D);
  for (int64_t t = tokens.begin; t < tokens.end; t++) {
    kernels_.rms_norm(x_ + t * ld, vector(norm), normed_ + t * ld, D, plan_.norm_eps);
    if (quantise) kernels_.quantise(normed_ + t * ld, normed_int8_.row(t), normed_int8_.per_row);
  }
}

void Model::add_residual(int32_t norm, const float* y, int64_t ld, Range tokens) {
  const int64_t D = plan_.hidden;
  for (int64_t t = tokens.begin; t < tokens.end; t++) {
    const float* addend = y + t * ld;
    if (norm >= 0) {
      kernels_.rms_norm(addend, vector(norm), normed_ + t * ld, D, plan_.norm_eps);
      addend = normed_ + t * ld;
    }
    kernels_.add(x_ + t * ld, addend, D);
  }
}

// Whether work goes to whoever is free: cores differ, and some are taken away for a while. An adapter's first product
// would be repeated for each piece.
bool Model::deals(int size) const { return size > 1 && input_.tokens >= kDealtTokens && !input_.adapters; }

// Runs each(range) over [0, panels) on all threads together.
template <class Each>
void Model::deal(int64_t panels, size_t phase, int rank, int size, Each each) {
  if (!deals(size)) return each(share(panels, rank, size));
  deal_out(dealt_[phase], panels, kLeastPanels, size, each);
}

// y[t] = x[t]·w for all tokens and some rows of w, with the adapters of each token's sequence.
void Model::product(int32_t tensor, const float* x, int64_t ldx, const Activations& a, float* y, int64_t ldy,
                    Range panels, int rank) {
  const Packed& w = packed_[tensor];
  const Product main{&w, &a, x, ldx, y, ldy};
  kernels_.matmul(main, 0, input_.tokens, panels.begin, panels.end);
  if (!input_.adapters) return;
  for (const Adapter& adapter : adapters_) {
    if (adapter.tensor != tensor) continue;
    const int64_t low_ld = padded(adapter.a->rows), high_ld = padded(adapter.b->rows);
    float *low = low_rank_[rank].as<float>(), *high = low + low_ld;
    for (int64_t s = 0; s < input_.sequences; s++) {
      if (input_.adapters[s] != adapter.adapter) continue;
      for (int64_t t = input_.starts[s]; t < input_.starts[s + 1]; t++) {
        kernels_.matmul({adapter.a, nullptr, x + t * ldx, ldx, low, low_ld}, 0, 1, 0, adapter.a->panels());
        kernels_.matmul({adapter.b, nullptr, low, low_ld, high, high_ld}, 0, 1, panels.begin, panels.end);
        for (int64_t i = panels.begin * kPanelRows; i < panels.end * kPanelRows; i++)
          y[t * ldy + i] += adapter.scale * high[i];
      }
    }
  }
}

// Leaves the residual stream of all tokens in x_, final norm not yet applied.
void Model::forward(int rank, int size) {
  const int64_t T = input_.tokens, D = padded(plan_.hidden), F = padded(plan_.ffn);
  const int64_t q_ld = padded(plan_.heads * plan_.head_dim), kv_ld = padded(plan_.kv_heads * plan_.head_dim);
  const Range mine = share(T, rank, size);
  embed(mine);
  for (size_t i = 0; i < plan_.layers.size(); i++) {
    const LayerPlan& l = plan_.layers[i];
    normalise(l.input_norm, quantised(l.q_proj) || quantised(l.k_proj) || quantised(l.v_proj), mine);
    team_.barrier();
    const size_t phase = i * kPhases;
    const int64_t q_panels = packed_[l.q_proj].panels(), kv_panels = packed_[l.k_proj].panels();
    auto project = [&](int32_t tensor, float* y, int64_t ldy, Range panels) {
      if (panels.begin < panels.end) product(tensor, normed_, D, normed_int8_, y, ldy, panels, rank);
    };
    if (deals(size)) {
      deal(q_panels + 2 * kv_panels, phase + kQueries, rank, size, [&](Range r) {
        const int64_t k = q_panels, v = q_panels + kv_panels;
        project(l.q_proj, q_, q_ld, {r.begin, std::min(r.end, k)});
        project(l.k_proj, k_, kv_ld, {std::max(r.begin, k) - k, std::min(r.end, v) - k});
        project(l.v_proj, v_, kv_ld, {std::max(r.begin, v) - v, r.end - v});
      });
    } else {
      project(l.q_proj, q_, q_ld, share(q_panels, rank, size));
      project(l.k_proj, k_, kv_ld, share(kv_panels, rank, size));
      project(l.v_proj, v_, kv_ld, share(kv_panels, rank, size));
    }
    team_.barrier();
    rotate_and_cache(l, layer_in_group_[i], rank, size);
    team_.barrier();
    attend(l, layer_in_group_[i], phase + kAttention, rank, size);
    team_.barrier();
    deal(packed_[l.o_proj].panels(), phase + kOutput, rank, size,
         [&](Range r) { product(l.o_proj, attended_, q_ld, attended_int8_, y_, D, r, rank); });
    team_.barrier();
    add_residual(l.post_attention_norm, y_, D, mine);
    normalise(l.pre_ffn_norm, quantised(l.gate_proj) || quantised(l.up_proj), mine);
    team_.barrier();
    // By pairs of panels, which are whole blocks of the next product
    const int64_t ffn_panels = packed_[l.gate_proj].panels();
    deal((ffn_panels + 1) / 2, phase + kGate, rank, size, [&](Range pairs) {
      const Range r{2 * pairs.begin, std::min(2 * pairs.end, ffn_panels)};
      if (r.begin >= r.end) return;
      product(l.gate_proj, normed_, D, normed_int8_, gate_, F, r, rank);
      product(l.up_proj, normed_, D, normed_int8_, up_, F, r, rank);
      const int64_t first = r.begin * kPanelRows, count = (r.end - r.begin) * kPanelRows;
      for (int64_t t = 0; t < T; t++) {
        kernels_.gelu_multiply(gate_ + t * F + first, up_ + t * F + first, count);
        if (quantised(l.down_proj))
          kernels_.quantise(gate_ + t * F + first, gate_int8_.row(t) + pairs.begin, pairs.end - pairs.begin);
      }
    });
    team_.barrier();
    deal(packed_[l.down_proj].panels(), phase + kDown, rank, size,
         [&](Range r) { product(l.down_proj, gate_, F, gate_int8_, y_, D, r, rank); });
    team_.barrier();
    add_residual(l.post_ffn_norm, y_, D, mine);
  }
  team_.barrier();
}

// Final norms of up to kHeadRows token rows go to the first rows of normed_.
void Model::head_inputs(const std::vector<int64_t>& rows, int rank, int size) {
  const int64_t D = padded(plan_.hidden);
  const Range mine = share(static_cast<int64_t>(rows.size()), rank, size);
  for (int64_t r = mine.begin; r < mine.end; r++) {
    kernels_.rms_norm(x_ + rows[r] * D, vector(plan_.final_norm), normed_ + r * D, plan_.hidden, plan_.norm_eps);
    if (quantised(plan_.head)) kernels_.quantise(normed_ + r * D, normed_int8_.row(r), normed_int8_.per_row);
  }
  team_.barrier();
}

// Logits of up to kHeadRows token rows.
void Model::head_rows(const std::vector<int64_t>& rows, float* logits_to, int rank, int size) {
  const int64_t D = padded(plan_.hidden), ld = padded(plan_.vocab), count = static_cast<int64_t>(rows.size());
  head_inputs(rows, rank, size);
  const Packed& w = packed_[plan_.head];
  const Range panels = share(w.panels(), rank, size);
  kernels_.matmul({&w, &normed_int8_, normed_, D, logits_to, ld}, 0, count, panels.begin, panels.end);
  if (plan_.final_softcap > 0)
    for (int64_t r = 0; r < count; r++)
      kernels_.softcap(logits_to + r * ld + panels.begin * kPanelRows, plan_.final_softcap,
                       (panels.end - panels.begin) * kPanelRows);
  team_.barrier();
}

// log sum exp of each row of logits_, from fixed pieces of the vocabulary added in order; NaN where a logit is not
// finite.
void Model::log_normaliser(int64_t count, int rank, int size) {
  const int64_t V = plan_.vocab, ld = padded(V), chunks = (V + kVocabChunk - 1) / kVocabChunk;
  const Range mine = share(count * chunks, rank, size);
  auto piece = [&](int64_t i) { return logits_ + i / chunks * ld + i % chunks * kVocabChunk; };
  auto width = [&](int64_t i) { return std::min(kVocabChunk, V - i % chunks * kVocabChunk); };
  for (int64_t i = mine.begin; i < mine.end; i++) chunk_extents_[i] = kernels_.largest(piece(i), width(i));
  team_.barrier();
  if (rank == 0)
    for (int64_t r = 0; r < count; r++) {
      Extent best{-INFINITY, -1};
      for (int64_t c = 0; c < chunks; c++) {
        const Extent& e = chunk_extents_[r * chunks + c];
        if (e.arg >= 0 && (best.arg < 0 || e.max > best.max)) best = {e.max, c * kVocabChunk + e.arg};
      }
      row_largest_[r] = best;
    }
  team_.barrier();
  for (int64_t i = mine.begin; i < mine.end; i++)
    chunk_sums_[i] = all_finite(piece(i), width(i)) ? kernels_.sum_exp(piece(i), width(i), row_largest_[i / chunks].max)
                                                    : std::numeric_limits<double>::quiet_NaN();
  team_.barrier();
  if (rank == 0)
    for (int64_t r = 0; r < count; r++) {
      double sum = 0;
      for (int64_t c = 0; c < chunks; c++) sum += chunk_sums_[r * chunks + c];
      row_log_sum_[r] = static_cast<double>(row_largest_[r].max) + std::log(sum);
    }
  team_.barrier();
}

template <class Each>
std::string Model::with_logits(const StepInput& input, const std::vector<int64_t>& rows, Each each) {
  const std::lock_guard<std::mutex> lock(step_mutex_);
  if (std::string e = prepare(input); !e.empty()) return e;
  const int64_t chunks = (plan_.vocab + kVocabChunk - 1) / kVocabChunk;
  chunk_sums_.resize(static_cast<size_t>(kHeadRows * chunks));
  chunk_extents_.resize(static_cast<size_t>(kHeadRows * chunks));
  row_largest_.resize(kHeadRows), row_log_sum_.resize(kHeadRows);
  std::vector<std::vector<int64_t>> groups;
  for (size_t i = 0; i < rows.size(); i += kHeadRows)
    groups.emplace_back(rows.begin() + static_cast<std::ptrdiff_t>(i),
                        rows.begin() + static_cast<std::ptrdiff_t>(std::min<size_t>(i + kHeadRows, rows.size())));
  auto run = [&](int rank, int size) {
    forward(rank, size);
    int64_t first = 0;
    for (const auto& group : groups) {
      head_rows(group, logits_, rank, size);
      each(first, static_cast<int64_t>(group.size()), rank, size);
      team_.barrier();
      first += static_cast<int64_t>(group.size());
    }
  };
  team_.run(run);
  return damaged_.load(std::memory_order_relaxed) ? kNotNumbers : std::string();
}

namespace {

std::string chosen(const std::vector<SampleRequest>& wanted, const std::vector<SampleOutput>& out) {
  for (size_t i = 0; i < out.size(); i++)
    if (out[i].token < 0 || (wanted[i].logprob && !std::isfinite(out[i].logprob))) return kNotNumbers;
  return {};
}

}  // namespace

std::string Model::step(const StepInput& input, const std::vector<SampleRequest>& wanted,
                        std::vector<SampleOutput>& out) {
  std::vector<int64_t> rows;
  for (const SampleRequest& w : wanted) {
    if (w.sequence < 0 || w.sequence >= input.sequences || w.top < 0 || w.top > 1024) return "bad sampling request";
    rows.push_back(input.starts[w.sequence + 1] - 1);
  }
  out.assign(wanted.size(), {});
  const int64_t V = plan_.vocab, ld = padded(V);
  std::unique_lock<std::mutex> lock(step_mutex_);  // a screen may be attached at any time
  if (can_screen(wanted) && screen_pause_-- <= 0) {
    screen_pause_ = 0;
    if (std::string e = prepare(input); !e.empty()) return e;
    size_screen(wanted.size());
    auto run = [&](int rank, int size) {
      forward(rank, size);
      head_inputs(rows, rank, size);
      screen_rows(wanted, rank, size);
      for (size_t r = static_cast<size_t>(rank); r < wanted.size(); r += static_cast<size_t>(size)) {
        out[r].token = choose_screened(r, wanted[r].params);
        out[r].logprob = std::numeric_limits<float>::quiet_NaN();
      }
    };
    team_.run(run);
    weigh_screen(wanted.size());
    return damaged_.load(std::memory_order_relaxed) ? kNotNumbers : chosen(wanted, out);
  }
  lock.unlock();
  std::string e = with_logits(input, rows, [&](int64_t first, int64_t count, int rank, int size) {
    log_normaliser(count, rank, size);
    for (int64_t r = rank; r < count; r += size) {
      const SampleRequest& w = wanted[first + r];
      SampleOutput& o = out[first + r];
      float* row = logits_ + r * ld;
      if (std::isnan(row_log_sum_[r])) continue;
      auto logprob = [&](int32_t id) { return static_cast<float>(static_cast<double>(row[id]) - row_log_sum_[r]); };
      if (w.top > 0) {
        o.top_ids.resize(static_cast<size_t>(std::min(w.top, V)));
        o.top_ids.resize(static_cast<size_t>(largest_ids(row, V, w.top, o.top_ids.data())));
        for (int32_t id : o.top_ids) o.top_logprobs.push_back(logprob(id));
      }
      const bool changes = w.params.bias_count > 0 || w.params.repetition_penalty != 1 ||
                           w.params.presence_penalty != 0 || w.params.frequency_penalty != 0;
      if (!changes) {
        const bool greedy = w.params.temperature <= 0 || w.params.top_k == 1;
        o.token = greedy ? static_cast<int32_t>(row_largest_[r].arg) : choose(row, V, w.params, kernels_);
        if (o.token >= 0) o.logprob = logprob(o.token);
      } else {
        std::vector<float> changed(row, row + V);
        o.token = choose(changed.data(), V, w.params, kernels_);
        if (o.token >= 0) o.logprob = logprob(o.token);
      }
    }
  });
  return e.empty() ? chosen(wanted, out) : e;
}

std::string Model::logits(const StepInput& input, float* to) {
  std::vector<int64_t> rows(static_cast<size_t>(std::max<int64_t>(input.tokens, 0)));
  for (size_t i = 0; i < rows.size(); i++) rows[i] = static_cast<int64_t>(i);
  const int64_t V = plan_.vocab, ld = padded(V);
  return with_logits(input, rows, [&](int64_t first, int64_t count, int rank, int size) {
    const Range mine = share(count, rank, size);
    for (int64_t r = mine.begin; r < mine.end; r++)
      std::copy(logits_ + r * ld, logits_ + r * ld + V, to + (first + r) * V);
  });
}

std::string Model::score(const StepInput& input, const int32_t* targets, float* to) {
  std::vector<int64_t> rows;
  for (int64_t t = 0; t < input.tokens; t++) {
    if (targets[t] < -1 || targets[t] >= plan_.vocab) return "a target id is not in the vocabulary";
    to[t] = 0;
    if (targets[t] >= 0) rows.push_back(t);
  }
  const int64_t ld = padded(plan_.vocab);
  return with_logits(input, rows, [&](int64_t first, int64_t count, int rank, int size) {
    log_normaliser(count, rank, size);
    if (rank == 0)
      for (int64_t r = 0; r < count; r++) {
        const int64_t t = rows[first + r];
        to[t] = static_cast<float>(static_cast<double>(logits_[r * ld + targets[t]]) - row_log_sum_[r]);
      }
  });
}

std::string Model::hidden(const StepInput& input, float* to) {
  const std::lock_guard<std::mutex> lock(step_mutex_);
  return hidden_locked(input, to);
}

std::string Model::hidden_locked(const StepInput& input, float* to) {
  if (std::string e = prepare(input); !e.empty()) return e;
  const int64_t D = plan_.hidden;
  auto run = [&](int rank, int size) {
    forward(rank, size);
    const Range mine = share(input_.tokens, rank, size);
    for (int64_t t = mine.begin; t < mine.end; t++)
      kernels_.rms_norm(x_ + t * padded(D), vector(plan_.final_norm), to + t * D, D, plan_.norm_eps);
  };
  team_.run(run);
  return damaged_.load(std::memory_order_relaxed) ? kNotNumbers : std::string();
}

}  // namespace gemkit
