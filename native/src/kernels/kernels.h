// The table of inner loops that every instruction set fills in, and their arguments.
//
// Contract of the quantised product, the same bits on every path and for every batch size. Activations are int8 with
// one float scale per block. Gemma's activations have outliers, so the largest of a block may reach 254 steps: it
// is carried as the sum of two int8 numbers, its own and a spare one, which keeps the step of the other 31 small. Per
// output, blocks in ascending order,
//   dot = exact int32 sum of (code − offset) · q;   t = fl(dot · scale_w);   f = fma(t, scale_x, f)      (Q6_K: per 16
//   columns) with minima, then  f = fma(minimum, fl(scale_x · sum q), f)
// Contract of float products: f = fma(w[k], x[k], f), k ascending.
#pragma once
#include <cstdint>

#include "../packed.h"

namespace gemkit {

// One block of a quantised row: a line of the cache.
struct ActivationBlock {
  int8_t q[kBlock];
  int8_t spare[kQuad];  // second part of the largest value, at its index in its quad; the other three are 0
  int32_t quad;         // index of that quad
  int32_t sum;          // of q and spare
  int32_t first_sum;    // of the first 16 columns
  float scale;
  float scaled_sum;         // fl(scale · sum)
  int8_t halves[2][kQuad];  // spare for the 16 columns that it belongs to, zeros for the other 16
};

// Quantised rows: blocks[m * per_row + b].
struct Activations {
  ActivationBlock* blocks = nullptr;
  int64_t per_row = 0;
  ActivationBlock* row(int64_t m) const { return blocks + m * per_row; }
};

// One product y[m][n] = x[m]·w[n] for rows [m0, m1) and panels [p0, p1). ldy must cover whole panels.
struct Product {
  const Packed* w = nullptr;
  const Activations* a = nullptr;  // used when w is quantised
  const float* x = nullptr;        // used when w is float
  int64_t ldx = 0;
  float* y = nullptr;
  int64_t ldy = 0;
};

// A page of the key-value cache holds kPagePositions positions of one sequence. For each layer of its group and each kv
// head:
//   keys   [kPagePositions/16][head_dim][16]   16 positions interleaved: a score is one lane
//   values [kPagePositions][head_dim]
constexpr int kPagePositions = 64;

// Attention of one query over some of its positions: Σ exp(score − max) · value in out[head_dim], and the sum of the
// weights. max = −∞: over none, and out is undefined. The attention is out / sum.
struct PartialAttention {
  float max = 0, sum = 0;
  float* out = nullptr;
};

// One page for some queries of one sequence that share a kv head. Each page's sums are formed on their own and merged
// in the order of pages, so pages may be split among threads.
constexpr int kTileQueries = 6;
struct AttentionTile {
  int64_t head_dim = 0;
  const float* const* queries = nullptr;  // count pointers to head_dim floats, already scaled
  const int64_t* positions = nullptr;     // count absolute positions
  PartialAttention* partials = nullptr;   // [count], into which the page is merged
  int count = 0;                          // at most kTileQueries
  int64_t window = 0;                     // 0: all earlier positions; W: 0 <= i - j < W
  float softcap = 0;                      // 0: none
  const uint8_t* keys = nullptr;          // of this layer and head in the page
  const uint8_t* values = nullptr;        // the same
  const uint8_t* next = nullptr;          // keys to prefetch, or null
  int64_t first = 0;                      // the page's first position
  bool half = false;                      // cache elements are f16
};

// One position's key and value into its page.
struct CacheWrite {
  const float *key = nullptr, *value = nullptr;
  int64_t head_dim = 0;
  uint8_t* page = nullptr;
  int64_t keys_offset = 0, values_offset = 0;
  int slot = 0;  // position % kPagePositions
  bool half = false;
};

struct Extent {
  float max;
  int64_t arg;  // lowest index of max; -1 if all are NaN
};

// Sixteen rows of a screen (screen.h): bit i is set where approx[i] + reach · sum may reach the threshold. The sum is
// Σ norms · sizes, or without a proof √Σ norms² · sizes.
struct ScreenPanel {
  const uint8_t* norms = nullptr;  // [blocks][16]
  const float* sizes = nullptr;    // [blocks]
  int64_t blocks = 0;
  const float* approx = nullptr;  // [16]
  float reach = 0, threshold = 0;
  bool proven = true;
};

struct Kernels {
  const char* name;
  void (*quantise)(const float* x, ActivationBlock* to, int64_t blocks);
  void (*matmul)(const Product& product, int64_t m0, int64_t m1, int64_t p0, int64_t p1);
  void (*rms_norm)(const float* x, const float* weight, float* y, int64_t n, float eps);  // weight already 1 + w
  void (*add)(float* x, const float* y, int64_t n);                                       // x += y
  void (*gelu_multiply)(float* gate, const float* up, int64_t n);                         // gate = gelu(gate) · up
  void (*rope)(float* x, const float* cosine, const float* sine, int64_t half);
  void (*scale)(float* x, float by, int64_t n);
  void (*softcap)(float* x, float cap, int64_t n);
  void (*write_cache)(const CacheWrite& w);
  void (*attend)(const AttentionTile& tile);
  // Later pages, with the bits that attend() over them would have given `to`.
  void (*merge)(PartialAttention& to, const PartialAttention& later, int64_t head_dim);
  Extent (*largest)(const float* x, int64_t n);
  double (*sum_exp)(const float* x, int64_t n, float shift);  // sum of exp(x - shift)
  uint32_t (*screen)(const ScreenPanel& panel);
  void (*panel_largest)(const float* y, int64_t panels, float* largest);  // of each 16 values
  int64_t (*peak_int8)(int64_t rounds);               // runs register-only int8 products; returns operations done
  uint64_t (*read)(const uint8_t* p, int64_t bytes);  // reads memory in four streams
};

// Tables by instruction set; nullptr where not built in.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* neon_kernels();

// Whether a table's products in every quantised format have the portable ones' bits on this machine: a few small ones,
// in a millisecond. Some paths were compiled for processors that their tests only had in emulation.
bool agrees_with_portable(const Kernels& kernels);

// The best table that this machine can run and whose products prove equal to the portable ones. `forced` (GEMKIT_ISA:
// portable, avx2, avx512, neon) chooses another; nullptr with a message in `error` if that is not one of this
// architecture's or cannot run here.
const Kernels* select_kernels(const char* forced, const char** error);

}  // namespace gemkit
