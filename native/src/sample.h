// Choosing a token from one row of logits. The order of operations and the arithmetic are those of
// gemkit.engine.sampling, whose NumPy sampler is the oracle.
#pragma once
#include <cstdint>
#include <vector>

#include "kernels/kernels.h"

namespace gemkit {

// One record of the array that Python calls SAMPLING (gemkit.engine.sampling), by the same names; module.cc checks it.
struct SamplingRecord {
  int64_t row = 0, draws = 0;  // index of the sequence in the step; draws after its last new tokens
  int64_t counter = 0;         // number of the draw
  int64_t prompt_length = 0;
  int64_t history_start = 0, history_end = 0, bias_start = 0, bias_end = 0;
  int64_t top_k = 0;     // 0: all
  int64_t logprobs = 0;  // how many of the most probable tokens to report; -1: no log-probability at all
  uint64_t seed = 0;
  double temperature = 0;  // 0: the largest logit, lowest id first
  double top_p = 1, min_p = 0;
  double repetition_penalty = 1, presence_penalty = 0, frequency_penalty = 0;
};

struct SamplingParams : SamplingRecord {
  const int32_t* bias_ids = nullptr;
  const float* bias_values = nullptr;
  int64_t bias_count = 0;
  const int32_t* history = nullptr;  // ids so far, prompt first
  int64_t history_length = 0;
  const uint32_t* mask = nullptr;  // bit i % 32 of word i / 32 allows id i; null: all are allowed

  bool greedy() const { return temperature <= 0 || top_k == 1; }
  bool penalises() const { return repetition_penalty != 1 || presence_penalty != 0 || frequency_penalty != 0; }
  bool changes_logits() const { return bias_count > 0 || mask || penalises(); }
};

// A token to draw after one of the new tokens of a step. Log-probabilities are those of the unchanged logits.
struct SampleRequest {
  int64_t token = 0;  // index in the step
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
