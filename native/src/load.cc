// Construction: packing the weights, laying out scratch and cache memory, and checking what a step asks for.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>

#include "model.h"

namespace gemkit {

std::string out_of_memory(const char* what, int64_t bytes) {
  char text[160];
  std::snprintf(text, sizeof text,
                "not enough memory for %s (%.2f GB); close other programs or use a smaller model or context", what,
                static_cast<double>(bytes) / 1e9);
  return text;
}

Model::Model(const ModelPlan& plan, const Options& options, const Kernels& kernels)
    : plan_(plan),
      options_(options),
      kernels_(kernels),
      team_(options.threads),
      dealt_(plan.layers.size() * kPhases + 1) {}

std::unique_ptr<Model> Model::create(const ModelPlan& plan, const Options& options, const Kernels& kernels,
                                     std::string& error) {
  error = validate(plan, options.image != nullptr);
  if (error.empty() && (options.threads < 1 || options.threads > 1024)) error = "threads must be between 1 and 1024";
  if (error.empty() && (options.max_tokens < 1 || options.max_tokens > 65536))
    error = "max_tokens must be between 1 and 65536";
  if (!error.empty()) return nullptr;
  std::unique_ptr<Model> model(new Model(plan, options, kernels));
  error = model->load();
  if (error.empty() && options.screen) error = model->attach_screen(options.screen, options.screen_bytes);
  if (error.empty()) error = model->allocate_scratch();
  if (!error.empty()) return nullptr;
  return model;
}

std::string Model::load() {
  const FormatInfo* f32 = find_format(kF32);
  packed_.resize(plan_.tensors.size());
  std::vector<int64_t> offsets(plan_.tensors.size());
  vectors_.resize(plan_.tensors.size());
  const std::vector<bool> of_adapter = adapter_tensors(plan_);
  int64_t sizes[2] = {0, 0};  // of the model's matrices, of the adapters'
  for (size_t i = 0; i < plan_.tensors.size(); i++) {
    const TensorView& t = plan_.tensors[i];
    if (t.rows == 1 && !of_adapter[i]) {
      vectors_[i].resize(static_cast<size_t>(t.cols));
      std::memcpy(vectors_[i].data(), t.data, static_cast<size_t>(t.bytes));
      continue;
    }
    Packed& p = packed_[i];
    p.format = find_format(t.type);
    if (options_.float_activations && p.format->quantised()) p.format = f32;
    p.rows = t.rows, p.cols = t.cols;
    int64_t& size = sizes[of_adapter[i]];
    offsets[i] = size;
    size += (static_cast<int64_t>(p.bytes()) + 63) / 64 * 64;
  }
  weight_bytes_ = sizes[0] + sizes[1];
  image_bytes_ = sizes[0] + static_cast<int64_t>(kArenaSlack);
  if (options_.image) {
    if (options_.image_bytes != image_bytes_ || reinterpret_cast<uintptr_t>(options_.image) % 64)
      return "the packed weights are not those of this model";
    image_ = options_.image;
  } else {
    if (!weights_.allocate(static_cast<size_t>(sizes[0]))) return out_of_memory("the weights", sizes[0]);
    image_ = weights_.data;
  }
  if (sizes[1] && !adapter_weights_.allocate(static_cast<size_t>(sizes[1])))
    return out_of_memory("the adapters", sizes[1]);
  for (size_t i = 0; i < packed_.size(); i++)
    packed_[i].data = (of_adapter[i] ? adapter_weights_.data : image_) + offsets[i];
  // A screened head is read here and there only: its pages come as they are needed
  if (options_.image)
    for (size_t i = 0; i < packed_.size(); i++)
      if (packed_[i].format && !of_adapter[i] && !(options_.screen && static_cast<int32_t>(i) == plan_.head))
        populate(packed_[i].data, packed_[i].bytes());
  if (options_.screen) populate(options_.screen, static_cast<size_t>(options_.screen_bytes));
  // Threads take panels as they come free; which one packs a panel changes nothing.
  constexpr int64_t kStride = 64;
  std::vector<std::atomic<int64_t>> next(packed_.size());
  auto pack = [&](int, int) {
    for (size_t i = 0; i < packed_.size(); i++) {
      if (!packed_[i].format || (options_.image && !of_adapter[i])) continue;
      uint8_t* to = (of_adapter[i] ? adapter_weights_.data : weights_.data) + offsets[i];
      const FormatInfo& source = *find_format(plan_.tensors[i].type);
      for (int64_t p; (p = next[i].fetch_add(kStride)) < packed_[i].panels();)
        pack_panels(source, plan_.tensors[i].data, packed_[i], to, p, std::min(p + kStride, packed_[i].panels()));
    }
  };
  team_.run(pack);
  for (TensorView& t : plan_.tensors) t.data = nullptr;  // the caller's memory is not needed any more
  for (const AdapterPart& a : plan_.adapters)
    adapters_.push_back({a.adapter, a.target, &packed_[a.a], &packed_[a.b], a.scale});

  const int64_t element = options_.float_activations ? 4 : 2;
  for (int64_t window : plan_.group_windows) groups_.push_back({window, 0, 0, 0, {}, {}});
  for (const LayerPlan& l : plan_.layers) layer_in_group_.push_back(groups_[l.group].layers++);
  for (Group& g : groups_) g.page_bytes = g.layers * 2 * plan_.kv_heads * plan_.head_dim * kPagePositions * element;

  const int64_t half = plan_.head_dim / 2;
  for (const RopePlan& r : plan_.ropes)
    for (int64_t i = 0; i < half; i++) {
      const double exponent = -2.0 * static_cast<double>(i) / static_cast<double>(plan_.head_dim);
      inverse_frequencies_.push_back(static_cast<float>(std::pow(r.base, exponent)) / static_cast<float>(r.factor));
    }
  return {};
}

// Pages of a mapped file are small: at full speed a good part of the time goes into finding them. What every token
// reads is therefore copied into huge pages, a piece at a time, and steps go on between.
int64_t Model::take_in(bool mapped) {
  if (!huge_pages()) return 0;
  std::vector<size_t> wanted;
  const std::vector<bool> of_adapter = adapter_tensors(plan_);
  size_t bytes = 0;
  auto aligned = [](size_t size) { return (size + 63) / 64 * 64; };
  bool with_screen = false;
  {
    const std::lock_guard<std::mutex> lock(step_mutex_);
    if (!options_.image && !has_screen()) return 0;
    if (taken_in_.data) return 0;
    with_screen = has_screen();
    for (size_t i = 0; options_.image && i < packed_.size(); i++)
      if (packed_[i].format && !of_adapter[i] && !(with_screen && static_cast<int32_t>(i) == plan_.head))
        wanted.push_back(i), bytes += aligned(packed_[i].bytes());
  }
  const size_t screen_size = with_screen ? static_cast<size_t>(screen_bytes()) : 0;
  Arena arena;
  if (!arena.allocate(bytes + screen_size)) return 0;
  uint8_t* to = arena.data;
  auto copy = [&](const uint8_t* from, size_t size) {
    for (size_t at = 0; at < size; at += kHugePage) {
      const size_t piece = std::min(kHugePage, size - at);
      std::memcpy(to + at, from + at, piece);
      if (mapped) let_go(from + at, piece);
    }
  };
  for (size_t i : wanted) {
    const size_t size = packed_[i].bytes();
    copy(packed_[i].data, size);
    const std::lock_guard<std::mutex> lock(step_mutex_);
    packed_[i].data = to;
    to += aligned(size);
  }
  if (with_screen) copy(screen_data_, screen_size);
  const std::lock_guard<std::mutex> lock(step_mutex_);
  if (with_screen) screen_ = screen_at(packed_[plan_.head], to);
  taken_in_ = std::move(arena);
  return static_cast<int64_t>(bytes + screen_size);
}

std::string Model::allocate_scratch() {
  const int64_t T = options_.max_tokens, q_width = padded(plan_.heads * plan_.head_dim),
                kv_width = padded(plan_.kv_heads * plan_.head_dim);
  const int64_t hidden = padded(plan_.hidden), ffn = padded(plan_.ffn), vocab = padded(plan_.vocab),
                half = plan_.head_dim / 2;
  int64_t bytes = 0;
  auto place = [&](int64_t size) {
    const int64_t at = bytes;
    bytes += (size + 63) / 64 * 64;
    return at;
  };
  auto place_int8 = [&](Activations& a, int64_t width) {
    a.per_row = width / kBlock;
    return place((T + kHeadRows) * a.per_row * static_cast<int64_t>(sizeof(ActivationBlock)));
  };
  const int64_t R = T > kHeadRows ? T : kHeadRows;
  float** const buffers[] = {&x_, &normed_, &y_, &q_, &k_, &v_, &attended_, &gate_, &up_, &cosine_, &sine_, &logits_};
  const int64_t ropes = static_cast<int64_t>(plan_.ropes.size());
  const int64_t sizes[] = {T * hidden,  R * hidden, T * hidden, T * q_width,      T * kv_width,     T * kv_width,
                           T * q_width, T * ffn,    T * ffn,    ropes * T * half, ropes * T * half, kHeadRows * vocab};
  int64_t offsets[12];
  for (int i = 0; i < 12; i++) offsets[i] = place(sizes[i] * 4);
  const int64_t normed_at = place_int8(normed_int8_, plan_.hidden),
                attended_at = place_int8(attended_int8_, plan_.heads * plan_.head_dim),
                gate_at = place_int8(gate_int8_, plan_.ffn);
  if (!scratch_.allocate(static_cast<size_t>(bytes))) return out_of_memory("the activations", bytes);
  scratch_bytes_ = bytes;
  for (int i = 0; i < 12; i++) *buffers[i] = reinterpret_cast<float*>(scratch_.data + offsets[i]);
  normed_int8_.blocks = reinterpret_cast<ActivationBlock*>(scratch_.data + normed_at);
  attended_int8_.blocks = reinterpret_cast<ActivationBlock*>(scratch_.data + attended_at);
  gate_int8_.blocks = reinterpret_cast<ActivationBlock*>(scratch_.data + gate_at);
  low_rank_.resize(static_cast<size_t>(team_.size()));
  int64_t widest = 0;
  for (const Adapter& a : adapters_) widest = std::max(widest, padded(a.a->rows) + padded(a.b->rows));
  for (Arena& a : low_rank_)
    if (widest && !a.allocate(static_cast<size_t>(widest) * sizeof(float)))
      return out_of_memory("adapters", widest * 4);
  return {};
}

std::string Model::reserve(int64_t group, int64_t pages) {
  if (group < 0 || group >= static_cast<int64_t>(groups_.size())) return "no such cache group";
  const std::lock_guard<std::mutex> lock(step_mutex_);
  Group& g = groups_[group];
  int64_t more = pages - static_cast<int64_t>(g.pages.size());
  if (more <= 0) return g.reserved = std::max(g.reserved, pages), std::string();
  if (pages > int64_t{1} << 24 || more > INT64_MAX / 2 / g.page_bytes) return "too many cache pages";
  // A slab fills at least one huge page
  const int64_t least = static_cast<int64_t>(kHugePage - kArenaSlack) / g.page_bytes;
  more = std::max(more, least);
  const int64_t bytes = more == least ? static_cast<int64_t>(kHugePage - kArenaSlack) : more * g.page_bytes;
  Arena slab;
  if (!slab.allocate(static_cast<size_t>(bytes))) return out_of_memory("the key-value cache", bytes);
  for (int64_t i = 0; i < more; i++) g.pages.push_back(slab.data + i * g.page_bytes);
  g.slabs.push_back(std::move(slab));
  g.reserved = pages;
  return {};
}

std::string Model::check(const StepInput& in) {
  if (in.tokens < 1 || in.tokens > options_.max_tokens)
    return "a step takes between 1 and " + std::to_string(options_.max_tokens) + " tokens";
  if (in.sequences < 1 || in.sequences > in.tokens) return "every sequence of a step needs at least one token";
  if (in.tables.size() != groups_.size()) return "one page table per cache group is needed";
  if (in.starts[0] != 0 || in.starts[in.sequences] != in.tokens) return "starts do not span the tokens";
  for (int64_t s = 0; s < in.sequences; s++) {
    const int64_t count = static_cast<int64_t>(in.starts[s + 1]) - in.starts[s], first = in.positions[s];
    if (count < 1) return "every sequence of a step needs at least one token";
    if (first < 0 || first + count > plan_.context)
      return "position " + std::to_string(first + count - 1) + " is past the context of " +
             std::to_string(plan_.context) + " tokens";
    for (size_t g = 0; g < groups_.size(); g++) {
      const int64_t window = groups_[g].window, lowest = window > 0 && first >= window ? first - window + 1 : 0;
      for (int64_t page = lowest / kPagePositions; page <= (first + count - 1) / kPagePositions; page++) {
        if (page >= in.tables[g].width) return "a page table is too short";
        const int32_t id = in.tables[g].pages[s * in.tables[g].width + page];
        if (id < 0 || id >= groups_[g].reserved) return "a page table names no page for a visible position";
      }
    }
  }
  for (int64_t t = 0; t < in.tokens; t++)
    if (in.ids[t] < 0 || in.ids[t] >= plan_.vocab)
      return "token id " + std::to_string(in.ids[t]) + " is not in the vocabulary of " + std::to_string(plan_.vocab);
  return {};
}

std::string Model::prepare(const StepInput& in) {
  if (std::string e = check(in); !e.empty()) return e;
  input_ = in;
  damaged_.store(false, std::memory_order_relaxed);
  for (auto& taken : dealt_) taken.store(0, std::memory_order_relaxed);
  token_sequence_.resize(static_cast<size_t>(in.tokens));
  for (int64_t s = 0; s < in.sequences; s++)
    for (int32_t t = in.starts[s]; t < in.starts[s + 1]; t++) token_sequence_[t] = static_cast<int32_t>(s);
  pages_.resize(groups_.size());
  for (size_t g = 0; g < groups_.size(); g++) {
    const auto& table = in.tables[g];
    pages_[g].assign(static_cast<size_t>(in.sequences * table.width), nullptr);
    for (size_t i = 0; i < pages_[g].size(); i++)
      if (const int32_t id = table.pages[i]; id >= 0 && id < groups_[g].reserved) pages_[g][i] = groups_[g].pages[id];
  }
  return prepare_attention();
}

}  // namespace gemkit
