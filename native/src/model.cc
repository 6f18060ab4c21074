// Construction and the steps of a model.
#include "model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>

namespace gemkit {

Model::Model(const ModelPlan& plan, const Options& options, const Kernels& kernels)
    : plan_(plan),
      options_(options),
      kernels_(kernels),
      team_(options.threads),
      step_{plan_, kernels_, weights_, cache_, scratch_} {}

std::unique_ptr<Model> Model::create(const ModelPlan& plan, const Options& options, const Kernels& kernels,
                                     std::string& error) {
  error = validate(plan, options.image != nullptr);
  if (error.empty() && (options.threads < 1 || options.threads > 1024)) error = "threads must be between 1 and 1024";
  if (error.empty() && (options.max_tokens < 1 || options.max_tokens > 65536))
    error = "max_tokens must be between 1 and 65536";
  if (!error.empty()) return nullptr;
  std::unique_ptr<Model> model(new Model(plan, options, kernels));
  error = load_weights(plan, options, model->team_, model->weights_);
  for (TensorView& t : model->plan_.tensors) t.data = nullptr;  // the caller's memory may go
  lay_out_cache(plan, !options.float_activations, model->cache_);
  model->step_.queues = std::vector<WorkQueue>(plan.layers.size() * kPhases);
  if (error.empty() && options.screen) error = model->attach_screen(options.screen, options.screen_bytes);
  if (error.empty()) error = allocate_scratch(plan, options.max_tokens, options.threads, model->scratch_);
  if (!error.empty()) return nullptr;
  return model;
}

std::string Model::reserve(int64_t group, int64_t pages) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return reserve_pages(cache_, group, pages);
}

template <class Body>
std::string Model::run(const StepInput& input, Body body) {
  if (std::string e = begin_step(step_, input, options_.max_tokens, team_.size()); !e.empty()) return e;
  auto all = [&](int rank, int size) {
    const Worker worker{team_, rank, size};
    forward(step_, worker);
    body(worker);
  };
  team_.run(all);
  return step_.damaged.load(std::memory_order_relaxed) ? kNotNumbers : std::string();
}

template <class Body>
std::string Model::run_logits(const StepInput& input, const std::vector<int64_t>& tokens, Body body) {
  return run(input, [&](const Worker& w) {
    const int64_t all = static_cast<int64_t>(tokens.size());
    for (int64_t first = 0; first < all; first += kHeadRows) {
      const int64_t count = std::min(kHeadRows, all - first);
      head_inputs(step_, tokens.data() + first, count, w);
      head_product(step_, 0, count, w.share(weights_.matrix(plan_.head).panels()));
      w.barrier();
      body(first, count, w);
      w.barrier();
    }
  });
}

std::string Model::step(const StepInput& input, const std::vector<SampleRequest>& requests,
                        std::vector<SampleOutput>& out, const int32_t* targets, float* scores) {
  std::vector<int64_t> tokens, request_of(static_cast<size_t>(std::max<int64_t>(input.tokens, 0)), -1);
  const size_t count = requests.size();
  for (size_t i = 0; i < count; i++) {
    const SampleRequest& r = requests[i];
    if (r.token < 0 || r.token >= input.tokens || r.params.logprobs > 1024 || request_of[r.token] >= 0)
      return "bad sampling request";
    request_of[r.token] = static_cast<int64_t>(i);
    tokens.push_back(r.token);
  }
  for (int64_t t = 0; targets && t < input.tokens; t++) {
    if (targets[t] < -1 || targets[t] >= plan_.vocab) return "a target id is not in the vocabulary";
    scores[t] = 0;
    if (targets[t] >= 0 && request_of[t] < 0) tokens.push_back(t);
  }
  out.assign(count, {});
  const std::lock_guard<std::mutex> lock(mutex_);
  std::string error;
  if (!targets && use_search(search_, requests)) {
    begin_search(search_, step_, requests);
    error = run(input, [&](const Worker& w) {
      head_inputs(step_, tokens.data(), static_cast<int64_t>(count), w);
      search_rows(search_, step_, requests, w);
      for (size_t r = static_cast<size_t>(w.rank); r < count; r += static_cast<size_t>(w.size)) {
        out[r].token = choose_found(search_, step_, r, requests[r].params);
        out[r].logprob = std::numeric_limits<float>::quiet_NaN();
      }
    });
    if (error.empty()) end_search(search_, count);
  } else {
    error = run_logits(input, tokens, [&](int64_t first, int64_t rows, const Worker& w) {
      log_sum_exp(step_, rows, w);
      for (int64_t r = w.rank; r < rows; r += w.size) {
        const int64_t t = tokens[static_cast<size_t>(first + r)], i = request_of[static_cast<size_t>(t)];
        if (targets && targets[t] >= 0) scores[t] = log_probability(step_, r, targets[t]);
        if (i >= 0) sample_row(step_, r, requests[static_cast<size_t>(i)], out[static_cast<size_t>(i)]);
      }
    });
  }
  for (size_t i = 0; error.empty() && i < count; i++)
    if (out[i].token < 0 || (requests[i].params.logprobs >= 0 && !std::isfinite(out[i].logprob))) error = kNotNumbers;
  return error;
}

std::string Model::logits(const StepInput& input, float* out) {
  std::vector<int64_t> tokens(static_cast<size_t>(std::max<int64_t>(input.tokens, 0)));
  std::iota(tokens.begin(), tokens.end(), 0);
  const std::lock_guard<std::mutex> lock(mutex_);
  return run_logits(input, tokens, [&](int64_t first, int64_t count, const Worker& w) {
    const Range mine = w.share(count);
    for (int64_t r = mine.begin; r < mine.end; r++)
      std::copy_n(scratch_.logits.row(r), plan_.vocab, out + (first + r) * plan_.vocab);
  });
}

std::string Model::hidden(const StepInput& input, float* out) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return run_hidden(input, out);
}

std::string Model::run_hidden(const StepInput& input, float* out) {
  return run(input, [&](const Worker& w) {
    const Range mine = w.share(input.tokens);
    for (int64_t t = mine.begin; t < mine.end; t++)
      kernels_.rms_norm(scratch_.x.row(t), weights_.vector(plan_.final_norm), out + t * plan_.hidden, plan_.hidden,
                        plan_.norm_eps);
  });
}

int64_t Model::screen_bytes() const {
  const Packed& head = weights_.matrix(plan_.head);
  return options_.float_activations || !worth_screening(head) ? 0 : gemkit::screen_bytes(head);
}

int64_t Model::token_bytes() const {
  int64_t bytes = 0;
  for (size_t i = 0; i < weights_.matrices.size(); i++) {
    const int32_t tensor = static_cast<int32_t>(i);
    if (!weights_.in_image(i) || (tensor == plan_.embed && tensor != plan_.head)) continue;
    bytes += tensor == plan_.head && has_screen() ? screen_bytes() : static_cast<int64_t>(weights_.matrices[i].bytes());
  }
  return bytes;
}

std::string Model::make_screen(uint8_t* data) {
  std::vector<float> usual;
  if (std::string e = measure_inputs(usual); !e.empty()) return e;
  build_screen(weights_.matrix(plan_.head), usual, data);
  return {};
}

// The root mean square of each of the head's inputs over a few short texts of ids from all over the vocabulary, always
// the same. Other steps may run between them.
std::string Model::measure_inputs(std::vector<float>& usual) {
  constexpr int32_t kTexts = 8, kLength = 8, kFirst = 300, kStride = 29989, kBos = 2;
  const int32_t length = static_cast<int32_t>(std::min<int64_t>({kLength, options_.max_tokens, plan_.context}));
  const size_t D = static_cast<size_t>(plan_.hidden);
  std::vector<CacheGroup>& groups = cache_.groups;
  std::vector<Arena> pages(groups.size());
  for (size_t g = 0; g < groups.size(); g++)
    if (!pages[g].allocate(static_cast<size_t>(groups[g].page_bytes))) return "not enough memory for a page";
  std::vector<double> squares(D, 0.0);
  std::vector<float> out(static_cast<size_t>(length) * D);
  for (int32_t text = 0; text < kTexts; text++) {
    std::vector<int32_t> ids(1, static_cast<int32_t>(std::min<int64_t>(kBos, plan_.vocab - 1)));
    while (static_cast<int32_t>(ids.size()) < length) {
      const int64_t n = text * kLength + static_cast<int64_t>(ids.size());
      ids.push_back(static_cast<int32_t>((kFirst + n * kStride) % plan_.vocab));
    }
    const int32_t starts[] = {0, length}, position = 0;
    StepInput input{.sequences = 1, .tokens = length, .ids = ids.data(), .starts = starts, .positions = &position};
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<int32_t> own(groups.size());
    std::vector<int64_t> reserved(groups.size());
    for (size_t g = 0; g < groups.size(); g++) {
      own[g] = static_cast<int32_t>(groups[g].pages.size());
      groups[g].pages.push_back(pages[g].data);
      reserved[g] = std::exchange(groups[g].reserved, own[g] + 1);
      input.tables.push_back({&own[g], 1});
    }
    const std::string error = run_hidden(input, out.data());
    for (size_t g = 0; g < groups.size(); g++) groups[g].pages.pop_back(), groups[g].reserved = reserved[g];
    if (!error.empty()) return error;
    for (size_t i = 0; i < out.size(); i++) squares[i % D] += static_cast<double>(out[i]) * out[i] / (kTexts * length);
  }
  for (double s : squares) usual.push_back(static_cast<float>(std::sqrt(s)));
  return {};
}

std::string Model::attach_screen(const uint8_t* data, int64_t bytes) {
  if (bytes != screen_bytes() || bytes == 0 || reinterpret_cast<uintptr_t>(data) % 16)
    return "the screen is not that of this model";
  const std::lock_guard<std::mutex> lock(mutex_);
  search_.screen = screen_at(weights_.matrix(plan_.head), data);
  search_.losses = search_.pause = 0;
  return {};
}

// A mapped file's pages are small: at full speed a good part of the time goes into finding them. The matrices that
// every token reads are therefore copied into huge pages, one after another, and steps go on between.
int64_t Model::take_in(bool mapped) {
  if (!huge_pages()) return 0;
  std::vector<size_t> wanted;
  int64_t bytes = 0, screen_size = 0;
  const uint8_t* screen = nullptr;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if ((!options_.image && !has_screen()) || huge_pages_.data) return 0;
    if (has_screen()) screen = search_.screen.plane.data, screen_size = screen_bytes();
    for (size_t i = 0; options_.image && i < weights_.matrices.size(); i++)
      if (weights_.in_image(i) && !(screen && static_cast<int32_t>(i) == plan_.head))
        wanted.push_back(i), bytes += whole_lines(static_cast<int64_t>(weights_.matrices[i].bytes()));
  }
  Arena arena;
  if (!arena.allocate(static_cast<size_t>(bytes + screen_size))) return 0;
  uint8_t* to = arena.data;
  auto copy = [&](const uint8_t* from, size_t size) {
    for (size_t at = 0; at < size; at += kHugePage) {
      const size_t piece = std::min(kHugePage, size - at);
      std::memcpy(to + at, from + at, piece);
      if (mapped) let_go(from + at, piece);
    }
  };
  for (size_t i : wanted) {
    Packed& w = weights_.matrices[i];
    copy(w.data, w.bytes());
    const std::lock_guard<std::mutex> lock(mutex_);
    w.data = to;
    to += whole_lines(static_cast<int64_t>(w.bytes()));
  }
  if (screen) copy(screen, static_cast<size_t>(screen_size));
  const std::lock_guard<std::mutex> lock(mutex_);
  if (screen) search_.screen = screen_at(weights_.matrix(plan_.head), to);
  huge_pages_ = std::move(arena);
  return bytes + screen_size;
}

void Model::use_screen(bool use) {
  const std::lock_guard<std::mutex> lock(mutex_);
  search_.enabled = use;
  search_.losses = search_.pause = 0;
}

std::vector<int32_t> Model::take_screen_counts() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return std::move(search_.counts);
}

}  // namespace gemkit
