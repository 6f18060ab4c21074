// A screen for the head: which rows can be among the largest, from a 4-bit copy of the head and a bound on what the
// copy gets wrong. Rows that can be are computed from the head itself, so that what is chosen is what the head would
// choose.
//
// For a row w and its copy v, block by block, |w·x − v·x| ≤ Σ_b ‖(w_b − v_b)∘d_b‖ · ‖x_b/d_b‖  (Cauchy–Schwarz) for any
// positive d. With d the square root of what each input usually measures, which some of Gemma's exceed tenfold, the
// bound is several times nearer than with ones. The norms are kept as bytes, rounded up, times one float for each
// panel, and cover the rounding of both products.
#pragma once
#include <cstdint>
#include <vector>

#include "packed.h"

namespace gemkit {

struct Screen {
  Packed plane;                    // Q4_0, the head's shape
  const uint8_t* norms = nullptr;  // [panel][block][16]
  const float* units = nullptr;    // [panel]; infinite: nothing is known of this panel
  const float* longest = nullptr;  // [panel] norm of a whole row's error at most, for a first, quick look
  const float* sizes = nullptr;    // [cols], d above
};

// Whether a screen reads much less than such a head.
bool worth_screening(const Packed& head);

// Bytes of the screen of `head`, and its parts at `data`, 64-byte aligned.
int64_t screen_bytes(const Packed& head);
Screen screen_at(const Packed& head, const uint8_t* data);

// Fills in `data`, which begins zeroed. usual: what each input usually measures, [cols]; only speed depends on it.
void build_screen(const Packed& head, const std::vector<float>& usual, uint8_t* data);

}  // namespace gemkit
