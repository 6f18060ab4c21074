// The Python module, and the only file that includes Python: converts arrays and dictionaries to plain structs, and the
// core's errors to ValueError.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <iterator>
#include <type_traits>

#include "model.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using gemkit::Kernels;
using gemkit::Model;

template <class T>
using Vector = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Matrix = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void raise_if(const std::string& error) {
  if (!error.empty()) throw nb::value_error(error.c_str());
}
void require(bool condition, const char* message) {
  if (!condition) throw nb::value_error(message);
}
// Whatever waits for a step runs so: a thread that forks holds steps up, and needs the lock of the interpreter.
template <class Run>
void without_gil(Run run) {
  std::string error;
  {
    nb::gil_scoped_release release;
    error = run();
  }
  raise_if(error);
}

const Kernels& kernels() {
  const char* error = nullptr;
  const Kernels* k = gemkit::select_kernels(std::getenv("GEMKIT_ISA"), &error);
  if (!k) throw nb::value_error(error);
  return *k;
}

// Never converts: a converted array would be a copy that is gone before the core reads it.
template <class T>
T as(nb::handle h, const char* what) {
  try {
    return nb::cast<T>(h, false);
  } catch (const nb::cast_error&) {
    throw nb::type_error((std::string(what) + " has the wrong type").c_str());
  }
}

// Reads pairs of a key and a variable. Floats may come as any number type.
template <class T, class... Rest>
void read(const nb::dict& d, const char* key, T& to, Rest&&... rest) {
  if (!d.contains(key)) throw nb::value_error((std::string("the plan lacks ") + key).c_str());
  if constexpr (std::is_floating_point_v<T>) {
    try {
      to = static_cast<T>(nb::cast<double>(d[key]));
    } catch (const nb::cast_error&) {
      throw nb::type_error((std::string(key) + " has the wrong type").c_str());
    }
  } else {
    to = as<T>(d[key], key);
  }
  if constexpr (sizeof...(rest) > 0) read(d, rest...);
}

gemkit::ModelPlan read_plan(const nb::dict& d) {
  gemkit::ModelPlan p;
  nb::list ropes, layers, adapters, tensors;
  read(d, "hidden", p.hidden, "ffn", p.ffn, "heads", p.heads, "kv_heads", p.kv_heads, "head_dim", p.head_dim);
  read(d, "vocab", p.vocab, "context", p.context, "norm_eps", p.norm_eps, "embed_scale", p.embed_scale);
  read(d, "query_scale", p.query_scale, "attention_softcap", p.attention_softcap, "final_softcap", p.final_softcap);
  read(d, "embed", p.embed, "head", p.head, "final_norm", p.final_norm, "group_windows", p.group_windows);
  read(d, "ropes", ropes, "layers", layers, "adapters", adapters, "tensors", tensors);
  auto entry = [](nb::handle h) { return as<nb::dict>(h, "an entry of the plan"); };
  for (nb::handle h : ropes) {
    gemkit::RopePlan& r = p.ropes.emplace_back();
    read(entry(h), "base", r.base, "factor", r.factor);
  }
  for (nb::handle h : layers) {
    gemkit::LayerPlan& l = p.layers.emplace_back();
    const nb::dict e = entry(h);
    read(e, "group", l.group, "rope", l.rope, "input_norm", l.input_norm);
    read(e, "post_attention_norm", l.post_attention_norm, "pre_ffn_norm", l.pre_ffn_norm);
    read(e, "post_ffn_norm", l.post_ffn_norm, "q_norm", l.q_norm, "k_norm", l.k_norm);
    read(e, "q_proj", l.q_proj, "k_proj", l.k_proj, "v_proj", l.v_proj, "o_proj", l.o_proj);
    read(e, "gate_proj", l.gate_proj, "up_proj", l.up_proj, "down_proj", l.down_proj);
  }
  for (nb::handle h : adapters) {
    gemkit::AdapterPart& a = p.adapters.emplace_back();
    read(entry(h), "adapter", a.adapter, "target", a.target, "a", a.a, "b", a.b, "scale", a.scale, "magnitude",
         a.magnitude);
  }
  for (nb::handle h : tensors) {
    nb::tuple t = as<nb::tuple>(h, "a tensor");
    require(t.size() == 4, "a tensor is (type, rows, cols, bytes)");
    auto data = as<Vector<uint8_t>>(t[3], "a tensor's bytes");
    p.tensors.push_back({as<int32_t>(t[0], "a tensor's type"), as<int64_t>(t[1], "a tensor's rows"),
                         as<int64_t>(t[2], "a tensor's columns"), data.data(), static_cast<int64_t>(data.shape(0))});
  }
  return p;
}

// Points into the caller's arrays, and holds those that the caller may not.
struct Input : gemkit::StepInput {
  std::vector<Matrix<int32_t>> held;
};

Input read_input(const Vector<int32_t>& ids, const Vector<int32_t>& starts, const Vector<int32_t>& positions,
                 const nb::sequence& page_tables, const Vector<int32_t>& adapter_numbers) {
  Input in;
  in.tokens = static_cast<int64_t>(ids.shape(0)), in.sequences = static_cast<int64_t>(positions.shape(0));
  in.ids = ids.data(), in.starts = starts.data(), in.positions = positions.data();
  require(starts.shape(0) == positions.shape(0) + 1, "starts must have one element more than positions");
  for (size_t i = 0; i < starts.shape(0); i++)
    require(in.starts[i] >= (i ? in.starts[i - 1] : 0) && in.starts[i] <= in.tokens,
            "starts must rise within the tokens");
  for (nb::handle h : page_tables) {
    auto table = as<Matrix<int32_t>>(h, "a page table");
    require(static_cast<int64_t>(table.shape(0)) == in.sequences, "a page table needs one row per sequence");
    in.tables.push_back({table.data(), static_cast<int64_t>(table.shape(1))});
    in.held.push_back(table);
  }
  if (adapter_numbers.shape(0)) {  // empty: none for any sequence
    require(static_cast<int64_t>(adapter_numbers.shape(0)) == in.sequences, "adapters needs one element per sequence");
    in.adapters = adapter_numbers.data();
  }
  return in;
}

template <class T>
nb::ndarray<nb::numpy, T> new_array(std::vector<size_t> shape) {
  size_t n = 1;
  for (size_t s : shape) n *= s;
  T* data = new T[n ? n : 1]();
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return nb::ndarray<nb::numpy, T>(data, shape.size(), shape.data(), owner);
}

// Checks the fields of Python's record, {name: (offset, bytes)}, against the struct that they are read as.
void check_sampling(const nb::dict& fields, size_t bytes) {
  using Record = gemkit::SamplingRecord;
  struct Field {
    const char* name;
    size_t offset, bytes;
  };
#define GEMKIT_FIELD(name)                              \
  {                                                     \
    #name, offsetof(Record, name), sizeof(Record::name) \
  }
  const Field expected[] = {GEMKIT_FIELD(row),
                            GEMKIT_FIELD(draws),
                            GEMKIT_FIELD(counter),
                            GEMKIT_FIELD(prompt_length),
                            GEMKIT_FIELD(history_start),
                            GEMKIT_FIELD(history_end),
                            GEMKIT_FIELD(bias_start),
                            GEMKIT_FIELD(bias_end),
                            GEMKIT_FIELD(top_k),
                            GEMKIT_FIELD(logprobs),
                            GEMKIT_FIELD(seed),
                            GEMKIT_FIELD(temperature),
                            GEMKIT_FIELD(top_p),
                            GEMKIT_FIELD(min_p),
                            GEMKIT_FIELD(repetition_penalty),
                            GEMKIT_FIELD(presence_penalty),
                            GEMKIT_FIELD(frequency_penalty)};
#undef GEMKIT_FIELD
  bool same = bytes == sizeof(Record) && fields.size() == std::size(expected);
  for (const Field& f : expected) {
    if (!same || !fields.contains(f.name)) throw nb::value_error("sampling records do not have the fields of the core");
    const auto [offset, size] = as<std::pair<size_t, size_t>>(fields[f.name], "a field of sampling records");
    if (offset != f.offset || size != f.bytes)
      throw nb::value_error(
          ("the field " + std::string(f.name) + " of sampling records has another place or size than in the core")
              .c_str());
  }
}

// One request per draw: sequence after sequence, position after position.
std::vector<gemkit::SampleRequest> read_requests(const Input& in, const Matrix<uint8_t>& records,
                                                 const Vector<int32_t>& bias_ids, const Vector<float>& bias_values,
                                                 const Vector<int32_t>& history) {
  require(records.shape(1) == sizeof(gemkit::SamplingRecord), "sampling records have the wrong size");
  require(bias_ids.shape(0) == bias_values.shape(0), "bias arrays do not fit together");
  auto within = [](int64_t begin, int64_t end, size_t size) {
    return begin >= 0 && begin <= end && end <= static_cast<int64_t>(size);
  };
  std::vector<gemkit::SampleRequest> requests;
  for (size_t i = 0; i < records.shape(0); i++) {
    gemkit::SamplingParams p;
    std::memcpy(static_cast<gemkit::SamplingRecord*>(&p), records.data() + i * records.shape(1), records.shape(1));
    require(p.row >= 0 && p.row < in.sequences && p.draws >= 0 && p.draws <= in.count(p.row),
            "a sequence has fewer new tokens than draws");
    require(within(p.bias_start, p.bias_end, bias_ids.shape(0)), "bias arrays do not fit together");
    require(within(p.history_start, p.history_end, history.shape(0)), "history arrays do not fit together");
    p.bias_ids = bias_ids.data() + p.bias_start, p.bias_values = bias_values.data() + p.bias_start;
    p.bias_count = p.bias_end - p.bias_start, p.history = history.data() + p.history_start;
    for (int64_t later = p.draws; later-- > 0; p.counter++) {  // draws that follow this one
      p.history_length = std::max<int64_t>(p.history_end - p.history_start - later, 0);
      requests.push_back({in.starts[p.row + 1] - 1 - later, p});
    }
  }
  return requests;
}

nb::tuple step(Model& model, Vector<int32_t> ids, Vector<int32_t> starts, Vector<int32_t> positions,
               nb::sequence tables, Vector<int32_t> adapters, Matrix<uint8_t> records, Vector<int32_t> bias_ids,
               Vector<float> bias_values, Vector<int32_t> history, nb::sequence masks, Vector<int32_t> targets) {
  const Input in = read_input(ids, starts, positions, tables, adapters);
  std::vector<gemkit::SampleRequest> requests = read_requests(in, records, bias_ids, bias_values, history);
  const size_t n = requests.size(), words = static_cast<size_t>((model.plan().vocab + 31) / 32);
  std::vector<Vector<uint32_t>> held;
  require(nb::len(masks) == 0 || nb::len(masks) == n, "masks needs one element per draw");
  size_t at = 0;
  for (nb::handle h : masks) {
    gemkit::SampleRequest& r = requests.at(at++);
    if (h.is_none()) continue;
    held.push_back(as<Vector<uint32_t>>(h, "a mask"));
    require(held.back().shape(0) == words, "a mask needs one bit per token of the vocabulary");
    r.params.mask = held.back().data();
    bool any = false;
    for (int64_t id = 0; id < model.plan().vocab && !any; id++) any = r.params.mask[id / 32] >> id % 32 & 1;
    require(any, "a mask allows no token");
  }
  const bool has_targets = targets.shape(0) > 0;  // empty: none
  require(!has_targets || targets.shape(0) == ids.shape(0), "targets needs one element per token");
  auto scores = new_array<float>({targets.shape(0)});
  int64_t most = 0;
  for (const gemkit::SampleRequest& r : requests)
    most = std::max(most, std::clamp<int64_t>(r.params.logprobs, 0, 1024));
  std::vector<gemkit::SampleOutput> out;
  without_gil([&] { return model.step(in, requests, out, has_targets ? targets.data() : nullptr, scores.data()); });
  auto tokens = new_array<int32_t>({n});
  auto logprobs = new_array<float>({n});
  auto top_ids = new_array<int32_t>({n, static_cast<size_t>(most)});
  auto top_logprobs = new_array<float>({n, static_cast<size_t>(most)});
  for (size_t i = 0; i < n; i++) {
    tokens.data()[i] = out[i].token, logprobs.data()[i] = out[i].logprob;
    for (int64_t j = 0; j < most; j++) {
      const bool has = j < static_cast<int64_t>(out[i].top_ids.size());
      top_ids.data()[i * most + j] = has ? out[i].top_ids[j] : -1;
      top_logprobs.data()[i * most + j] = has ? out[i].top_logprobs[j] : -INFINITY;
    }
  }
  return nb::make_tuple(tokens, logprobs, top_ids, top_logprobs, has_targets ? nb::cast(scores) : nb::none());
}

// A method that gives plan.*width floats a token.
auto per_token(int64_t gemkit::ModelPlan::* width, std::string (Model::*run)(const gemkit::StepInput&, float*)) {
  return [=](Model& model, Vector<int32_t> ids, Vector<int32_t> starts, Vector<int32_t> positions, nb::sequence tables,
             Vector<int32_t> adapters) {
    const Input in = read_input(ids, starts, positions, tables, adapters);
    auto out = new_array<float>({ids.shape(0), static_cast<size_t>(model.plan().*width)});
    without_gil([&] { return (model.*run)(in, out.data()); });
    return out;
  };
}

// Defines a method whose first arguments are those of read_input().
template <class Function, class... Extra>
void def_step(nb::class_<Model>& model, const char* name, Function function, const Extra&... extra) {
  model.def(name, function, "ids"_a.noconvert(), "starts"_a.noconvert(), "positions"_a.noconvert(), "tables"_a,
            "adapters"_a.noconvert(), extra...);
}

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Median of several timed runs of body on `threads` threads.
template <class Body>
double median_time(int threads, Body body) {
  require(threads >= 1 && threads <= 1024, "threads must be between 1 and 1024");
  nb::gil_scoped_release release;
  gemkit::Team team(threads);
  std::vector<double> times;
  for (int i = 0; i < 8; i++) {
    const double begin = seconds();
    team.run(body);
    if (i) times.push_back(seconds() - begin);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

double measure_bandwidth(int threads) {
  const Kernels& k = kernels();
  constexpr int64_t kEach = int64_t{256} << 20;
  require(threads >= 1 && threads <= 64, "threads must be between 1 and 64");
  std::vector<gemkit::Arena> arenas(static_cast<size_t>(threads));
  for (auto& a : arenas) require(a.allocate(kEach), "not enough memory to measure the bandwidth");
  auto fill = [&](int rank, int) { std::memset(arenas[rank].data, 1, kEach); };
  gemkit::Team(threads).run(fill);
  std::vector<uint64_t> sink(static_cast<size_t>(threads) * 8);
  auto body = [&](int rank, int) { sink[rank * 8] = k.read(arenas[rank].data, kEach); };
  return static_cast<double>(kEach) * threads / median_time(threads, body) / 1e9;
}

double measure_int8_peak(int threads) {
  const Kernels& k = kernels();
  std::vector<int64_t> done(static_cast<size_t>(std::max(threads, 1)) * 8);
  auto body = [&](int rank, int) { done[rank * 8] = k.peak_int8(1 << 20); };
  const double t = median_time(threads, body);
  return static_cast<double>(done[0]) * threads / t / 1e9;
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "gemkit's C++ core: one call runs a whole forward step.";
  m.attr("page_positions") = gemkit::kPagePositions;
  m.attr("head_rows") = gemkit::kHeadRows;
  m.attr("image_version") = gemkit::kImageVersion;
  m.def("path", [] { return kernels().name; }, "Name of the kernel path in use: portable, avx2, avx512 or neon.");
  m.def("check_sampling", &check_sampling, "fields"_a, "bytes"_a,
        "Raises ValueError if records have other fields than the core reads.");
  m.def("cores", &gemkit::usable_cores, "Cores this process may run on.");
  m.def("measure_bandwidth", &measure_bandwidth, "threads"_a, "Read bandwidth of this machine in GB/s.");
  m.def("measure_int8_peak", &measure_int8_peak, "threads"_a,
        "Peak of int8 products of the path in use, in 10^9 operations a second.");
  auto model = nb::class_<Model>(m, "Model");
  model
      .def_static(
          "create",
          [](nb::dict plan, int threads, bool float_activations, int64_t max_tokens, nb::object image,
             nb::object screen) {
            const gemkit::ModelPlan p = read_plan(plan);
            const Kernels& k = kernels();
            gemkit::Options options{threads, float_activations, max_tokens};
            auto take = [](const nb::object& from, const char* what, const uint8_t*& data, int64_t& bytes) {
              if (from.is_none()) return;
              auto array = as<Vector<uint8_t>>(from, what);
              data = array.data(), bytes = static_cast<int64_t>(array.shape(0));
            };
            take(image, "the packed image", options.image, options.image_bytes);
            take(screen, "the screen", options.screen, options.screen_bytes);
            std::unique_ptr<Model> model;
            without_gil([&] {
              std::string error;
              model = Model::create(p, options, k, error);
              return error;
            });
            return model;
          },
          "plan"_a, "threads"_a, "float_activations"_a, "max_tokens"_a, "image"_a = nb::none(), "screen"_a = nb::none(),
          nb::keep_alive<0, 5>(), nb::keep_alive<0, 6>())
      .def(
          "image",
          [](Model& model) {
            const size_t shape[] = {static_cast<size_t>(model.image_bytes())};
            return nb::ndarray<nb::numpy, const uint8_t>(model.image(), 1, shape, nb::find(model));
          },
          "The packed matrices without adapters: what create takes as `image`.")
      .def(
          "reserve",
          [](Model& model, int64_t group, int64_t pages) { without_gil([&] { return model.reserve(group, pages); }); },
          "group"_a, "pages"_a)
      .def("hold", &Model::hold, nb::call_guard<nb::gil_scoped_release>(), "Before a fork: waits for the running step.")
      .def("release", &Model::release, "in_child"_a, "After a fork, by the thread that called hold, in both processes.")
      .def("page_bytes",
           [](Model& model, int64_t group) {
             require(group >= 0 && group < static_cast<int64_t>(model.plan().group_windows.size()),
                     "no such cache group");
             return model.page_bytes(group);
           })
      .def_prop_ro("screen_bytes", &Model::screen_bytes)
      .def_prop_ro("token_bytes", &Model::token_bytes)
      .def_prop_ro("has_screen", &Model::has_screen)
      .def(
          "make_screen",
          [](Model& model) {
            auto bytes = new_array<uint8_t>({static_cast<size_t>(model.screen_bytes())});
            without_gil([&] { return model.screen_bytes() ? model.make_screen(bytes.data()) : std::string(); });
            return bytes;
          },
          "The head's screen as bytes, empty where it would not help; slow.")
      .def(
          "attach_screen",
          [](Model& model, Vector<uint8_t> bytes) {
            without_gil([&] { return model.attach_screen(bytes.data(), static_cast<int64_t>(bytes.shape(0))); });
          },
          "screen"_a.noconvert(), nb::keep_alive<1, 2>())
      .def(
          "take_in", &Model::take_in, "mapped"_a, nb::call_guard<nb::gil_scoped_release>(),
          "Copies the matrices that every token reads, of a given image and screen, into huge pages; the bytes copied.")
      .def("use_screen", &Model::use_screen, "use"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("take_screen_counts", &Model::take_screen_counts, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("weight_bytes", &Model::weight_bytes)
      .def_prop_ro("scratch_bytes", &Model::scratch_bytes)
      .def_prop_ro("path", &Model::path);
  def_step(model, "step", &step, "records"_a.noconvert(), "bias_ids"_a.noconvert(), "bias_values"_a.noconvert(),
           "history"_a.noconvert(), "masks"_a, "targets"_a.noconvert());
  def_step(model, "logits", per_token(&gemkit::ModelPlan::vocab, &Model::logits));
  def_step(model, "hidden", per_token(&gemkit::ModelPlan::hidden, &Model::hidden));
}
