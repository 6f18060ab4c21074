// A screen for the head: a 4-bit copy of it and a bound on the copy's error, which tell the rows whose logits can be
// among the largest. Those rows are computed from the head itself, so the choice is that of the whole head.
//
// For a row w and its copy v, block by block, |w·x − v·x| ≤ Σ_b ‖(w_b − v_b)∘d_b‖ · ‖x_b/d_b‖  (Cauchy–Schwarz) for any
// positive d. With d the square root of each input's root mean square, which for some of Gemma's is tenfold the mean,
// the bound is several times tighter than with ones. The norms are kept as bytes, rounded up, times one float for each
// panel, and cover the rounding of both products.
#pragma once
#include <cstdint>
#include <vector>

#include "packed.h"

namespace gemkit {

struct Screen {
  Packed plane;                    // Q4_0, the head's shape
  const uint8_t* norms = nullptr;  // [panel][block][16]
  const float* units = nullptr;    // [panel]; infinite: no bound for this panel
  const float* longest = nullptr;  // [panel] largest norm of a whole row's error, for a first, quick test
  const float* sizes = nullptr;    // [cols], d above
};

// Whether a screen reads much less than such a head.
bool worth_screening(const Packed& head);

// Bytes of the screen of `head`, and its parts at `data`, 64-byte aligned.
int64_t screen_bytes(const Packed& head);
Screen screen_at(const Packed& head, const uint8_t* data);

// Fills in `data`, which begins zeroed. usual: the root mean square of each input, [cols]; only speed depends on it.
void build_screen(const Packed& head, const std::vector<float>& usual, uint8_t* data);

}  // namespace gemkit
