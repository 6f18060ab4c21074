// Buffers of one step, allocated once for the largest step: activations, logits, and their sums.
#pragma once
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "os.h"
#include "plan.h"

namespace gemkit {

constexpr int64_t kHeadRows = 32;       // rows of logits held at a time
constexpr int64_t kVocabChunk = 8192;   // logits summed as one piece
constexpr int64_t kLowRankTokens = 32;  // that an adapter's products take at a time

// Rows of `ld` floats, and their int8 form where a quantised product reads them.
struct Rows {
  float* data = nullptr;
  int64_t ld = 0;
  Activations int8;
  float* row(int64_t r) const { return data + r * ld; }
};

struct Scratch {
  Rows x, normed, y;                               // [T][D]: the residual stream, its norm, a product
  Rows q, k, v;                                    // [T][heads · H]
  Rows attention;                                  // [T][N · H]
  Rows gate, up;                                   // [T][F]
  Rows cosine, sine;                               // [ropes · T][H / 2]
  Rows logits;                                     // [kHeadRows][V]
  std::vector<Extent> chunk_largest, row_largest;  // of logits, by chunk of the vocabulary and by row
  std::vector<double> chunk_sums, log_sum_exps;
  std::vector<Arena> low_rank;  // by thread; adapters only
  Arena arena;
  int64_t bytes = 0;  // of the arena
};

// For steps of up to max_tokens tokens. Returns an error or nothing.
std::string allocate_scratch(const ModelPlan& plan, int64_t max_tokens, int threads, Scratch& scratch);

}  // namespace gemkit
