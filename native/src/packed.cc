// Packing matrices from a file's blocks, and rows of packed matrices as floats.
#include "packed.h"

#include <cstring>

#include "kernels/half.h"

namespace gemkit {
namespace {

template <class T>
T read(const uint8_t* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// One row of a block: its codes, and its scales as the file holds them.
struct RowBlock {
  alignas(16) uint8_t codes[kBlock];
  uint16_t scale = 0, minimum = 0;  // f16
  uint8_t sub_scale[2] = {0, 0};    // K-quants: 6 bits unsigned, or 8 signed
  uint8_t sub_minimum = 0;
};

// The 6-bit scale and minimum of sub-block j of a Q4_K or Q5_K super-block (12 bytes for 8 pairs).
void k_scales(const uint8_t* s, int j, uint8_t& scale, uint8_t& minimum) {
  if (j < 4) {
    scale = s[j] & 63, minimum = s[j + 4] & 63;
  } else {
    scale = static_cast<uint8_t>((s[j + 4] & 15) | (s[j - 4] >> 6) << 4);
    minimum = static_cast<uint8_t>((s[j + 4] >> 4) | (s[j] >> 6) << 4);
  }
}

// Codes of kBlock nibbles: the low ones are the first half.
void split_nibbles(const uint8_t* q, uint8_t* codes) {
  for (int i = 0; i < kBlock / 2; i++) codes[i] = q[i] & 15, codes[i + kBlock / 2] = q[i] >> 4;
}

// Sub-block j of a Q4_K or Q5_K super-block: f16 scale and minimum, 12 bytes of sub-scales, fifth bits, nibbles.
void decode_k(const FormatInfo& f, const uint8_t* s, int j, RowBlock& out) {
  constexpr int kSubScales = 4, kBits = 16;
  out.scale = read<uint16_t>(s), out.minimum = read<uint16_t>(s + 2);
  k_scales(s + kSubScales, j, out.sub_scale[0], out.sub_minimum);
  const uint8_t *bits = s + kBits, *q = bits + kBlock * (f.residual_bits + j / 2);
  for (int i = 0; i < kBlock; i++) {
    out.codes[i] = (q[i] >> 4 * (j & 1)) & 15;
    if (f.residual_bits) out.codes[i] = static_cast<uint8_t>(out.codes[i] | (bits[i] >> j & 1) << 4);
  }
}

// Sub-block j of a Q6_K super-block: nibbles, pairs of high bits, sub-scales, f16 scale.
void decode_q6_k(const uint8_t* s, int j, RowBlock& out) {
  constexpr int kHigh = kSuper / 2, kSubScales = kHigh + kSuper / 4, kScale = kSubScales + 16;
  out.scale = read<uint16_t>(s + kScale);
  const uint8_t *low = s + 2 * kBlock * (j / 4) + kBlock * (j & 1), *high = s + kHigh + kBlock * (j / 4);
  const int shift = j % 4 >= 2 ? 4 : 0, two = 2 * (j % 4);
  for (int i = 0; i < kBlock; i++)
    out.codes[i] = static_cast<uint8_t>((low[i] >> shift & 15) | (high[i] >> two & 3) << 4);
  std::memcpy(out.sub_scale, s + kSubScales + 2 * j, 2);
}

// Block b of one row; `row` is the row's first byte in the file.
void decode_block(const FormatInfo& f, const uint8_t* row, int64_t b, RowBlock& out) {
  const uint8_t* s = row + b * kBlock / f.file_elements * f.file_bytes;
  const int j = static_cast<int>(b % kSuperBlocks);
  if (f.k_quant) return f.has_minimum ? decode_k(f, s, j, out) : decode_q6_k(s, j, out);
  out.scale = read<uint16_t>(s), s += 2;
  if (f.has_minimum) out.minimum = read<uint16_t>(s), s += 2;
  if (f.residual_bits == 4) {  // signed bytes
    for (int i = 0; i < kBlock; i++) out.codes[i] = s[i] ^ 0x80;
  } else if (f.residual_bits == 1) {
    const uint32_t fifth = read<uint32_t>(s);
    split_nibbles(s + 4, out.codes);
    for (int i = 0; i < kBlock; i++) out.codes[i] = static_cast<uint8_t>(out.codes[i] | (fifth >> i & 1) << 4);
  } else {
    split_nibbles(s, out.codes);
  }
}

// Writes one row of a record; `super`: its super-scales, or null where they are written already.
void place(const FormatInfo& f, const RowBlock& block, int row, uint8_t* record, uint8_t* super) {
  const int R = f.residual_bits;
  constexpr int kPlanes = kQuads / 2;
  uint32_t quads[kQuads], planes[kPlanes], residual[kPlanes] = {};
  std::memcpy(quads, block.codes, kBlock);
  constexpr uint32_t kLow = 0x0f0f0f0fu;
  for (int j = 0; j < kPlanes; j++) {
    uint32_t a = quads[2 * j], b = quads[2 * j + 1];
    if (R == 4) {
      planes[j] = (a >> 4 & kLow) | (b & (kLow << 4));
      residual[j] = (a & kLow) | (b & kLow) << 4;
    } else {
      planes[j] = (a & kLow) | (b & kLow) << 4;
    }
  }
  for (int q = 0; q < kQuads; q++) {
    if (R == 1) residual[0] |= (quads[q] >> 4 & 0x01010101u) << q;
    if (R == 2) residual[q / 4] |= (quads[q] >> 4 & 0x03030303u) << 2 * (q % 4);
  }
  for (int j = 0; j < kPlanes; j++) std::memcpy(record + kVector * j + kQuad * row, &planes[j], kQuad);
  for (int j = 0; j < R; j++) std::memcpy(record + kPlane + kVector * j + kQuad * row, &residual[j], kQuad);
  uint8_t *scales = record + f.scales_at(), *halves = f.k_quant ? super : scales;
  if (f.k_quant) {
    scales[row] = block.sub_scale[0];
    scales[kPanelRows + row] = f.has_minimum ? block.sub_minimum : block.sub_scale[1];
  }
  if (!halves) return;
  std::memcpy(halves + 2 * row, &block.scale, 2);
  if (f.has_minimum) std::memcpy(halves + kPanelHalves + 2 * row, &block.minimum, 2);
}

void dequantise_block(const FormatInfo& f, const RowBlock& block, float* out, int64_t stride) {
  for (int h = 0; h < 2; h++) {
    float scale = half_to_float(block.scale), minimum = f.has_minimum ? half_to_float(block.minimum) : 0.0f;
    if (f.k_quant) {
      scale *= static_cast<float>(f.has_minimum ? block.sub_scale[0] : static_cast<int8_t>(block.sub_scale[h]));
      minimum = -(minimum * static_cast<float>(block.sub_minimum));
    }
    for (int i = kBlock / 2 * h; i < kBlock / 2 * (h + 1); i++) {
      float v = scale * static_cast<float>(block.codes[i] - f.offset());
      out[i * stride] = f.has_minimum ? v + minimum : v;
    }
  }
}

// Reads one row of a record that place() wrote.
void unplace(const FormatInfo& f, const uint8_t* record, const uint8_t* super, int row, RowBlock& block) {
  const int R = f.residual_bits;
  const uint8_t* residual = record + kPlane;
  for (int k = 0; k < kBlock; k++) {
    int q = k / kQuad, at = kQuad * row + k % kQuad;
    int code = record[kVector * (q / 2) + at] >> 4 * (q & 1) & 15;
    if (R == 1) code |= (residual[at] >> q & 1) << 4;
    if (R == 2) code |= (residual[kVector * (q / 4) + at] >> 2 * (q % 4) & 3) << 4;
    if (R == 4) code = code << 4 | (residual[kVector * (q / 2) + at] >> 4 * (q & 1) & 15);
    block.codes[k] = static_cast<uint8_t>(code);
  }
  const uint8_t *scales = record + f.scales_at(), *halves = f.k_quant ? super : scales;
  if (f.k_quant) block.sub_scale[0] = scales[row], block.sub_scale[1] = block.sub_minimum = scales[kPanelRows + row];
  block.scale = read<uint16_t>(halves + 2 * row);
  if (f.has_minimum) block.minimum = read<uint16_t>(halves + kPanelHalves + 2 * row);
}

float read_float(GgmlType type, const uint8_t* p, int64_t i) {
  if (type == kF32) return read<float>(p + 4 * i);
  const uint16_t bits = read<uint16_t>(p + 2 * i);
  return type == kF16 ? half_to_float(bits) : bf16_to_float(bits);
}

}  // namespace

const FormatInfo* find_format(int32_t type) {
  for (const auto& f : kFormats)
    if (f.type == type) return &f;
  return nullptr;
}

void pack_panels(const FormatInfo& source, const uint8_t* file, const Packed& out, uint8_t* to, int64_t p0,
                 int64_t p1) {
  const size_t row_bytes = static_cast<size_t>(out.cols / source.file_elements) * source.file_bytes;
  const size_t panel_bytes = out.panel_bytes();
  for (int64_t p = p0; p < p1; p++) {
    uint8_t* panel = to + panel_bytes * p;
    const int rows = static_cast<int>(out.rows - p * kPanelRows < kPanelRows ? out.rows - p * kPanelRows : kPanelRows);
    const uint8_t* first = file + row_bytes * p * kPanelRows;
    if (!source.quantised()) {
      const int size = source.file_bytes;
      for (int i = 0; i < rows; i++)
        for (int64_t k = 0; k < out.cols; k++)
          std::memcpy(panel + (k * kPanelRows + i) * size, first + row_bytes * i + k * size, size);
      continue;
    }
    RowBlock block;
    for (int64_t b = 0; b < out.cols / kBlock; b++) {
      uint8_t* super = panel + static_cast<size_t>(b) * out.format->record_bytes() +
                       static_cast<size_t>(b / kSuperBlocks) * out.format->super_bytes();
      for (int i = 0; i < rows; i++) {
        decode_block(source, first + row_bytes * i, b, block);
        if (!out.format->quantised())
          dequantise_block(source, block, reinterpret_cast<float*>(panel) + b * kBlock * kPanelRows + i, kPanelRows);
        else
          place(source, block, i, super + source.super_bytes(), b % kSuperBlocks == 0 ? super : nullptr);
      }
    }
  }
}

void unpack_row(const Packed& w, int64_t r, float* out) {
  const FormatInfo& f = *w.format;
  const int64_t p = r / kPanelRows;
  const int row = static_cast<int>(r % kPanelRows);
  if (!f.quantised()) {
    for (int64_t k = 0; k < w.cols; k++) out[k] = read_float(f.type, w.panel(p), k * kPanelRows + row);
    return;
  }
  RowBlock block;
  for (int64_t b = 0; b < w.blocks(); b++) {
    unplace(f, w.record(p, b), w.super(p, b), row, block);
    dequantise_block(f, block, out + b * kBlock, 1);
  }
}

}  // namespace gemkit
