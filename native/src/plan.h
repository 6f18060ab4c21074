// The plan that the core executes: sizes, layers and tensors as plain data, without any model's name, and the options
// of its execution. Built outside, so it is validated as untrusted input before anything is read through it.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "packed.h"

namespace gemkit {

// A matrix [rows, cols] or a vector [1, cols] as a GGUF file stores it.
struct TensorView {
  int32_t type = 0;
  int64_t rows = 0, cols = 0;
  const uint8_t* data = nullptr;
  int64_t bytes = 0;
};

struct RopePlan {
  double base = 10000.0;
  double factor = 1.0;  // positions are divided by it
};

// Fields ending in the published tensor names hold indices into ModelPlan::tensors; -1: the layer has no such tensor.
struct LayerPlan {
  int32_t group = 0;  // cache group: layers of one window
  int32_t rope = 0;
  int32_t input_norm = -1, post_attention_norm = -1, pre_ffn_norm = -1, post_ffn_norm = -1, q_norm = -1, k_norm = -1;
  int32_t q_proj = -1, k_proj = -1, v_proj = -1, o_proj = -1, gate_proj = -1, up_proj = -1, down_proj = -1;
};

// A low-rank addition to one matrix W: y += scale · B·(A·x), A [rank, cols] and B [rows, rank], float. With a magnitude
// [1, rows] (DoRA) each row of the sum W + scale · B·A is scaled to that length.
struct AdapterPart {
  int32_t adapter = 0;  // which adapter it belongs to, 0-based
  int32_t target = -1;  // index of the tensor that it adds to
  int32_t a = -1, b = -1;
  float scale = 1.0f;
  int32_t magnitude = -1;  // -1: none
};

struct ModelPlan {
  int64_t hidden = 0, ffn = 0, heads = 0, kv_heads = 0, head_dim = 0, vocab = 0, context = 0;
  float norm_eps = 1e-6f;
  float embed_scale = 1.0f;
  float query_scale = 1.0f;
  float attention_softcap = 0, final_softcap = 0;  // 0: none
  int32_t embed = -1, head = -1, final_norm = -1;
  std::vector<int64_t> group_windows;  // per cache group; 0: full attention
  std::vector<RopePlan> ropes;
  std::vector<LayerPlan> layers;
  std::vector<AdapterPart> adapters;
  std::vector<TensorView> tensors;
};

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

// A and B of adapters, by index.
std::vector<bool> adapter_tensors(const ModelPlan& plan);

// Empty when the plan is sound, otherwise what is wrong with it. `packed`: the matrices come in a packed image, so only
// vectors and adapters need their bytes.
std::string validate(const ModelPlan& plan, bool packed = false);

}  // namespace gemkit
