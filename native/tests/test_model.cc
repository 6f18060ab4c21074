// The whole step on a small model: hostile plans and steps are refused, and no split into chunks, batches or threads
// moves a bit.
#include <cmath>
#include <cstring>
#include <numeric>
#include <string>

#include "check.h"
#include "kernels/half.h"
#include "model.h"

using namespace gemkit;

namespace {

struct Toy {
  ModelPlan plan;
  std::vector<std::vector<float>> floats;
  std::vector<std::vector<uint8_t>> bytes;

  int32_t add(int64_t rows, int64_t cols, Random& random, GgmlType type = kF32, float spread = 1) {
    floats.push_back(random.normals(static_cast<size_t>(rows * cols)));
    if (spread < 1)
      for (size_t i = static_cast<size_t>(cols); i < floats.back().size(); i++)
        floats.back()[i] = floats.back()[i % static_cast<size_t>(cols)];
    for (float& v : floats.back()) v = rows == 1 ? 1 + 0.3f * v : v / std::sqrt(static_cast<float>(cols)) * 2;
    TensorView t{kF32, rows, cols, reinterpret_cast<const uint8_t*>(floats.back().data()), rows * cols * 4};
    if (type == kQ8_0) {
      bytes.emplace_back();
      for (size_t b = 0; b < floats.back().size(); b += 32) {
        float most = 1e-8f;
        for (int i = 0; i < 32; i++) most = std::max(most, std::fabs(floats.back()[b + i]));
        const uint16_t scale = float_to_half(most / 127);
        bytes.back().push_back(static_cast<uint8_t>(scale)), bytes.back().push_back(static_cast<uint8_t>(scale >> 8));
        for (int i = 0; i < 32; i++)
          bytes.back().push_back(
              static_cast<uint8_t>(static_cast<int8_t>(std::lround(floats.back()[b + i] / most * 126))));
      }
      t = {kQ8_0, rows, cols, bytes.back().data(), static_cast<int64_t>(bytes.back().size())};
    }
    plan.tensors.push_back(t);
    return static_cast<int32_t>(plan.tensors.size()) - 1;
  }

  // spread: 0 makes all rows of the head nearly alike, so that nothing can be told apart
  explicit Toy(GgmlType type, uint64_t seed = 1, int64_t hidden = 64, int64_t vocab = 203, float spread = 1) {
    Random random(seed);
    floats.reserve(256), bytes.reserve(256);
    plan.hidden = hidden, plan.ffn = 96, plan.heads = 4, plan.kv_heads = 2, plan.head_dim = 32, plan.vocab = vocab,
    plan.context = 400;
    plan.embed_scale = 8, plan.query_scale = 0.2f, plan.attention_softcap = 30, plan.final_softcap = 20;
    plan.group_windows = {0, 70}, plan.ropes = {{10000, 1}, {1000000, 8}};
    plan.embed = plan.head = add(plan.vocab, hidden, random, type, spread);
    plan.final_norm = add(1, hidden, random);
    for (int i = 0; i < 3; i++) {
      LayerPlan l;
      l.group = i % 2, l.rope = i % 2;
      l.input_norm = add(1, hidden, random), l.pre_ffn_norm = add(1, hidden, random);
      l.post_attention_norm = add(1, hidden, random), l.post_ffn_norm = add(1, hidden, random);
      l.q_norm = add(1, 32, random), l.k_norm = add(1, 32, random);
      l.q_proj = add(128, hidden, random, type), l.k_proj = add(64, hidden, random, type),
      l.v_proj = add(64, hidden, random, type);
      l.o_proj = add(hidden, 128, random, type), l.gate_proj = add(96, hidden, random, type),
      l.up_proj = add(96, hidden, random, type);
      l.down_proj = add(hidden, 96, random, type);
      plan.layers.push_back(l);
    }
  }
};

std::unique_ptr<Model> load(const ModelPlan& plan, int threads, bool float_activations, const Kernels& k) {
  std::string error;
  auto model = Model::create(plan, {threads, float_activations, 300}, k, error);
  CHECK(model, "%s", error.c_str());
  for (int g = 0; g < 2; g++) CHECK(model->reserve(g, 12).empty(), "reserve");
  return model;
}

// Sequence s uses pages s·6 … of both groups.
struct Call {
  std::vector<int32_t> ids, starts{0}, positions, adapters, tables[2];
  StepInput input;
  void add(int sequence, const std::vector<int32_t>& tokens, int from, int count) {
    ids.insert(ids.end(), tokens.begin() + from, tokens.begin() + from + count);
    starts.push_back(static_cast<int32_t>(ids.size())), positions.push_back(from);
    for (auto& t : tables)
      for (int p = 0; p < 6; p++) t.push_back(6 * sequence + p);
  }
  const StepInput& make() {
    input = {};
    input.sequences = static_cast<int64_t>(positions.size()), input.tokens = static_cast<int64_t>(ids.size());
    input.ids = ids.data(), input.starts = starts.data(), input.positions = positions.data();
    if (!adapters.empty()) input.adapters = adapters.data();
    for (auto& t : tables) input.tables.push_back({t.data(), 6});
    return input;
  }
};

std::vector<float> logits(Model& model, Call& call) {
  std::vector<float> out(call.ids.size() * static_cast<size_t>(model.plan().vocab));
  const std::string e = model.logits(call.make(), out.data());
  CHECK(e.empty(), "%s", e.c_str());
  return out;
}

// Chunks of one sequence, of another in the same steps, and the numbers of threads, more than cores too. The short run
// has what can go wrong as well: more than two pages of 64, blocks of 48 queries, heads of 32 rows, the window of 70.
struct Splits {
  std::vector<int> a, b, threads;
};
const Splits kWholeSplits = {{1, 35, 70, 1, 64, 110}, {140, 1, 70, 69, 1}, {1, 2, 3, 5}};
const Splits kShortSplits = {{1, 35, 1, 70, 33}, {99, 1, 40}, {3}};

// A part of an adapter for a tensor of the plan; its magnitude is about as long as the rows, times 1.5.
void adapt(Toy& toy, int32_t adapter, int32_t target, int64_t rank, bool dora, Random& random) {
  const int64_t rows = toy.plan.tensors[target].rows, cols = toy.plan.tensors[target].cols;
  const int32_t a = toy.add(rank, cols, random), b = toy.add(rows, rank, random);
  toy.plan.adapters.push_back({adapter, target, a, b, 0.5f});
  if (!dora) return;
  toy.plan.adapters.back().magnitude = toy.add(1, rows, random);
  for (float& m : toy.floats.back()) m *= 3;
}

void test_same_bits(GgmlType type, bool float_activations, bool adapted, const Splits& splits) {
  Toy toy(type);
  Random random(3);
  if (adapted)
    for (int32_t adapter = 0; adapter < 2; adapter++)
      for (const LayerPlan& layer : toy.plan.layers) {
        adapt(toy, adapter, layer.q_proj, 4, !adapter, random), adapt(toy, adapter, layer.o_proj, 3, true, random);
        adapt(toy, adapter, layer.up_proj, 17, true, random), adapt(toy, adapter, layer.down_proj, 1, false, random);
      }
  const int V = 203;
  auto draw = [&](const std::vector<int>& sizes) {
    std::vector<int32_t> ids(static_cast<size_t>(std::accumulate(sizes.begin(), sizes.end(), 0)));
    for (int32_t& id : ids) id = random.below(V);
    return ids;
  };
  const std::vector<int32_t> a = draw(splits.a), b = draw(splits.b);
  std::vector<float> across;
  for (const Kernels* k : paths()) {
    auto model = load(toy.plan, 1, float_activations, *k);
    Call whole;
    whole.add(0, a, 0, static_cast<int>(a.size()));
    if (adapted) whole.adapters = {0};
    const std::vector<float> want = logits(*model, whole);
    for (float v : want) CHECK(std::isfinite(v), "finite logits");
    if (across.empty()) across = want;
    CHECK(across == want, "%s differs in bits from %s", k->name, paths()[0]->name);
    for (int threads : splits.threads) {
      auto other = load(toy.plan, threads, float_activations, *k);
      std::vector<float> got;
      int at_a = 0, at_b = 0;
      for (size_t step = 0; step < splits.a.size(); step++) {
        Call call;
        const int n = splits.a[step], m = step < splits.b.size() ? splits.b[step] : 0;
        if (m) call.add(1, b, at_b, m);
        call.add(0, a, at_a, n);
        if (adapted) call.adapters = m ? std::vector<int32_t>{1, 0} : std::vector<int32_t>{0};
        const std::vector<float> out = logits(*other, call);
        got.insert(got.end(), out.begin() + static_cast<std::ptrdiff_t>(m) * V, out.end());
        at_a += n, at_b += m;
      }
      CHECK(got.size() == want.size() && !std::memcmp(got.data(), want.data(), want.size() * 4),
            "%s, %d threads: chunks and batches change bits", k->name, threads);
    }
  }
}

void test_sampling(int draws) {
  Toy toy(kQ8_0);
  auto model = load(toy.plan, 2, false, *paths()[0]);
  Random random(4);
  std::vector<int32_t> ids(50);
  for (int32_t& id : ids) id = random.below(203);
  Call call;
  call.add(0, ids, 0, 50);
  const std::vector<float> all = logits(*model, call);
  const float* row = &all[49 * 203];
  SampleRequest greedy{49, {}};
  greedy.params.logprobs = 5;
  std::vector<SampleOutput> out;
  CHECK(model->step(call.make(), {greedy}, out).empty(), "step");
  double sum = 0;
  int best = 0;
  for (int i = 0; i < 203; i++) sum += std::exp(static_cast<double>(row[i])), best = row[i] > row[best] ? i : best;
  CHECK(out[0].token == best && out[0].top_ids[0] == best && out[0].top_ids.size() == 5, "greedy");
  CHECK(std::fabs(out[0].logprob - (row[best] - std::log(sum))) < 1e-5, "log-probability");
  // Drawn frequencies follow the softmax
  std::vector<int> counts(203);
  for (int i = 0; i < draws; i++) {
    SamplingParams p;
    p.temperature = 1, p.seed = 7, p.counter = i;
    std::vector<float> copy(row, row + 203);
    counts[choose(copy.data(), 203, p, *paths()[0])]++;
  }
  double chi = 0;
  for (int i = 0; i < 203; i++) {
    const double expected = std::exp(row[i]) / sum * draws;
    chi += expected > 5 ? (counts[i] - expected) * (counts[i] - expected) / expected : 0;
  }
  CHECK(chi < 300, "draws do not follow the softmax: chi-squared %g", chi);
  std::vector<int32_t> targets(50, 3);
  targets[10] = -1;
  std::vector<float> scores(50);
  CHECK(model->step(call.make(), {}, out, targets.data(), scores.data()).empty(), "targets");
  CHECK(scores[10] == 0 && std::fabs(scores[49] - (row[3] - std::log(sum))) < 1e-5, "targets");
}

// Several draws in one step, with masks and targets, equal the same steps one by one, bit for bit; a masked token is
// never chosen, on any path, through a screen or not.
void test_draws() {
  constexpr int kPrompt = 20, kDraws = 40, kVocab = 5000;  // more draws than rows of the head at a time
  Toy toy(kQ8_0, 5, 64, kVocab);
  Random random(6);
  std::vector<int32_t> ids(kPrompt + kDraws), targets(ids.size(), -1);
  for (int32_t& id : ids) id = random.below(kVocab);
  for (size_t t = 0; t < targets.size(); t += 3) targets[t] = random.below(kVocab);
  std::vector<uint32_t> mask((kVocab + 31) / 32);
  for (uint32_t& word : mask) word = random.bits() & random.bits() & random.bits();
  auto request = [&](int i, bool masked) {
    SampleRequest r;
    r.params.temperature = i % 4 ? 1 : 0, r.params.top_k = i % 4 == 1 ? 20 : 0, r.params.counter = i;
    r.params.logprobs = i % 2 ? -1 : 3, r.params.repetition_penalty = i % 3 ? 1 : 1.3;
    r.params.history = ids.data(), r.params.history_length = kPrompt + i + 1;
    if (masked) r.params.mask = mask.data();
    return r;
  };
  for (const Kernels* k : paths())
    for (int threads : {1, 3}) {
      auto model = load(toy.plan, threads, false, *k);
      Arena screen;
      screen.allocate(static_cast<size_t>(model->screen_bytes()));
      CHECK(model->make_screen(screen.data).empty(), "screen");
      CHECK(model->attach_screen(screen.data, model->screen_bytes()).empty(), "screen");
      Call call;
      call.add(0, ids, 0, kPrompt + kDraws);
      std::vector<SampleRequest> requests;
      for (int i = 0; i < kDraws; i++)
        requests.push_back(request(i, i % 2 || i % 5 == 0)), requests.back().token = kPrompt + i;
      std::vector<SampleOutput> together, single;
      std::vector<float> scores(ids.size()), score(1), separate(ids.size());
      CHECK(model->step(call.make(), requests, together, targets.data(), scores.data()).empty(), "draws");
      CHECK(model->step(call.make(), {}, single, targets.data(), separate.data()).empty() && scores == separate,
            "%s: targets differ with draws", k->name);
      Call prompt;
      prompt.add(0, ids, 0, kPrompt);
      CHECK(model->step(prompt.make(), {}, single).empty(), "prompt");
      for (int i = 0; i < kDraws; i++) {
        Call one;
        one.add(0, ids, kPrompt + i, 1);
        SampleRequest r = requests[static_cast<size_t>(i)];
        r.token = 0;
        CHECK(model->step(one.make(), {r}, single, &targets[kPrompt + i], score.data()).empty(), "draw");
        const SampleOutput &a = together[static_cast<size_t>(i)], &b = single[0];
        CHECK(a.token == b.token && a.logprob == b.logprob && a.top_ids == b.top_ids &&
                  a.top_logprobs == b.top_logprobs && score[0] == scores[kPrompt + i],
              "%s, %d threads: draw %d differs from a step of its own", k->name, threads, i);
        CHECK(model->step(one.make(), {r}, single).empty() && single[0].token == a.token, "%s: by the screen", k->name);
        CHECK(!r.params.mask || mask[a.token / 32] >> a.token % 32 & 1, "%s: %d is masked", k->name, a.token);
      }
      // One token allowed: chosen however improbable, and with a bias against it
      std::vector<uint32_t> only(mask.size());
      const int32_t allowed = kVocab - 1;
      const float against = -100;
      only[allowed / 32] = 1u << allowed % 32;
      for (int i = 0; i < 4; i++) {
        SampleRequest r = request(i, false);
        r.token = kPrompt + kDraws - 1, r.params.mask = only.data(), r.params.logprobs = -1;
        r.params.bias_ids = &allowed, r.params.bias_values = &against, r.params.bias_count = i % 2;
        CHECK(model->step(call.make(), {r}, single).empty() && single[0].token == allowed, "%s: one token", k->name);
      }
      CHECK(!model->step(call.make(), {requests[0], requests[0]}, single).empty(), "two draws at one token");
    }
}

// y += scale·B(Ax) equals a weight with scale·B·A added; with a magnitude, its rows are scaled to that length.
void test_adapter(bool dora) {
  Toy plain(kF32), adapted(kF32), merged(kF32);
  Random random(8);
  const LayerPlan& layer = plain.plan.layers[1];
  for (int32_t target : {layer.q_proj, layer.down_proj}) {
    const int64_t rows = plain.plan.tensors[target].rows, cols = plain.plan.tensors[target].cols;
    const int64_t rank = target == layer.q_proj ? 4 : 1;
    adapt(adapted, 0, target, rank, dora, random);
    const AdapterPart& part = adapted.plan.adapters.back();
    for (int64_t r = 0; r < rows; r++) {
      float* row = &merged.floats[target][r * cols];
      double squares = 0;
      for (int64_t c = 0; c < cols; c++) {
        for (int64_t i = 0; i < rank; i++)
          row[c] += 0.5f * adapted.floats[part.b][r * rank + i] * adapted.floats[part.a][i * cols + c];
        squares += static_cast<double>(row[c]) * row[c];
      }
      for (int64_t c = 0; dora && c < cols; c++)
        row[c] = static_cast<float>(row[c] * adapted.floats[part.magnitude][r] / std::sqrt(squares));
    }
  }
  std::vector<int32_t> ids(40);
  for (int32_t& id : ids) id = random.below(203);
  auto run = [&](Toy& toy, bool use) {
    auto model = load(toy.plan, 2, true, *paths()[0]);
    Call call;
    call.add(0, ids, 0, 40), call.add(1, ids, 0, 40);
    call.adapters = {use ? 0 : -1, -1};
    return logits(*model, call);
  };
  const std::vector<float> base = run(plain, false), with = run(adapted, true), full = run(merged, false);
  double close = 0, moved = 0;
  for (int i = 0; i < 40 * 203; i++)
    close = std::max<double>(close, std::fabs(with[i] - full[i])),
    moved = std::max<double>(moved, std::fabs(with[i] - base[i]));
  CHECK(close < 1e-4 && moved > 0.1, "adapter: %g from merged, %g from base", close, moved);
  CHECK(!std::memcmp(&with[40 * 203], &base[40 * 203], 40 * 203 * 4), "a sequence without the adapter must not change");
}

// A model on the packed image of another: the same bits without the matrices' bytes; any other image is refused.
void test_image() {
  Toy toy(kQ8_0);
  Random random(9);
  std::vector<int32_t> ids(30);
  for (int32_t& id : ids) id = random.below(203);
  auto first = load(toy.plan, 2, false, *paths()[0]);
  Call call;
  call.add(0, ids, 0, 30);
  const std::vector<float> expected = logits(*first, call);
  ModelPlan shapes = toy.plan;
  for (TensorView& t : shapes.tensors)
    if (t.rows > 1) t.data = nullptr, t.bytes = 0;
  Options options{2, false, 300};
  options.image = first->image(), options.image_bytes = first->image_bytes();
  std::string error;
  for (const Kernels* k : paths()) {
    auto second = Model::create(shapes, options, *k, error);
    CHECK(second, "%s", error.c_str());
    for (int g = 0; g < 2; g++) CHECK(second->reserve(g, 12).empty(), "reserve");
    CHECK(logits(*second, call) == expected, "%s: other bits from the image", k->name);
  }
  auto refused = [&](const ModelPlan& plan, Options changed) {
    CHECK(!Model::create(plan, changed, *paths()[0], error) && !error.empty(), "a bad image was accepted");
  };
  Options bad = options;
  bad.image_bytes--, refused(shapes, bad);
  bad = options;
  bad.image++, refused(shapes, bad);
  bad = options;
  bad.float_activations = true, refused(shapes, bad);
  ModelPlan other = shapes;
  other.tensors[static_cast<size_t>(other.embed)].type = kQ4_0, refused(other, options);
  other = shapes;
  other.tensors[static_cast<size_t>(other.final_norm)].data = nullptr, refused(other, options);
  refused(shapes, {2, false, 300});
}

// Chosen through the head's screen or by the whole head: the same tokens, whatever changes the logits before.
void test_screen(int64_t hidden, float softcap, bool flat, int turns = 3) {
  Toy toy(kQ8_0, 5, hidden, 5000, flat ? 0.0f : 1.0f);
  toy.plan.final_softcap = softcap;
  Random random(4);
  std::vector<int32_t> ids(60);
  for (int32_t& id : ids) id = random.below(5000);
  const std::vector<int32_t> bias_ids = {7, 7, 4999, 123, -3, 5000};
  const std::vector<float> bias_values = {2, 3, 4, -100, 9, 9};
  for (const Kernels* k : paths()) {
    if (hidden > 64 && k == paths().back() && paths().size() > 1) continue;  // the portable path is slow
    auto model = load(toy.plan, 3, false, *k);
    CHECK(model->screen_bytes() > 0 && !model->has_screen(), "screen");
    Arena screen;
    screen.allocate(static_cast<size_t>(model->screen_bytes()));
    CHECK(model->make_screen(screen.data).empty(), "screen");
    CHECK(!model->attach_screen(screen.data, 64).empty(), "a bad screen was accepted");
    CHECK(model->attach_screen(screen.data, model->screen_bytes()).empty() && model->has_screen(), "screen");
    std::vector<std::vector<SampleRequest>> cases;
    auto request = [&](double temperature, int64_t top_k, double penalty, bool bias) {
      SampleRequest r;
      r.params.logprobs = -1;
      r.params.temperature = temperature, r.params.top_k = top_k, r.params.top_p = top_k ? 0.95 : 1;
      r.params.repetition_penalty = penalty, r.params.history = ids.data(), r.params.history_length = 60;
      r.params.prompt_length = 10, r.params.frequency_penalty = penalty > 1 ? 0.1 : 0;
      if (bias)
        r.params.bias_ids = bias_ids.data(), r.params.bias_values = bias_values.data(),
        r.params.bias_count = static_cast<int64_t>(bias_ids.size());
      return r;
    };
    for (const SampleRequest& r : {request(0, 0, 1, false), request(1, 1, 1, true), request(0, 0, 1.3, true),
                                   request(1, 5, 1, false), request(0.8, 64, 1.2, true)})
      cases.push_back({r, r, r});
    cases.push_back({request(0, 0, 1, false), request(1, 20, 1, false), request(0, 0, 2, true)});
    auto three = [&](int turn) {
      Call call;
      for (int s = 0; s < 2; s++) call.add(s, ids, 0, 2 + 3 * turn + s);
      call.ids.push_back(ids[static_cast<size_t>(turn)]), call.starts.push_back(call.starts.back() + 1);
      call.positions.push_back(0);
      for (auto& t : call.tables)
        for (int p = 0; p < 6; p++) t.push_back(p < 1 ? 11 : -1);
      return call;
    };
    int screened = 0, whole = 0;
    for (auto& wanted : cases)
      for (int turn = 0; turn < turns; turn++) {
        for (size_t s = 0; s < 3; s++) wanted[s].params.seed = static_cast<uint64_t>(turn) * 3 + s;
        Call call = three(turn);
        for (size_t s = 0; s < 3; s++) wanted[s].token = call.starts[s + 1] - 1;
        std::vector<SampleOutput> through, full;
        model->use_screen(true);
        CHECK(model->step(call.make(), wanted, through).empty(), "step");
        for (int32_t count : model->take_screen_counts()) (count < 0 ? whole : screened)++;
        model->use_screen(false);
        CHECK(model->step(call.make(), wanted, full).empty(), "step");
        CHECK(model->take_screen_counts().empty(), "the whole head was wanted");
        for (size_t s = 0; s < 3; s++)
          CHECK(through[s].token == full[s].token, "%s: %d through the screen, %d by the whole head", k->name,
                through[s].token, full[s].token);
      }
    // Where it never decides it is left out after a while
    model->use_screen(true);
    for (int turn = 0; turn < 12; turn++) {
      Call call = three(turn % 3);
      std::vector<SampleOutput> got;
      for (size_t s = 0; s < 3; s++) cases[0][s].token = call.starts[s + 1] - 1;
      CHECK(model->step(call.make(), cases[0], got).empty(), "step");
    }
    const size_t tried = model->take_screen_counts().size();
    CHECK(tried == (flat ? 8u : 12u) * 3, "%s: %d rows were screened", k->name, static_cast<int>(tried));
    CHECK(flat ? whole > 0 : screened > 6 * turns, "%s: %d rows screened, %d not", k->name, screened, whole);
  }
}

void test_refusals() {
  const Toy good(kQ8_0);
  std::string error;
  auto refused = [&](auto change) {
    ModelPlan p = good.plan;
    change(p);
    CHECK(!Model::create(p, {1, false, 16}, *paths()[0], error) && !error.empty(), "a bad plan was accepted");
  };
  refused([](ModelPlan& p) { p.hidden = 0; });
  refused([](ModelPlan& p) { p.hidden = int64_t{1} << 62; });
  refused([](ModelPlan& p) { p.heads = 3; });
  refused([](ModelPlan& p) { p.head_dim = 40; });
  refused([](ModelPlan& p) { p.vocab++; });
  refused([](ModelPlan& p) { p.norm_eps = NAN; });
  refused([](ModelPlan& p) { p.embed_scale = INFINITY; });
  refused([](ModelPlan& p) { p.layers.clear(); });
  refused([](ModelPlan& p) { p.layers[1].group = 2; });
  refused([](ModelPlan& p) { p.layers[1].rope = -1; });
  refused([](ModelPlan& p) { p.layers[0].q_proj = 10000; });
  refused([](ModelPlan& p) { p.layers[0].q_proj = p.layers[0].k_proj; });
  refused([](ModelPlan& p) { p.layers[2].down_proj = -1; });
  refused([](ModelPlan& p) { p.group_windows[1] = -5; });
  refused([](ModelPlan& p) { p.ropes[0].base = 0; });
  refused([](ModelPlan& p) { p.tensors[0].bytes--; });
  refused([](ModelPlan& p) { p.tensors[0].data = nullptr; });
  refused([](ModelPlan& p) { p.tensors[0].type = 99; });
  refused([](ModelPlan& p) { p.tensors[0].rows = int64_t{1} << 61; });
  refused([](ModelPlan& p) { p.tensors[p.final_norm].type = kF16; });
  refused([](ModelPlan& p) { p.adapters.push_back({0, 0, 1, 2, 1}); });

  Toy adapted(kQ8_0);
  Random random(5);
  adapt(adapted, 0, adapted.plan.layers[1].up_proj, 1, true, random);
  const AdapterPart part = adapted.plan.adapters.back();
  CHECK(Model::create(adapted.plan, {1, false, 16}, *paths()[0], error), "%s", error.c_str());
  auto refused_adapter = [&](auto change) {
    ModelPlan p = adapted.plan;
    change(p, p.adapters.back());
    CHECK(!Model::create(p, {1, false, 16}, *paths()[0], error) && !error.empty(), "a bad adapter was accepted");
  };
  using Plan = ModelPlan;
  for (int32_t magnitude : {-2, 100000, part.target, part.a, part.b, good.plan.final_norm})
    refused_adapter([&](Plan&, AdapterPart& a) { a.magnitude = magnitude; });
  refused_adapter([&](Plan& p, AdapterPart&) { p.tensors[part.magnitude].cols--; });
  refused_adapter([&](Plan& p, AdapterPart&) { p.tensors[part.magnitude].bytes--; });
  refused_adapter([&](Plan& p, AdapterPart&) { p.tensors[part.magnitude].type = kF16; });
  refused_adapter([&](Plan&, AdapterPart& a) { a.target = part.a; });
  refused_adapter([&](Plan&, AdapterPart& a) { a.scale = NAN; });
  for (float& m : adapted.floats[part.magnitude]) m = INFINITY;
  refused_adapter([](Plan&, AdapterPart&) {});

  auto model = load(good.plan, 1, false, *paths()[0]);
  std::vector<int32_t> ids(60, 5);
  std::vector<float> out(300 * 203);
  auto bad_step = [&](auto change) {
    Call call;
    call.add(0, ids, 0, 60);
    call.make();
    change(call);
    CHECK(!model->logits(call.input, out.data()).empty(), "a bad step was accepted");
  };
  bad_step([](Call& c) { c.ids[3] = 203; });
  bad_step([](Call& c) { c.ids[3] = -1; });
  bad_step([](Call& c) { c.positions[0] = -1; });
  bad_step([](Call& c) { c.positions[0] = 390; });
  bad_step([](Call& c) { c.tables[1][0] = -1; });
  bad_step([](Call& c) { c.tables[0][0] = 12; });
  bad_step([](Call& c) { c.input.tables[0].width = 0; });
  bad_step([](Call& c) { c.input.tables.pop_back(); });
  bad_step([](Call& c) { c.input.tokens = 0; });
  bad_step([](Call& c) { c.starts[1] = 30; });
  std::vector<SampleOutput> samples;
  Call call;
  call.add(0, ids, 0, 60);
  SampleRequest request;
  request.token = 60;
  CHECK(!model->step(call.make(), {request}, samples).empty(), "a bad request was accepted");
  CHECK(!model->reserve(2, 5).empty() && !model->reserve(0, int64_t{1} << 40).empty(),
        "a bad reservation was accepted");
}

}  // namespace

int main(int argc, char** argv) {
  const bool whole = !short_run(argc, argv);
  const Splits& splits = whole ? kWholeSplits : kShortSplits;
  for (bool adapted : {false, true}) test_same_bits(kQ8_0, false, adapted, splits);
  test_same_bits(kF32, false, false, splits), test_same_bits(kQ8_0, true, false, splits);
  test_sampling(whole ? 20000 : 5000);
  test_draws();
  test_adapter(false), test_adapter(true);
  test_image();
  if (whole) test_screen(64, 0, false), test_screen(640, 0, false), test_screen(640, 20, false);
  test_screen(64, 20, false, whole ? 3 : 1), test_screen(64, 5, true, whole ? 3 : 1);
  test_refusals();
  std::printf("model: chunks, batches and threads agree bit for bit\n");
}
