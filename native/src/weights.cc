// Laying out and packing the weights.
#include "weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace gemkit {
namespace {

constexpr int64_t kPiece = 64;  // panels or rows; dynamic scheduling: which thread takes one changes nothing

// Magnitude over the length of each row of W + scale · B·A. Returns an error or nothing.
std::string find_gains(const ModelPlan& plan, Team& team, Weights& w) {
  w.gains.resize(plan.adapters.size());
  for (size_t i = 0; i < plan.adapters.size(); i++) {
    const AdapterPart& part = plan.adapters[i];
    if (part.magnitude < 0) continue;
    const Packed &target = w.matrix(part.target), &a = w.matrix(part.a), &b = w.matrix(part.b);
    const int64_t rows = target.rows, cols = target.cols, rank = a.rows;
    std::vector<float>& gains = w.gains[i];
    gains.assign(static_cast<size_t>(padded(rows)), 0.0f);
    std::vector<float> low(static_cast<size_t>(rank * cols));
    for (int64_t k = 0; k < rank; k++) unpack_row(a, k, &low[static_cast<size_t>(k * cols)]);
    WorkQueue queue(0);
    auto measure = [&](int, int) {
      std::vector<float> sum(static_cast<size_t>(cols)), high(static_cast<size_t>(rank));
      for (int64_t first; (first = queue.fetch_add(kPiece)) < rows;)
        for (int64_t r = first; r < std::min(first + kPiece, rows); r++) {
          unpack_row(target, r, sum.data());
          unpack_row(b, r, high.data());
          for (int64_t k = 0; k < rank; k++) {
            const float by = part.scale * high[static_cast<size_t>(k)], *add = &low[static_cast<size_t>(k * cols)];
            for (int64_t c = 0; c < cols; c++) sum[static_cast<size_t>(c)] += by * add[c];
          }
          double squares = 0;
          for (const float v : sum) squares += static_cast<double>(v) * v;
          gains[static_cast<size_t>(r)] = static_cast<float>(w.vector(part.magnitude)[r] / std::sqrt(squares));
        }
    };
    team.run(measure);
    if (!std::all_of(gains.begin(), gains.end(), [](float g) { return std::isfinite(g); }))
      return "an adapter scales a row of zeros, or by a number that is not finite";
  }
  return {};
}

}  // namespace

std::string load_weights(const ModelPlan& plan, const Options& options, Team& team, Weights& w) {
  const size_t count = plan.tensors.size();
  w.matrices.resize(count), w.vectors.resize(count), w.of_adapter = adapter_tensors(plan);
  std::vector<int64_t> offsets(count);
  int64_t sizes[2] = {0, 0};  // of the model's matrices, of the adapters'
  for (size_t i = 0; i < count; i++) {
    const TensorView& t = plan.tensors[i];
    if (t.rows == 1 && !w.of_adapter[i]) {
      w.vectors[i].resize(static_cast<size_t>(t.cols));
      std::memcpy(w.vectors[i].data(), t.data, static_cast<size_t>(t.bytes));
      continue;
    }
    Packed& p = w.matrices[i];
    p.format = find_format(t.type);
    if (options.float_activations && p.format->quantised()) p.format = find_format(kF32);
    p.rows = t.rows, p.cols = t.cols;
    offsets[i] = sizes[w.of_adapter[i]];
    sizes[w.of_adapter[i]] += whole_lines(static_cast<int64_t>(p.bytes()));
  }
  w.bytes = sizes[0] + sizes[1];
  w.image_bytes = sizes[0] + static_cast<int64_t>(kArenaSlack);
  if (options.image) {
    if (options.image_bytes != w.image_bytes || reinterpret_cast<uintptr_t>(options.image) % kLine)
      return "the packed weights are not those of this model";
  } else if (!w.packed.allocate(static_cast<size_t>(sizes[0]))) {
    return out_of_memory("the weights", sizes[0]);
  }
  if (sizes[1] && !w.adapters_packed.allocate(static_cast<size_t>(sizes[1])))
    return out_of_memory("the adapters", sizes[1]);
  w.image = options.image ? options.image : w.packed.data;
  for (size_t i = 0; i < count; i++)
    w.matrices[i].data = (w.of_adapter[i] ? w.adapters_packed.data : w.image) + offsets[i];
  // Few rows of a screened head are read: its pages come as they are needed
  for (size_t i = 0; options.image && i < count; i++)
    if (w.in_image(i) && !(options.screen && static_cast<int32_t>(i) == plan.head))
      populate(w.matrices[i].data, w.matrices[i].bytes());
  if (options.screen) populate(options.screen, static_cast<size_t>(options.screen_bytes));

  std::vector<WorkQueue> queues(count);
  auto pack = [&](int, int) {
    for (size_t i = 0; i < count; i++) {
      const Packed& p = w.matrices[i];
      if (!p.format || (options.image && !w.of_adapter[i])) continue;
      uint8_t* to = (w.of_adapter[i] ? w.adapters_packed.data : w.packed.data) + offsets[i];
      const FormatInfo& source = *find_format(plan.tensors[i].type);
      for (int64_t first; (first = queues[i].fetch_add(kPiece)) < p.panels();)
        pack_panels(source, plan.tensors[i].data, p, to, first, std::min(first + kPiece, p.panels()));
    }
  };
  team.run(pack);
  for (const RopePlan& r : plan.ropes)
    for (int64_t i = 0; i < plan.head_dim / 2; i++) {
      const double exponent = -2.0 * static_cast<double>(i) / static_cast<double>(plan.head_dim);
      w.inverse_frequencies.push_back(static_cast<float>(std::pow(r.base, exponent)) / static_cast<float>(r.factor));
    }
  w.parts.resize(count);
  for (size_t i = 0; i < plan.adapters.size(); i++) w.parts[static_cast<size_t>(plan.adapters[i].target)].push_back(i);
  return find_gains(plan, team, w);
}

}  // namespace gemkit
