// Every row of logits is held whole; the vocabulary is divided among threads.
#include "head.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace gemkit {

void head_product(const Step& s, int64_t m0, int64_t m1, Range panels) {
  const Packed& head = s.weights.matrix(s.plan.head);
  const Rows &from = s.scratch.normed, &to = s.scratch.logits;
  s.kernels.matmul({&head, &from.int8, from.data, from.ld, to.data, to.ld}, m0, m1, panels.begin, panels.end);
  for (int64_t m = m0; s.plan.final_softcap > 0 && m < m1; m++)
    s.kernels.softcap(to.row(m) + panels.begin * kPanelRows, s.plan.final_softcap,
                      (panels.end - panels.begin) * kPanelRows);
}

void head_inputs(const Step& s, const int64_t* tokens, int64_t count, const Worker& w) {
  const Rows& to = s.scratch.normed;
  const Range mine = w.share(count);
  for (int64_t r = mine.begin; r < mine.end; r++) {
    s.kernels.rms_norm(s.scratch.x.row(tokens[r]), s.weights.vector(s.plan.final_norm), to.row(r), s.plan.hidden,
                       s.plan.norm_eps);
    if (s.weights.quantised(s.plan.head)) s.kernels.quantise(to.row(r), to.int8.row(r), to.int8.per_row);
  }
  w.barrier();
}

void log_sum_exp(const Step& s, int64_t count, const Worker& w) {
  const int64_t V = s.plan.vocab, chunks = (V + kVocabChunk - 1) / kVocabChunk;
  Scratch& b = s.scratch;
  const Range mine = w.share(count * chunks);
  auto piece = [&](int64_t i) { return b.logits.row(i / chunks) + i % chunks * kVocabChunk; };
  auto width = [&](int64_t i) { return std::min(kVocabChunk, V - i % chunks * kVocabChunk); };
  for (int64_t i = mine.begin; i < mine.end; i++) b.chunk_largest[i] = s.kernels.largest(piece(i), width(i));
  w.barrier();
  for (int64_t r = 0; w.rank == 0 && r < count; r++) {
    Extent best{-INFINITY, -1};
    for (int64_t c = 0; c < chunks; c++) {
      const Extent& e = b.chunk_largest[r * chunks + c];
      if (e.arg >= 0 && (best.arg < 0 || e.max > best.max)) best = {e.max, c * kVocabChunk + e.arg};
    }
    b.row_largest[r] = best;
  }
  w.barrier();
  for (int64_t i = mine.begin; i < mine.end; i++)
    b.chunk_sums[i] = all_finite(piece(i), width(i))
                          ? s.kernels.sum_exp(piece(i), width(i), b.row_largest[i / chunks].max)
                          : std::numeric_limits<double>::quiet_NaN();
  w.barrier();
  for (int64_t r = 0; w.rank == 0 && r < count; r++) {
    double sum = 0;
    for (int64_t c = 0; c < chunks; c++) sum += b.chunk_sums[r * chunks + c];
    b.log_sum_exps[r] = static_cast<double>(b.row_largest[r].max) + std::log(sum);
  }
  w.barrier();
}

float log_probability(const Step& s, int64_t r, int32_t id) {
  return static_cast<float>(static_cast<double>(s.scratch.logits.row(r)[id]) - s.scratch.log_sum_exps[r]);
}

void sample_row(const Step& s, int64_t r, const SampleRequest& request, SampleOutput& out) {
  const int64_t V = s.plan.vocab;
  const SamplingParams& p = request.params;
  float* row = s.scratch.logits.row(r);
  if (std::isnan(s.scratch.log_sum_exps[r])) return;
  if (p.logprobs > 0) {
    out.top_ids.resize(static_cast<size_t>(std::min(p.logprobs, V)));
    out.top_ids.resize(static_cast<size_t>(largest_ids(row, V, p.logprobs, out.top_ids.data())));
    for (int32_t id : out.top_ids) out.top_logprobs.push_back(log_probability(s, r, id));
  }
  if (p.changes_logits()) {
    std::vector<float> changed(row, row + V);
    out.token = choose(changed.data(), V, p, s.kernels);
  } else {
    out.token = p.greedy() ? static_cast<int32_t>(s.scratch.row_largest[r].arg) : choose(row, V, p, s.kernels);
  }
  if (out.token >= 0) out.logprob = log_probability(s, r, out.token);
}

}  // namespace gemkit
