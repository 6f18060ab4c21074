// The layers. Every thread runs the same functions over its share of tokens (norms, caches), of weight rows (products)
// or of queries (attention); the summed dimension is never divided, so the thread count cannot change a bit.
//
// T new tokens of all sequences, D width, N query heads, K kv heads, H head width, F ffn width.
#include "step.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>

namespace gemkit {
namespace {

constexpr int64_t kDynamicTokens = 16;  // a step of fewer reads more than it computes: equal shares read best
constexpr int64_t kSmallestPanels = 2;  // of a piece of a product: every piece passes over all activations

std::string check(const Step& step, const StepInput& in, int64_t max_tokens) {
  const std::vector<CacheGroup>& groups = step.cache.groups;
  const int64_t context = step.plan.context, vocab = step.plan.vocab;
  if (in.tokens < 1 || in.tokens > max_tokens)
    return "a step takes between 1 and " + std::to_string(max_tokens) + " tokens";
  if (in.sequences < 1 || in.sequences > in.tokens) return "every sequence of a step needs at least one token";
  if (in.tables.size() != groups.size()) return "one page table per cache group is needed";
  if (in.starts[0] != 0 || in.starts[in.sequences] != in.tokens) return "starts do not span the tokens";
  for (int64_t s = 0; s < in.sequences; s++) {
    const int64_t first = in.positions[s], last = first + in.count(s) - 1;
    if (last < first) return "every sequence of a step needs at least one token";
    if (first < 0 || last >= context)
      return "position " + std::to_string(last) + " is past the context of " + std::to_string(context) + " tokens";
    for (size_t g = 0; g < groups.size(); g++) {
      const Range visible = groups[g].visible_pages(first, last);
      for (int64_t page = visible.begin; page < visible.end; page++) {
        if (page >= in.tables[g].width) return "a page table is too short";
        const int32_t id = in.tables[g].pages[s * in.tables[g].width + page];
        if (id < 0 || id >= groups[g].reserved) return "a page table names no page for a visible position";
      }
    }
  }
  for (int64_t t = 0; t < in.tokens; t++)
    if (in.ids[t] < 0 || in.ids[t] >= vocab)
      return "token id " + std::to_string(in.ids[t]) + " is not in the vocabulary of " + std::to_string(vocab);
  return {};
}

// x = scale · embedding; the rotation angles of the tokens' positions.
void embed(const Step& s, Range tokens) {
  const int64_t D = s.plan.hidden, H = s.plan.head_dim, half = H / 2;
  for (int64_t t = tokens.begin; t < tokens.end; t++) {
    unpack_row(s.weights.matrix(s.plan.embed), s.input.ids[t], s.scratch.x.row(t));
    s.kernels.scale(s.scratch.x.row(t), s.plan.embed_scale, D);
    const float position = static_cast<float>(s.position(t));
    for (size_t r = 0; r < s.plan.ropes.size(); r++) {
      const int64_t row = static_cast<int64_t>(r) * s.input.tokens + t;
      for (int64_t i = 0; i < half; i++) {
        const double angle = static_cast<double>(position * s.weights.inverse_frequencies[r * half + i]);
        s.scratch.cosine.row(row)[i] = static_cast<float>(std::cos(angle));
        s.scratch.sine.row(row)[i] = static_cast<float>(std::sin(angle));
      }
    }
  }
}

// normed = norm(x), in int8 too if one of the matrices that read it is quantised.
void normalise(const Step& s, int32_t norm, std::initializer_list<int32_t> readers, Range tokens) {
  const Rows &x = s.scratch.x, &to = s.scratch.normed;
  const bool int8 = std::any_of(readers.begin(), readers.end(), [&](int32_t w) { return s.weights.quantised(w); });
  for (int64_t t = tokens.begin; t < tokens.end; t++) {
    s.kernels.rms_norm(x.row(t), s.weights.vector(norm), to.row(t), s.plan.hidden, s.plan.norm_eps);
    if (int8) s.kernels.quantise(to.row(t), to.int8.row(t), to.int8.per_row);
  }
}

// x += y, or norm(y) where the layer has such a norm.
void add_residual(const Step& s, int32_t norm, Range tokens) {
  for (int64_t t = tokens.begin; t < tokens.end; t++) {
    const float* addend = s.scratch.y.row(t);
    if (norm >= 0) {
      float* normed = s.scratch.normed.row(t);
      s.kernels.rms_norm(addend, s.weights.vector(norm), normed, s.plan.hidden, s.plan.norm_eps);
      addend = normed;
    }
    s.kernels.add(s.scratch.x.row(t), addend, s.plan.hidden);
  }
}

// Adds to[t] += scale · from[t]·a·b of each token's adapter to w's products in some panels; DoRA scales the rows.
void add_adapters(const Step& s, int32_t tensor, const Rows& from, const Rows& to, Range panels, int rank) {
  auto adapter = [&](int64_t t) { return s.input.adapters[s.token_sequence[static_cast<size_t>(t)]]; };
  const int64_t first = panels.begin * kPanelRows, last = panels.end * kPanelRows;
  for (const size_t i : s.weights.parts[static_cast<size_t>(tensor)]) {
    const AdapterPart& part = s.plan.adapters[i];
    const Packed &a = s.weights.matrix(part.a), &b = s.weights.matrix(part.b);
    const std::vector<float>& gains = s.weights.gains[i];
    const int64_t low_ld = padded(a.rows), high_ld = padded(b.rows);
    float *low = s.scratch.low_rank[rank].as<float>(), *high = low + kLowRankTokens * low_ld;
    for (int64_t t = 0, end; t < s.input.tokens; t = end) {
      end = t + 1;
      if (adapter(t) != part.adapter) continue;
      while (end < std::min(s.input.tokens, t + kLowRankTokens) && adapter(end) == part.adapter) end++;
      s.kernels.matmul({&a, nullptr, from.row(t), from.ld, low, low_ld}, 0, end - t, 0, a.panels());
      s.kernels.matmul({&b, nullptr, low, low_ld, high, high_ld}, 0, end - t, panels.begin, panels.end);
      for (int64_t m = t; m < end; m++) {
        float* y = to.row(m);
        for (int64_t n = first; n < last; n++) y[n] += part.scale * high[(m - t) * high_ld + n];
        for (int64_t n = first; n < last && !gains.empty(); n++) y[n] *= gains[static_cast<size_t>(n)];
      }
    }
  }
}

// to[t] = from[t]·w for all tokens and some panels of w, with the adapters of each token's sequence.
void product(const Step& s, int32_t tensor, const Rows& from, const Rows& to, Range panels, int rank) {
  if (panels.begin >= panels.end) return;
  s.kernels.matmul({&s.weights.matrix(tensor), &from.int8, from.data, from.ld, to.data, to.ld}, 0, s.input.tokens,
                   panels.begin, panels.end);
  if (s.input.adapters) add_adapters(s, tensor, from, to, panels, rank);
}

// Runs each(range) over [0, n) on all threads together.
template <class Each>
void parallel_for(Step& s, int64_t n, size_t layer, Phase phase, const Worker& w, Each each) {
  if (s.dynamic) return guided_for(s.queue(layer, phase), n, kSmallestPanels, w.size, each);
  each(w.share(n));
}

void project(Step& s, int32_t tensor, const Rows& from, const Rows& to, size_t layer, Phase phase, const Worker& w) {
  parallel_for(s, s.weights.matrix(tensor).panels(), layer, phase, w,
               [&](Range r) { product(s, tensor, from, to, r, w.rank); });
}

// q, k and v: equal shares of each, or one queue for the panels of all three.
void project_queries(Step& s, size_t layer, const Worker& w) {
  const LayerPlan& l = s.plan.layers[layer];
  const struct {
    int32_t tensor;
    const Rows& to;
  } parts[] = {{l.q_proj, s.scratch.q}, {l.k_proj, s.scratch.k}, {l.v_proj, s.scratch.v}};
  int64_t all = 0;
  for (const auto& part : parts) {
    const int64_t panels = s.weights.matrix(part.tensor).panels();
    if (!s.dynamic) product(s, part.tensor, s.scratch.normed, part.to, w.share(panels), w.rank);
    all += panels;
  }
  if (!s.dynamic) return;
  guided_for(s.queue(layer, kQueries), all, kSmallestPanels, w.size, [&](Range r) {
    int64_t first = 0;
    for (const auto& part : parts) {
      const int64_t panels = s.weights.matrix(part.tensor).panels();
      product(s, part.tensor, s.scratch.normed, part.to,
              {std::max(r.begin - first, int64_t{0}), std::min(r.end - first, panels)}, w.rank);
      first += panels;
    }
  });
}

// gate = gelu(gate·x) · (up·x), by pairs of panels, which are whole blocks of the next product.
void gated_ffn(Step& s, size_t layer, const Worker& w) {
  const LayerPlan& l = s.plan.layers[layer];
  const Rows &gate = s.scratch.gate, &up = s.scratch.up;
  constexpr int64_t kPair = kBlock / kPanelRows;
  const int64_t panels = s.weights.matrix(l.gate_proj).panels();
  parallel_for(s, (panels + kPair - 1) / kPair, layer, kGate, w, [&](Range pairs) {
    const Range r{kPair * pairs.begin, std::min(kPair * pairs.end, panels)};
    if (r.begin >= r.end) return;
    product(s, l.gate_proj, s.scratch.normed, gate, r, w.rank);
    product(s, l.up_proj, s.scratch.normed, up, r, w.rank);
    const int64_t first = r.begin * kPanelRows, count = (r.end - r.begin) * kPanelRows;
    for (int64_t t = 0; t < s.input.tokens; t++) {
      s.kernels.gelu_multiply(gate.row(t) + first, up.row(t) + first, count);
      if (s.weights.quantised(l.down_proj))
        s.kernels.quantise(gate.row(t) + first, gate.int8.row(t) + pairs.begin, pairs.end - pairs.begin);
    }
  });
}

}  // namespace

std::string begin_step(Step& s, const StepInput& in, int64_t max_tokens, int threads) {
  if (std::string e = check(s, in, max_tokens); !e.empty()) return e;
  s.input = in;
  // Cores differ, and may be taken away for a while. An adapter's first product would be repeated for each piece.
  s.dynamic = threads > 1 && in.tokens >= kDynamicTokens && !in.adapters;
  s.damaged.store(false, std::memory_order_relaxed);
  for (WorkQueue& queue : s.queues) queue.store(0, std::memory_order_relaxed);
  s.token_sequence.resize(static_cast<size_t>(in.tokens));
  for (int64_t i = 0; i < in.sequences; i++)
    std::fill(s.token_sequence.begin() + in.starts[i], s.token_sequence.begin() + in.starts[i + 1],
              static_cast<int32_t>(i));
  s.pages.resize(in.tables.size());
  for (size_t g = 0; g < in.tables.size(); g++) {
    const CacheGroup& group = s.cache.groups[g];
    const StepInput::Table& table = in.tables[g];
    s.pages[g].assign(static_cast<size_t>(in.sequences * table.width), nullptr);
    for (size_t i = 0; i < s.pages[g].size(); i++)
      if (const int32_t id = table.pages[i]; id >= 0 && id < group.reserved) s.pages[g][i] = group.pages[id];
  }
  return begin_attention(s, threads);
}

void forward(Step& s, const Worker& w) {
  Scratch& b = s.scratch;
  const Range mine = w.share(s.input.tokens);
  embed(s, mine);
  for (size_t i = 0; i < s.plan.layers.size(); i++) {
    const LayerPlan& l = s.plan.layers[i];
    normalise(s, l.input_norm, {l.q_proj, l.k_proj, l.v_proj}, mine);
    w.barrier();
    project_queries(s, i, w);
    w.barrier();
    rotate_and_cache(s, i, w);
    w.barrier();
    attend(s, i, w);
    w.barrier();
    project(s, l.o_proj, b.attention, b.y, i, kOutput, w);
    w.barrier();
    add_residual(s, l.post_attention_norm, mine);
    normalise(s, l.pre_ffn_norm, {l.gate_proj, l.up_proj}, mine);
    w.barrier();
    gated_ffn(s, i, w);
    w.barrier();
    project(s, l.down_proj, b.gate, b.y, i, kDown, w);
    w.barrier();
    add_residual(s, l.post_ffn_norm, mine);
  }
  w.barrier();
}

}  // namespace gemkit
