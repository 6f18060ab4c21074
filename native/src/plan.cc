// Validation of a plan.
#include "plan.h"

#include <algorithm>
#include <cmath>

#include "kernels/kernels.h"

namespace gemkit {
namespace {

constexpr int64_t kMaxDim = int64_t{1} << 24;
constexpr size_t kMaxLayers = 1024, kMaxTensors = 65536, kMaxGroups = 8;

std::string text(const char* what, int64_t n) { return std::string(what) + std::to_string(n); }

bool in_range(int64_t v, int64_t lowest, int64_t highest) { return v >= lowest && v <= highest; }

std::string check_tensor(const TensorView& t, size_t i, bool shape_only) {
  const FormatInfo* f = find_format(t.type);
  if (!f) return text("tensor ", i) + text(": unsupported type ", t.type);
  if (!in_range(t.rows, 1, kMaxDim) || !in_range(t.cols, 1, kMaxDim)) return text("tensor ", i) + ": bad shape";
  if (t.cols % f->file_elements)
    return text("tensor ", i) + text(": row length is not a multiple of ", f->file_elements);
  const int64_t bytes = t.rows * (t.cols / f->file_elements) * f->file_bytes;  // < 2^51: no overflow
  if (shape_only) return {};
  if (!t.data || t.bytes != bytes)
    return text("tensor ", i) + text(" must have ", bytes) + text(" bytes, not ", t.bytes);
  return {};
}

// Tensor `index` must exist with the given shape; -1 is accepted where optional.
std::string need(const ModelPlan& p, int32_t index, int64_t rows, int64_t cols, const char* name, int64_t layer,
                 bool optional) {
  auto where = [&] { return std::string(name) + (layer >= 0 ? text(" of layer ", layer) : std::string()); };
  if (index == -1 && optional) return {};
  if (index < 0 || static_cast<size_t>(index) >= p.tensors.size()) return where() + " is missing";
  const TensorView& t = p.tensors[index];
  if (t.rows != rows || t.cols != cols)
    return where() + text(" has shape [", t.rows) + text(", ", t.cols) + text("], not [", rows) + text(", ", cols) +
           "]";
  if (rows == 1 && t.type != kF32) return where() + " must be F32";
  return {};
}

}  // namespace

std::vector<bool> adapter_tensors(const ModelPlan& p) {
  std::vector<bool> is(p.tensors.size());
  for (const AdapterPart& a : p.adapters) is[a.a] = is[a.b] = true;
  return is;
}

std::string validate(const ModelPlan& p, bool packed) {
  if (!in_range(p.hidden, 1, kMaxDim) || !in_range(p.ffn, 1, kMaxDim) || !in_range(p.vocab, 1, kMaxDim))
    return "bad model width";
  if (!in_range(p.heads, 1, 4096) || !in_range(p.kv_heads, 1, p.heads) || p.heads % p.kv_heads)
    return "bad number of heads";
  if (!in_range(p.head_dim, 16, 4096) || p.head_dim % 32) return "head_dim must be a multiple of 32";
  if (!in_range(p.context, 1, int64_t{1} << 24)) return "bad context length";
  if (!(p.norm_eps > 0) || !std::isfinite(p.embed_scale) || !std::isfinite(p.query_scale)) return "bad scale";
  if (!(p.attention_softcap >= 0) || !(p.final_softcap >= 0)) return "bad soft-cap";
  if (p.layers.empty() || p.layers.size() > kMaxLayers) return "bad number of layers";
  if (p.tensors.size() > kMaxTensors) return "too many tensors";
  if (p.group_windows.empty() || p.group_windows.size() > kMaxGroups) return "bad number of cache groups";
  for (int64_t w : p.group_windows)
    if (!in_range(w, 0, int64_t{1} << 24)) return "bad window";
  if (p.ropes.empty() || p.ropes.size() > kMaxGroups) return "bad number of RoPE settings";
  for (const RopePlan& r : p.ropes)
    if (!(r.base > 1) || !(r.factor > 0) || !std::isfinite(r.base) || !std::isfinite(r.factor))
      return "bad RoPE setting";
  for (const AdapterPart& a : p.adapters) {
    const int64_t last = static_cast<int64_t>(p.tensors.size()) - 1;
    if (!in_range(a.adapter, 0, 65535) || !in_range(a.target, 0, last) || !in_range(a.a, 0, last) ||
        !in_range(a.b, 0, last) || !in_range(a.magnitude, -1, last) || !std::isfinite(a.scale))
      return "bad adapter";
  }
  const std::vector<bool> of_adapter = adapter_tensors(p);
  for (size_t i = 0; i < p.tensors.size(); i++)
    if (std::string e = check_tensor(p.tensors[i], i, packed && p.tensors[i].rows > 1 && !of_adapter[i]); !e.empty())
      return e;

  std::string e;
  auto fails = [&](int32_t index, int64_t rows, int64_t cols, const char* name, int64_t layer, bool optional = false) {
    e = need(p, index, rows, cols, name, layer, optional);
    return !e.empty();
  };
  if (fails(p.embed, p.vocab, p.hidden, "embedding", -1) || fails(p.head, p.vocab, p.hidden, "head", -1) ||
      fails(p.final_norm, 1, p.hidden, "final norm", -1))
    return e;
  const int64_t q_width = p.heads * p.head_dim, kv_width = p.kv_heads * p.head_dim;
  std::vector<bool> used(p.group_windows.size());
  for (size_t i = 0; i < p.layers.size(); i++) {
    const LayerPlan& l = p.layers[i];
    const int64_t n = static_cast<int64_t>(i);
    if (!in_range(l.group, 0, static_cast<int64_t>(p.group_windows.size()) - 1))
      return text("bad cache group in layer ", n);
    used[l.group] = true;
    if (!in_range(l.rope, 0, static_cast<int64_t>(p.ropes.size()) - 1)) return text("bad RoPE setting in layer ", n);
    if (fails(l.input_norm, 1, p.hidden, "input norm", n) ||
        fails(l.pre_ffn_norm, 1, p.hidden, "feed-forward norm", n) ||
        fails(l.post_attention_norm, 1, p.hidden, "post-attention norm", n, true) ||
        fails(l.post_ffn_norm, 1, p.hidden, "post-feed-forward norm", n, true) ||
        fails(l.q_norm, 1, p.head_dim, "q norm", n, true) || fails(l.k_norm, 1, p.head_dim, "k norm", n, true) ||
        fails(l.q_proj, q_width, p.hidden, "q_proj", n) || fails(l.k_proj, kv_width, p.hidden, "k_proj", n) ||
        fails(l.v_proj, kv_width, p.hidden, "v_proj", n) || fails(l.o_proj, p.hidden, q_width, "o_proj", n) ||
        fails(l.gate_proj, p.ffn, p.hidden, "gate_proj", n) || fails(l.up_proj, p.ffn, p.hidden, "up_proj", n) ||
        fails(l.down_proj, p.hidden, p.ffn, "down_proj", n))
      return e;
  }
  if (std::find(used.begin(), used.end(), false) != used.end()) return "a cache group has no layer";
  for (const AdapterPart& a : p.adapters) {
    if (of_adapter[a.target]) return "an adapter adds to an adapter";
    const TensorView &w = p.tensors[a.target], &ta = p.tensors[a.a], &tb = p.tensors[a.b];
    if (ta.cols != w.cols || tb.rows != w.rows || tb.cols != ta.rows || !in_range(ta.rows, 1, 4096))
      return "an adapter does not fit its matrix";
    if (a.magnitude >= 0 && of_adapter[a.magnitude]) return "an adapter's magnitude is a matrix of an adapter";
    if (fails(a.magnitude, 1, w.rows, "the magnitude of an adapter", -1, true)) return e;
    if (find_format(ta.type)->quantised() || find_format(tb.type)->quantised()) return "adapter matrices must be float";
  }
  return {};
}

}  // namespace gemkit
