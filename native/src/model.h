// A loaded model: owns the weights, the cache, the scratch memory, the head's screen and a team of threads, and runs
// one step at a time.
#pragma once
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "screen_search.h"

namespace gemkit {

class Model {
 public:
  // Null with a message in `error` when the plan is unsound or memory is short.
  static std::unique_ptr<Model> create(const ModelPlan& plan, const Options& options, const Kernels& kernels,
                                       std::string& error);

  // Pages of group `group` become at least `pages`; their contents stay. Returns an error or nothing.
  std::string reserve(int64_t group, int64_t pages);
  int64_t page_bytes(int64_t group) const { return cache_.groups[group].page_bytes; }
  int64_t weight_bytes() const { return weights_.bytes; }
  // The packed matrices without adapters. Their layout follows from the plan's tensors and kImageVersion alone.
  const uint8_t* image() const { return weights_.image; }
  int64_t image_bytes() const { return weights_.image_bytes; }
  int64_t scratch_bytes() const { return scratch_.bytes; }
  const ModelPlan& plan() const { return plan_; }
  const char* path() const { return kernels_.name; }

  // The head's screen: its bytes (0: not worth it), making it (slow, while steps run if need be, into zeroed memory),
  // and its use from then on; the bytes must outlive the model.
  int64_t screen_bytes() const;
  std::string make_screen(uint8_t* data);
  std::string attach_screen(const uint8_t* data, int64_t bytes);
  // Copies the matrices that every token reads, of a given image and screen, into huge pages, while steps run if need
  // be. mapped: those are a file's pages, which the process then releases. Returns the bytes copied: 0 where there are
  // no huge pages, no memory or nothing to copy.
  int64_t take_in(bool mapped);
  // Bytes of weights that one greedy token of one sequence reads, rows that the screen leaves over not counted.
  int64_t token_bytes() const;
  bool has_screen() const { return search_.available(); }
  void use_screen(bool use);
  // Panels computed for each screened row since the last call, -1 where the whole head had to be.
  std::vector<int32_t> take_screen_counts();

  // A fork copies memory as it is and no thread but the caller's: hold() before it, which waits for the running step,
  // then release() in the parent and in the child, by the same thread.
  void hold() { mutex_.lock(); }
  void release(bool in_child) {
    if (in_child) team_.forked();
    mutex_.unlock();
  }

  // Each runs one forward step and returns an error or nothing.
  // At most one request a token; targets and scores: [tokens], or null. scores[t]: log-probability of targets[t] after
  // token t; 0 where the target is -1.
  std::string step(const StepInput& input, const std::vector<SampleRequest>& requests, std::vector<SampleOutput>& out,
                   const int32_t* targets = nullptr, float* scores = nullptr);
  std::string logits(const StepInput& input, float* out);  // [tokens][vocab]
  std::string hidden(const StepInput& input, float* out);  // [tokens][hidden], after the final norm

 private:
  Model(const ModelPlan& plan, const Options& options, const Kernels& kernels);
  std::string measure_inputs(std::vector<float>& usual);

  // Those below hold the mutex already. Each runs body(worker) after the layers, on all threads.
  template <class Body>
  std::string run(const StepInput& input, Body body);
  // body(first, count, worker) with the logits of rows [first, first + count) of `tokens` in scratch_.logits.
  template <class Body>
  std::string run_logits(const StepInput& input, const std::vector<int64_t>& tokens, Body body);
  std::string run_hidden(const StepInput& input, float* out);

  ModelPlan plan_;
  Options options_;
  const Kernels& kernels_;
  Team team_;
  Weights weights_;
  Cache cache_;
  Scratch scratch_;
  ScreenSearch search_;
  Arena huge_pages_;  // of take_in()
  Step step_;
  std::mutex mutex_;  // of a step, and of all that it reads
};

}  // namespace gemkit
