// A loaded model: packed weights, the paged key-value cache, a team of threads, and the forward step.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "os.h"
#include "plan.h"
#include "sample.h"
#include "threads.h"

namespace gemkit {

constexpr int64_t kHeadRows = 32;  // rows of logits held at a time

struct Options {
  int threads = 1;
  bool float_activations = false;  // weights dequantised to float32, float activations and cache: for parity, slow
  int64_t max_tokens = 512;        // new tokens in one step, all sequences together
};

// New tokens of several sequences in one step.
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
  std::vector<Table> tables;  // one per cache group
};

struct SampleOutput {
  int32_t token = -1;
  float logprob = 0;
  std::vector<int32_t> top_ids;
  std::vector<float> top_logprobs;
};

// Wanted of a sequence's last new token.
struct SampleRequest {
  int64_t sequence = 0;
  int64_t top = 0;  // how many of the most probable tokens to report
  SamplingParams params;
};

class Model {
 public:
  // Null with a message in `error` when the plan is unsound or memory is short.
  static std::unique_ptr<Model> create(const ModelPlan& plan, const Options& options, const Kernels& kernels,
                                       std::string& error);

  // Pages of group `group` become at least `pages`; what is cached stays. Returns an error or nothing.
  std::string reserve(int64_t group, int64_t pages);
  int64_t page_bytes(int64_t group) const { return groups_[group].page_bytes; }
  int64_t weight_bytes() const { return weight_bytes_; }
  int64_t scratch_bytes() const { return scratch_bytes_; }
  int64_t max_tokens() const { return options_.max_tokens; }
  const ModelPlan& plan() const { return plan_; }
  const char* path() const { return kernels_.name; }

  // Each runs one forward step and returns an error or nothing.
  std::string step(const StepInput& input, const std::vector<SampleRequest>& wanted, std::vector<SampleOutput>& out);
  std::string logits(const StepInput& input, float* out);  // [tokens][vocab]
  std::string score(const StepInput& input, const int32_t* targets,
                    float* out);                           // log-probability of targets[t] after t; -1: 0
  std::string hidden(const StepInput& input, float* out);  // [tokens][hidden], after the final norm

 private:
  struct Group {
    int64_t window = 0, layers = 0, page_bytes = 0;
    std::vector<uint8_t*> pages;
    std::vector<Arena> slabs;
  };
  struct Adapter {
    int32_t adapter, tensor;
    const Packed *a, *b;
    float scale;
  };

  Model(const ModelPlan& plan, const Options& options, const Kernels& kernels);
  std::string load();
  std::string allocate_scratch();
  std::string check(const StepInput& input);
  std::string prepare(const StepInput& input);
  void head_rows(const std::vector<int64_t>& rows, float* logits_to, int rank, int size);

  void forward(int rank, int size);
  void embed(Range tokens);
  void rotate_and_cache(const LayerPlan& layer, int64_t layer_in_group, Range tokens);
  void attend(const LayerPlan& layer, int64_t layer_in_group, int rank, int size);
  void add_residual(int32_t norm, const float* y, int64_t ld, Range tokens);
  void normalise(int32_t norm, bool quantise, Range tokens);
  void product(int32_t tensor, const float* x, int64_t ldx, const Activations& a, float* y, int64_t ldy, int rank,
               int size);
  bool quantised(int32_t tensor) const { return packed_[tensor].format->quantised(); }
  const float* vector(int32_t tensor) const { return vectors_[tensor].data(); }
  // Runs forward, then the head over `rows` in groups, calling each(first, count) with logits ready in logits_.
  template <class Each>
  std::string with_logits(const StepInput& input, const std::vector<int64_t>& rows, Each each);
  void log_normaliser(int64_t count, int rank, int size);

  ModelPlan plan_;
  Options options_;
  const Kernels& kernels_;
  Team team_;
  std::vector<Packed> packed_;
  Arena weights_;
  std::vector<std::vector<float>> vectors_;
  std::vector<Adapter> adapters_;
  std::vector<Group> groups_;
  std::vector<int64_t> layer_in_group_;
  int64_t weight_bytes_ = 0, scratch_bytes_ = 0;

  // Scratch of one step; sizes follow options_.max_tokens.
  Arena scratch_;
  float *x_ = nullptr, *normed_ = nullptr, *y_ = nullptr, *q_ = nullptr, *k_ = nullptr, *v_ = nullptr,
        *attended_ = nullptr, *gate_ = nullptr, *up_ = nullptr, *cosine_ = nullptr, *sine_ = nullptr,
        *logits_ = nullptr;
  Activations normed_int8_, attended_int8_, gate_int8_;
  std::vector<Arena> scores_;    // per thread
  std::vector<Arena> low_rank_;  // per thread, adapters only
  int64_t scores_stride_ = 0;
  std::vector<float> inverse_frequencies_;  // [ropes][head_dim / 2]
  std::vector<double> chunk_sums_;
  std::vector<Extent> chunk_extents_;
  std::vector<Extent> row_largest_;
  std::vector<double> row_log_sum_;

  // The step being run.
  StepInput input_;
  std::vector<int32_t> token_sequence_;             // [tokens]
  std::vector<std::vector<const uint8_t*>> pages_;  // [group] pointers [sequences][table width]
};

}  // namespace gemkit
