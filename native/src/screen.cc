// Building a screen from a head.
#include "screen.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/half.h"
#include "os.h"

namespace gemkit {
namespace {

// Each product of a block is a float product of an exact sum, added with one rounding to at most kMaxDim / 32 others.
// Their relative errors, and those of the screen's own float arithmetic, stay below this share of ‖w_b‖ · ‖x_b‖.
constexpr double kRounding = 1e-4;

Packed plane_of(const Packed& head) { return {find_format(kQ4_0), head.rows, head.cols}; }

}  // namespace

bool worth_screening(const Packed& head) {
  if (!head.format || !head.format->quantised() || head.rows < 4096) return false;
  return head.panel_bytes() > plane_of(head).panel_bytes() * 5 / 4;
}

int64_t screen_bytes(const Packed& head) {
  return whole_lines(static_cast<int64_t>(plane_of(head).bytes())) +
         whole_lines(head.panels() * head.blocks() * kPanelRows) + 2 * whole_lines(head.panels() * 4) +
         whole_lines(head.cols * 4) + static_cast<int64_t>(kArenaSlack);
}

Screen screen_at(const Packed& head, const uint8_t* data) {
  Screen s;
  s.plane = plane_of(head);
  s.plane.data = data;
  s.norms = data + whole_lines(static_cast<int64_t>(s.plane.bytes()));
  s.units = reinterpret_cast<const float*>(s.norms + whole_lines(head.panels() * head.blocks() * kPanelRows));
  s.longest = s.units + whole_lines(head.panels() * 4) / 4;
  s.sizes = s.longest + whole_lines(head.panels() * 4) / 4;
  return s;
}

void build_screen(const Packed& head, const std::vector<float>& usual, uint8_t* data) {
  const Screen screen = screen_at(head, data);
  double mean = 0;
  for (float u : usual) mean += u / static_cast<double>(usual.size());
  std::vector<float> sizes(usual.size(), 1.0f);
  if (std::isfinite(mean) && mean > 0)
    for (size_t k = 0; k < sizes.size(); k++)
      sizes[k] = static_cast<float>(std::sqrt(std::max(usual[k] / mean, 1.0 / 64)));
  std::memcpy(const_cast<float*>(screen.sizes), sizes.data(), sizes.size() * 4);
  const FormatInfo& q4 = *screen.plane.format;
  const int64_t blocks = head.blocks(), block_bytes = q4.file_bytes;
  std::vector<float> row(static_cast<size_t>(head.cols));
  std::vector<uint8_t> file(static_cast<size_t>(blocks * block_bytes * kPanelRows));
  std::vector<double> norms(static_cast<size_t>(blocks * kPanelRows));
  for (int64_t p = 0; p < head.panels(); p++) {
    std::fill(norms.begin(), norms.end(), 0.0);
    const int64_t rows = std::min<int64_t>(kPanelRows, head.rows - p * kPanelRows);
    for (int64_t i = 0; i < rows; i++) {
      unpack_row(head, p * kPanelRows + i, row.data());
      for (int64_t b = 0; b < blocks; b++) {
        const float* w = row.data() + b * kBlock;
        float widest = 0;
        for (int k = 0; k < kBlock; k++)
          if (std::fabs(w[k]) > std::fabs(widest)) widest = w[k];
        uint8_t* block = file.data() + (i * blocks + b) * block_bytes;
        const uint16_t step_bits = float_to_half(widest / -8.0f);
        std::memcpy(block, &step_bits, 2);
        const float step = half_to_float(step_bits), inverse = step != 0 ? 1.0f / step : 0.0f;
        double error = 0, size = 0;
        int codes[kBlock];
        for (int k = 0; k < kBlock; k++) {
          const float code = std::nearbyint(w[k] * inverse);
          codes[k] = code > 7 ? 15 : code > -8 ? static_cast<int>(code) + 8 : 0;  // NaN: 0
          const double d = sizes[static_cast<size_t>(b * kBlock + k)], v = static_cast<double>(step) * (codes[k] - 8);
          error += (w[k] - v) * (w[k] - v) * d * d, size += w[k] * w[k] * d * d;
        }
        for (int k = 0; k < kBlock / 2; k++) block[2 + k] = static_cast<uint8_t>(codes[k] | codes[k + kBlock / 2] << 4);
        norms[static_cast<size_t>(b * kPanelRows + i)] = std::sqrt(error) + kRounding * std::sqrt(size);
      }
    }
    double widest = 0, longest = 0;
    bool finite = true;
    for (int64_t i = 0; i < kPanelRows; i++) {
      double square = 0;
      for (int64_t b = 0; b < blocks; b++) {
        const double n = norms[static_cast<size_t>(b * kPanelRows + i)];
        square += n * n, widest = std::max(widest, n), finite = finite && std::isfinite(n);
      }
      longest = std::max(longest, std::sqrt(square));
    }
    const float unit = finite ? static_cast<float>(widest / 255 * 1.000001) : INFINITY;
    const_cast<float*>(screen.units)[p] = unit;
    const_cast<float*>(screen.longest)[p] = finite ? static_cast<float>(longest * 1.000001) : INFINITY;
    uint8_t* bytes = const_cast<uint8_t*>(screen.norms) + p * blocks * kPanelRows;
    for (size_t j = 0; j < norms.size(); j++)
      bytes[j] = finite && unit > 0 ? static_cast<uint8_t>(std::min(255.0, std::ceil(norms[j] / unit))) : 255;
    // The packer counts panels from the matrix's first row
    Packed one = screen.plane;
    one.rows = rows, one.data = nullptr;
    pack_panels(q4, file.data(), one, const_cast<uint8_t*>(screen.plane.panel(p)), 0, 1);
  }
}

}  // namespace gemkit
