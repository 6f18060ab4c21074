// A loaded model: packed weights, the paged key-value cache, a team of threads, and the forward step.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "os.h"
#include "plan.h"
#include "sample.h"
#include "screen.h"
#include "threads.h"

namespace gemkit {

constexpr int64_t kHeadRows = 32;      // rows of logits held at a time
constexpr size_t kScreenRows = 32;     // most sequences of a step whose head is screened
constexpr int64_t kScreenTop = 128;    // largest top-k that is
constexpr int64_t kBlockQueries = 48;  // queries that pass over a page together
constexpr int kImageVersion = 2;       // to be raised whenever the packed layout changes

// A NaN or an infinity has all exponent bits set. On the bits, so that the compiler may take whole vectors.
inline bool all_finite(const float* x, int64_t n) {
  uint32_t wrong = 0;
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    wrong |= static_cast<uint32_t>((bits & 0x7f800000) == 0x7f800000);
  }
  return !wrong;
}

struct Options {
  int threads = 1;
  bool float_activations = false;  // weights dequantised to float32, float activations and cache: for parity, slow
  int64_t max_tokens = 512;        // new tokens in one step, all sequences together
  // The matrices already packed, as Model::image() gave them; must outlive the model. Their plan entries need no data.
  const uint8_t* image = nullptr;
  int64_t image_bytes = 0;
  // The head's screen as make_screen() gave it, or nothing; must outlive the model.
  const uint8_t* screen = nullptr;
  int64_t screen_bytes = 0;
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

// A panel of the head and the largest of its approximate logits.
struct Seed {
  float value;
  int32_t panel;
};

// The parts of a layer that are dealt out among threads.
enum Phase : size_t { kQueries, kAttention, kOutput, kGate, kDown, kPhases };

// Wanted of a sequence's last new token.
struct SampleRequest {
  int64_t sequence = 0;
  int64_t top = 0;      // how many of the most probable tokens to report
  bool logprob = true;  // whether the token's log-probability is wanted, which takes the whole vocabulary
  SamplingParams params;
};

// What is said when `bytes` for something could not be had.
std::string out_of_memory(const char* what, int64_t bytes);

class Model {
 public:
  // Null with a message in `error` when the plan is unsound or memory is short.
  static std::unique_ptr<Model> create(const ModelPlan& plan, const Options& options, const Kernels& kernels,
                                       std::string& error);

  // Pages of group `group` become at least `pages`; what is cached stays. Returns an error or nothing.
  std::string reserve(int64_t group, int64_t pages);
  int64_t page_bytes(int64_t group) const { return groups_[group].page_bytes; }
  int64_t weight_bytes() const { return weight_bytes_; }
  // The packed matrices without adapters. Their layout follows from the plan's tensors and kImageVersion alone.
  const uint8_t* image() const { return image_; }
  int64_t image_bytes() const { return image_bytes_; }
  int64_t scratch_bytes() const { return scratch_bytes_; }
  int64_t max_tokens() const { return options_.max_tokens; }
  const ModelPlan& plan() const { return plan_; }
  const char* path() const { return kernels_.name; }

  // The head's screen: bytes that it takes (0: not worth it), its making (slow, beside steps if need be, into zeroed
  // memory), and its use from then on; the bytes must outlive the model.
  int64_t screen_bytes() const;
  std::string make_screen(uint8_t* data);
  std::string attach_screen(const uint8_t* data, int64_t bytes);
  // Moves what every token reads of an image and a screen given by others into huge pages, beside steps if need be.
  // mapped: those are a file's pages, which the process then lets go of. Returns the bytes moved: 0 where there are no
  // huge pages, no memory or nothing to move.
  int64_t take_in(bool mapped);
  // Bytes of weights that one greedy token of one sequence reads, rows that the screen leaves over not counted.
  int64_t token_bytes() const;
  bool has_screen() const { return screen_.plane.format != nullptr; }
  void use_screen(bool use);
  // Panels computed for each screened row since the last call, -1 where the whole head had to be.
  std::vector<int32_t> take_screen_counts();

  // A fork copies memory as it is and no thread but the caller's: hold() before it, which waits for the step under way,
  // then release() in the parent and in the child, by the same thread.
  void hold() { step_mutex_.lock(); }
  void release(bool in_child) {
    if (in_child) team_.forked();
    step_mutex_.unlock();
  }

  // Each runs one forward step and returns an error or nothing.
  std::string step(const StepInput& input, const std::vector<SampleRequest>& wanted, std::vector<SampleOutput>& out);
  std::string logits(const StepInput& input, float* out);  // [tokens][vocab]
  std::string score(const StepInput& input, const int32_t* targets,
                    float* out);                           // log-probability of targets[t] after t; -1: 0
  std::string hidden(const StepInput& input, float* out);  // [tokens][hidden], after the final norm

 private:
  struct Group {
    int64_t window = 0, layers = 0, page_bytes = 0;
    int64_t reserved = 0;  // pages that may be used; there may be more
    std::vector<uint8_t*> pages;
    std::vector<Arena> slabs;
  };
  struct Adapter {
    int32_t adapter, tensor;
    const Packed *a, *b;
    float scale;
  };

  // Queries [first, first + count) of a sequence's tokens by the heads of one kv head.
  struct QueryBlock {
    int32_t sequence;
    int64_t kv_head, first, count;
  };

  // One row of logits on its way through the screen.
  struct ScreenRow {
    int64_t rank = 1;  // how many of the largest are wanted
    size_t seeds = 0;
    bool proven = true;
    float reach = 1, most = 0, threshold = 0;
    std::vector<float> sizes;          // of the activations, by block
    std::vector<int32_t> altered;      // ids whose logits are changed before the choice, ascending
    std::vector<float> panel_largest;  // of the copy; infinite once computed
    std::vector<std::vector<Seed>> best;
    std::vector<int32_t> first, counts;         // panels computed before the scan; how many each thread computed in it
    std::vector<std::vector<int32_t>> scanned;  // those, by thread, ascending
    std::vector<char> failed;                   // before the scan; by each thread in it
  };

  Model(const ModelPlan& plan, const Options& options, const Kernels& kernels);
  std::string load();
  std::string allocate_scratch();
  std::string check(const StepInput& input);
  std::string prepare(const StepInput& input);
  std::string prepare_attention();
  std::string hidden_locked(const StepInput& input, float* out);
  void head_inputs(const std::vector<int64_t>& rows, int rank, int size);
  void head_rows(const std::vector<int64_t>& rows, float* logits_to, int rank, int size);
  bool can_screen(const std::vector<SampleRequest>& wanted) const;
  void screen_rows(const std::vector<SampleRequest>& wanted, int rank, int size);
  int32_t choose_screened(size_t row, const SamplingParams& params);
  void weigh_screen(size_t rows);
  std::string measure_inputs(std::vector<float>& usual);
  void size_screen(size_t rows);
  void begin_screen(const std::vector<SampleRequest>& wanted);
  static void keep_largest(const ScreenRow& row, Range panels, std::vector<Seed>& best);
  void gather_seeds(ScreenRow& row);
  void find_threshold(ScreenRow& row, const SampleRequest& wanted, const float* logits);

  void forward(int rank, int size);
  void embed(Range tokens);
  void rotate_and_cache(const LayerPlan& layer, int64_t layer_in_group, int rank, int size);
  void attend(const LayerPlan& layer, int64_t layer_in_group, size_t phase, int rank, int size);
  void attend_spread(const LayerPlan& layer, int64_t layer_in_group, int rank, int size);
  void attend_pages(const LayerPlan& layer, int64_t layer_in_group, const QueryBlock& block, Range pages,
                    Attended* attended, int64_t apart);
  void finish_attention(const LayerPlan& layer, const Attended& attended);
  int64_t lowest_visible(const LayerPlan& layer, int64_t position) const;
  Range visible_pages(const LayerPlan& layer, int64_t first, int64_t last) const;
  // Bytes of the keys, or the values, of one layer and kv head in a page, and where its keys begin.
  int64_t cache_block() const { return kPagePositions * plan_.head_dim * (options_.float_activations ? 4 : 2); }
  int64_t keys_offset(int64_t layer_in_group, int64_t kv_head) const {
    return (layer_in_group * plan_.kv_heads + kv_head) * 2 * cache_block();
  }
  void add_residual(int32_t norm, const float* y, int64_t ld, Range tokens);
  void normalise(int32_t norm, bool quantise, Range tokens);
  void product(int32_t tensor, const float* x, int64_t ldx, const Activations& a, float* y, int64_t ldy, Range panels,
               int rank);
  bool deals(int size) const;
  template <class Each>
  void deal(int64_t panels, size_t phase, int rank, int size, Each each);
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
  Arena weights_, adapter_weights_, taken_in_;
  const uint8_t* image_ = nullptr;
  int64_t image_bytes_ = 0;
  std::vector<std::vector<float>> vectors_;
  std::vector<Adapter> adapters_;
  std::vector<Group> groups_;
  std::vector<int64_t> layer_in_group_;
  int64_t weight_bytes_ = 0, scratch_bytes_ = 0;

  Screen screen_;
  const uint8_t* screen_data_ = nullptr;
  bool use_screen_ = true;
  int screen_losses_ = 0, screen_pause_ = 0;  // steps in a row that it did not help; steps yet without it
  std::vector<ScreenRow> screen_work_;
  std::vector<int32_t> screen_counts_;
  std::mutex step_mutex_;

  // Scratch of one step; sizes follow options_.max_tokens.
  Arena scratch_;
  float *x_ = nullptr, *normed_ = nullptr, *y_ = nullptr, *q_ = nullptr, *k_ = nullptr, *v_ = nullptr,
        *attended_ = nullptr, *gate_ = nullptr, *up_ = nullptr, *cosine_ = nullptr, *sine_ = nullptr,
        *logits_ = nullptr;
  Activations normed_int8_, attended_int8_, gate_int8_;
  std::vector<Arena> low_rank_;             // per thread, adapters only
  std::vector<float> inverse_frequencies_;  // [ropes][head_dim / 2]
  std::vector<double> chunk_sums_;
  std::vector<Extent> chunk_extents_;
  std::vector<Extent> row_largest_;
  std::vector<double> row_log_sum_;

  // The step being run.
  StepInput input_;
  std::atomic<bool> damaged_{false};         // a key or value is no finite number, which the cache would round away
  std::vector<std::atomic<int64_t>> dealt_;  // by layer and phase, then the screen: how much has been taken
  std::vector<int32_t> token_sequence_;      // [tokens]
  bool spread_ = false;                      // attention is divided by pages
  std::vector<Attended> parts_;              // [sequence][kv head][page][query] where it is
  Arena part_outs_;
  std::vector<std::vector<const uint8_t*>> pages_;  // [group] pointers [sequences][table width]
};

}  // namespace gemkit
