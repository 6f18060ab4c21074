// One forward step: its input, the state that its threads share, and the layers.
#pragma once
#include <atomic>
#include <cstring>
#include <string>
#include <vector>

#include "cache.h"
#include "scratch.h"
#include "weights.h"

namespace gemkit {

constexpr const char* kNotNumbers =
    "the model produced logits that are not numbers; the weights are damaged or out of range";

// New tokens of several sequences.
struct StepInput {
  int64_t sequences = 0, tokens = 0;
  const int32_t* ids = nullptr;        // [tokens], sequence after sequence
  const int32_t* starts = nullptr;     // [sequences + 1] into ids
  const int32_t* positions = nullptr;  // [sequences] of each first new token
  const int32_t* adapters = nullptr;   // [sequences], -1: none; may be null
  struct Table {
    const int32_t* pages = nullptr;  // [sequences][width] page of position / kPagePositions; -1: none
    int64_t width = 0;
  };
  std::vector<Table> tables{};  // one per cache group

  int64_t count(int64_t sequence) const { return starts[sequence + 1] - starts[sequence]; }
};

// Parts of a layer that have a work queue each.
enum Phase : size_t { kQueries, kAttention, kOutput, kGate, kDown, kPhases };

struct Step {
  const ModelPlan& plan;
  const Kernels& kernels;
  const Weights& weights;
  const Cache& cache;
  Scratch& scratch;

  StepInput input{};
  std::atomic<bool> damaged{false};                  // a key or value is not finite, which rounding to f16 would hide
  bool dynamic = false;                              // threads take work from the queues, instead of equal shares
  std::vector<WorkQueue> queues{};                   // by layer and phase
  std::vector<int32_t> token_sequence{};             // [tokens]
  std::vector<std::vector<const uint8_t*>> pages{};  // by cache group: [sequences][table width]
  bool split_by_pages = false;                       // attention; otherwise blocks of queries
  std::vector<PartialAttention> partials{};          // split by pages: [sequence][kv head][page][query]
  Arena partial_outs{};

  WorkQueue& queue(size_t layer, Phase phase) { return queues[layer * kPhases + phase]; }
  int64_t position(int64_t token) const {
    const int32_t s = token_sequence[token];
    return input.positions[s] + (token - input.starts[s]);
  }
};

// Checks the input and prepares its step on `threads` threads. Returns an error or nothing.
std::string begin_step(Step& step, const StepInput& input, int64_t max_tokens, int threads);

// Runs all layers on all threads of a team: leaves the residual stream in scratch.x, final norm not yet applied.
void forward(Step& step, const Worker& worker);

// In attention.cc: decides whether this step's attention is split by pages, and allocates the partial sums. Returns an
// error or nothing.
std::string begin_attention(Step& step, int threads);

// q and k: norm, rotation, query scale; k and v into their page.
void rotate_and_cache(Step& step, size_t layer, const Worker& worker);

// Attention of all queries to the cache, and its int8 form where the next product reads that.
void attend(Step& step, size_t layer, const Worker& worker);

// A NaN or an infinity has all exponent bits set. Works on the bits, so that the compiler may vectorise it.
inline bool all_finite(const float* x, int64_t n) {
  uint32_t wrong = 0;
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    wrong |= static_cast<uint32_t>((bits & 0x7f800000) == 0x7f800000);
  }
  return !wrong;
}

}  // namespace gemkit
