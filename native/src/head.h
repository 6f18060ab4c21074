// The head: logits of chosen rows, their log-sum-exp, and tokens drawn from them.
#pragma once
#include "sample.h"
#include "step.h"

namespace gemkit {

// Logits of head inputs [m0, m1) for some panels of the vocabulary, soft-capped, into scratch.logits.
void head_product(const Step& step, int64_t m0, int64_t m1, Range panels);

// Final norms of up to kHeadRows tokens, by index, into the first rows of scratch.normed.
void head_inputs(const Step& step, const int64_t* tokens, int64_t count, const Worker& worker);

// Log-sum-exp of each of `count` rows of logits, from fixed pieces of the vocabulary added in order, and the largest
// logit; NaN where a logit is not finite.
void log_sum_exp(const Step& step, int64_t count, const Worker& worker);

// Log-probability of a token in row r, whose log-sum-exp is known.
float log_probability(const Step& step, int64_t r, int32_t id);

// Draws a token from row r, whose log-sum-exp is known; leaves token -1 where a logit is not finite.
void sample_row(const Step& step, int64_t r, const SampleRequest& request, SampleOutput& out);

}  // namespace gemkit
