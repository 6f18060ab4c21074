// Choosing a token from one row of logits. The order of operations and the arithmetic are those of
// gemkit.engine.sampling, whose NumPy sampler is the oracle.
#pragma once
#include <cstdint>
#include <vector>

#include "kernels/kernels.h"

namespace gemkit {

struct SamplingParams {
  double temperature = 0;  // 0: the largest logit, lowest id first
  double top_p = 1, min_p = 0;
  double repetition_penalty = 1, presence_penalty = 0, frequency_penalty = 0;
  int64_t top_k = 0;  // 0: all
  uint64_t seed = 0;
  int64_t counter = 0;  // number of the draw
  const int32_t* bias_ids = nullptr;
  const float* bias_values = nullptr;
  int64_t bias_count = 0;
  const int32_t* history = nullptr;  // ids so far, prompt first
  int64_t history_length = 0, prompt_length = 0;

  bool greedy() const { return temperature <= 0 || top_k == 1; }
  bool penalises() const { return repetition_penalty != 1 || presence_penalty != 0 || frequency_penalty != 0; }
  bool changes_logits() const { return bias_count > 0 || penalises(); }
};

// A token to draw after the last new token of a sequence.
struct SampleRequest {
  int64_t sequence = 0;
  int64_t top = 0;      // how many of the most probable tokens to report
  bool logprob = true;  // whether to report the token's log-probability, which takes the whole vocabulary
  SamplingParams params;
};

struct SampleOutput {
  int32_t token = -1;
  float logprob = 0;
  std::vector<int32_t> top_ids;
  std::vector<float> top_logprobs;
};

// The chosen id; changes `logits`. -1 when no logit is a number.
int32_t choose(float* logits, int64_t vocab, const SamplingParams& params, const Kernels& kernels);

// The same where only some panels of sixteen logits are known, ascending and without duplicates, and the others cannot
// be chosen. Ids whose logits the parameters change must be among them.
int32_t choose_among(float* logits, int64_t vocab, const std::vector<int32_t>& panels, const SamplingParams& params,
                     const Kernels& kernels);

// The n largest logits, larger first, lower id first among equals; fewer than n only if vocab < n.
int64_t largest_ids(const float* logits, int64_t vocab, int64_t n, int32_t* ids);

}  // namespace gemkit
