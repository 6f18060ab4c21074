// Choosing tokens by the head's screen (screen.h): in a step the 4-bit copy is read whole, the head itself only where a
// row may be among the largest.
#pragma once
#include <vector>

#include "head.h"
#include "screen.h"

namespace gemkit {

// A panel and the largest of its approximate logits.
struct ScreenedPanel {
  float value;
  int32_t panel;
};

// The search in one row of logits.
struct SearchRow {
  int64_t rank = 1;  // how many of the largest logits are wanted
  size_t seeds = 0;  // panels to compute first
  bool proven = true;
  float reach = 1, most = 0, threshold = 0;
  std::vector<float> sizes;          // of the activations, by block
  std::vector<int32_t> altered;      // ids whose logits are changed before the choice, ascending
  std::vector<float> panel_largest;  // of the copy; infinite once computed
  std::vector<std::vector<ScreenedPanel>> best;
  std::vector<int32_t> first, counts;         // panels computed before the scan; how many each thread computed in it
  std::vector<std::vector<int32_t>> scanned;  // those, by thread, ascending
  std::vector<char> failed;                   // before the scan; by each thread in it

  bool any_failed() const;
};

struct ScreenSearch {
  Screen screen;  // without a format: none
  bool enabled = true;
  int losses = 0, pause = 0;  // steps in a row that it did not help; steps left without it
  WorkQueue queue{0};
  std::vector<SearchRow> rows;
  std::vector<int32_t> counts;  // panels computed, by row of every step so far; -1: the whole head

  bool available() const { return screen.plane.format != nullptr; }
};

// Whether the requests can be served by the screen, and it is not in a pause, which this call shortens.
bool use_search(ScreenSearch& search, const std::vector<SampleRequest>& requests);

// Before the threads begin a step.
void begin_search(ScreenSearch& search, const Step& step, const std::vector<SampleRequest>& requests);

// Leaves in scratch.logits what the head gives wherever a row may be among the largest, and notes the panels. Reads the
// head inputs in scratch.normed.
void search_rows(ScreenSearch& search, const Step& step, const std::vector<SampleRequest>& requests,
                 const Worker& worker);

// The token of a row whose search has run; -1 where a logit is not finite.
int32_t choose_found(const ScreenSearch& search, const Step& step, size_t row, const SamplingParams& params);

// After a step of `rows` rows.
void end_search(ScreenSearch& search, size_t rows);

}  // namespace gemkit
