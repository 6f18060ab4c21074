// The weights in memory: packed matrices, vectors as floats, adapters. They are packed from a plan's tensors or taken
// from an image that was packed earlier.
#pragma once
#include <string>
#include <vector>

#include "os.h"
#include "plan.h"
#include "threads.h"

namespace gemkit {

constexpr int kImageVersion = 2;  // to be raised whenever the packed layout changes

struct Weights {
  std::vector<Packed> matrices;             // by tensor of the plan; without a format for a vector
  std::vector<std::vector<float>> vectors;  // by tensor of the plan; empty for a matrix
  std::vector<bool> of_adapter;             // by tensor of the plan
  std::vector<std::vector<size_t>> parts;   // by tensor of the plan: the parts of its adapters that add to it
  std::vector<std::vector<float>> gains;    // by part of the plan's adapters, [padded rows]; empty without a magnitude
  std::vector<float> inverse_frequencies;   // [ropes][H / 2], of the rotary embeddings
  const uint8_t* image = nullptr;           // all matrices but those of adapters, each on a cache line of its own
  int64_t image_bytes = 0;
  int64_t bytes = 0;  // of all matrices
  Arena packed, adapters_packed;

  const Packed& matrix(int32_t tensor) const { return matrices[tensor]; }
  const float* vector(int32_t tensor) const { return vectors[tensor].data(); }
  bool quantised(int32_t tensor) const { return matrices[tensor].format->quantised(); }
  bool in_image(size_t tensor) const { return matrices[tensor].format && !of_adapter[tensor]; }
};

// Packs the plan's tensors, or takes options.image. The tensors' bytes are not needed afterwards. Returns an error or
// nothing.
std::string load_weights(const ModelPlan& plan, const Options& options, Team& team, Weights& weights);

}  // namespace gemkit
