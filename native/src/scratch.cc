// Memory of the buffers of a step.
#include "scratch.h"

#include <algorithm>
#include <type_traits>

namespace gemkit {

std::string allocate_scratch(const ModelPlan& p, int64_t T, int threads, Scratch& s) {
  const int64_t ropes = static_cast<int64_t>(p.ropes.size()), q_width = p.heads * p.head_dim;
  auto place = [&](auto*& to, int64_t bytes) {
    if (s.arena.data) to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(s.arena.data + s.bytes);
    s.bytes += whole_lines(bytes);
  };
  auto floats = [&](Rows& rows, int64_t count, int64_t width) {
    rows.ld = width;
    place(rows.data, count * width * static_cast<int64_t>(sizeof(float)));
  };
  auto int8 = [&](Rows& rows, int64_t width) {
    rows.int8.per_row = width / kBlock;
    place(rows.int8.blocks, (T + kHeadRows) * rows.int8.per_row * static_cast<int64_t>(sizeof(ActivationBlock)));
  };
  auto lay_out = [&] {
    s.bytes = 0;
    floats(s.x, T, padded(p.hidden)), floats(s.normed, std::max(T, kHeadRows), padded(p.hidden));
    floats(s.y, T, padded(p.hidden));
    floats(s.q, T, padded(q_width)), floats(s.attention, T, padded(q_width));
    for (Rows* rows : {&s.k, &s.v}) floats(*rows, T, padded(p.kv_heads * p.head_dim));
    for (Rows* rows : {&s.gate, &s.up}) floats(*rows, T, padded(p.ffn));
    for (Rows* rows : {&s.cosine, &s.sine}) floats(*rows, ropes * T, p.head_dim / 2);
    floats(s.logits, kHeadRows, padded(p.vocab));
    int8(s.normed, p.hidden), int8(s.attention, q_width), int8(s.gate, p.ffn);
  };
  lay_out();  // counts the bytes
  if (!s.arena.allocate(static_cast<size_t>(s.bytes))) return out_of_memory("the activations", s.bytes);
  lay_out();
  const size_t sums = static_cast<size_t>(kHeadRows * ((p.vocab + kVocabChunk - 1) / kVocabChunk));
  s.chunk_largest.resize(sums), s.chunk_sums.resize(sums);
  s.row_largest.resize(kHeadRows), s.log_sum_exps.resize(kHeadRows);
  int64_t widest = 0;
  for (const AdapterPart& a : p.adapters)
    widest = std::max(widest, padded(p.tensors[a.a].rows) + padded(p.tensors[a.b].rows));
  s.low_rank.resize(static_cast<size_t>(threads));
  for (Arena& a : s.low_rank)
    if (widest && !a.allocate(static_cast<size_t>(kLowRankTokens * widest) * sizeof(float)))
      return out_of_memory("adapters", kLowRankTokens * widest * 4);
  return {};
}

}  // namespace gemkit
