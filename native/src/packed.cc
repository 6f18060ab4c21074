#include "packed.h"

#include <cstring>

#include "kernels/half.h"

namespace gemkit {
namespace {

constexpr FormatInfo kFormats[] = {
    // type  name   elements bytes  R  offset sub  k      min
    {kF32, "F32", 1, 4, 0, -1, 1, false, false},     {kF16, "F16", 1, 2, 0, -1, 1, false, false},
    {kBF16, "BF16", 1, 2, 0, -1, 1, false, false},   {kQ4_0, "Q4_0", 32, 18, 0, 3, 1, false, false},
    {kQ4_1, "Q4_1", 32, 20, 0, -1, 1, false, true},  {kQ5_0, "Q5_0", 32, 22, 1, 4, 1, false, false},
    {kQ5_1, "Q5_1", 32, 24, 1, -1, 1, false, true},  {kQ8_0, "Q8_0", 32, 34, 4, 7, 1, false, false},
    {kQ4_K, "Q4_K", 256, 144, 0, -1, 1, true, true}, {kQ5_K, "Q5_K", 256, 176, 1, -1, 1, true, true},
    {kQ6_K, "Q6_K", 256, 210, 2, 5, 2, true, false},
};

uint16_t read_u16(const uint8_t* p) {
  uint16_t v;
  std::memcpy(&v, p, 2);
  return v;
}
uint32_t read_u32(const uint8_t* p) {
  uint32_t v;
  std::memcpy(&v, p, 4);
  return v;
}

// One row's share of a block: 32 codes, its scales as the file holds them.
struct RowBlock {
  alignas(16) uint8_t codes[32];
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

void add_fifth_bits(uint32_t bits, uint8_t* codes) {
  for (int i = 0; i < 32; i++) codes[i] = static_cast<uint8_t>(codes[i] | (bits >> i & 1) << 4);
}

// Block b of one row; `row` is the row's first byte in the file.
void decode_block(GgmlType type, const uint8_t* row, int64_t b, RowBlock& out) {
  auto split_nibbles = [&](const uint8_t* q) {
    for (int i = 0; i < 16; i++) out.codes[i] = q[i] & 15, out.codes[i + 16] = q[i] >> 4;
  };
  const uint8_t* s;
  int j = static_cast<int>(b % 8), g = j / 2;
  switch (type) {
    case kQ4_0:
      s = row + b * 18, out.scale = read_u16(s), split_nibbles(s + 2);
      break;
    case kQ4_1:
      s = row + b * 20, out.scale = read_u16(s), out.minimum = read_u16(s + 2), split_nibbles(s + 4);
      break;
    case kQ5_0:
      s = row + b * 22, out.scale = read_u16(s), split_nibbles(s + 6), add_fifth_bits(read_u32(s + 2), out.codes);
      break;
    case kQ5_1:
      s = row + b * 24, out.scale = read_u16(s), out.minimum = read_u16(s + 2);
      split_nibbles(s + 8), add_fifth_bits(read_u32(s + 4), out.codes);
      break;
    case kQ8_0:
      s = row + b * 34, out.scale = read_u16(s);
      for (int i = 0; i < 32; i++) out.codes[i] = s[2 + i] ^ 0x80;
      break;
    case kQ4_K:
    case kQ5_K: {
      s = row + b / 8 * (type == kQ4_K ? 144 : 176);
      out.scale = read_u16(s), out.minimum = read_u16(s + 2);
      k_scales(s + 4, j, out.sub_scale[0], out.sub_minimum);
      const uint8_t* q = s + (type == kQ4_K ? 16 : 48) + 32 * g;
      for (int i = 0; i < 32; i++) out.codes[i] = (q[i] >> 4 * (j & 1)) & 15;
      if (type == kQ5_K)
        for (int i = 0; i < 32; i++) out.codes[i] = static_cast<uint8_t>(out.codes[i] | (s[16 + i] >> j & 1) << 4);
      break;
    }
    case kQ6_K: {
      s = row + b / 8 * 210;
      out.scale = read_u16(s + 208);
      const uint8_t *low = s + 64 * (j / 4) + 32 * (j & 1), *high = s + 128 + 32 * (j / 4);
      int shift = j % 4 >= 2 ? 4 : 0, two = 2 * (j % 4);
      for (int i = 0; i < 32; i++)
        out.codes[i] = static_cast<uint8_t>((low[i] >> shift & 15) | (high[i] >> two & 3) << 4);
      out.sub_scale[0] = s[192 + 2 * j], out.sub_scale[1] = s[193 + 2 * j];
      break;
    }
    default:
      break;
  }
}

void place(const FormatInfo& f, const RowBlock& block, int row, uint8_t* record, uint8_t* super) {
  const int R = f.residual_bits;
  uint32_t quads[8], planes[4], residual[4] = {0, 0, 0, 0};
  std::memcpy(quads, block.codes, 32);
  constexpr uint32_t kLow = 0x0f0f0f0fu;
  for (int j = 0; j < 4; j++) {
    uint32_t a = quads[2 * j], b = quads[2 * j + 1];
    if (R == 4) {
      planes[j] = (a >> 4 & kLow) | (b & (kLow << 4));
      residual[j] = (a & kLow) | (b & kLow) << 4;
    } else {
      planes[j] = (a & kLow) | (b & kLow) << 4;
    }
  }
  if (R == 1)
    for (int q = 0; q < 8; q++) residual[0] |= (quads[q] >> 4 & 0x01010101u) << q;
  if (R == 2)
    for (int q = 0; q < 8; q++) residual[q / 4] |= (quads[q] >> 4 & 0x03030303u) << 2 * (q % 4);
  for (int j = 0; j < 4; j++) std::memcpy(record + 64 * j + 4 * row, &planes[j], 4);
  for (int j = 0; j < R; j++) std::memcpy(record + 256 + 64 * j + 4 * row, &residual[j], 4);
  uint8_t* scales = record + 256 + 64 * R;
  if (f.k_quant) {
    scales[row] = block.sub_scale[0];
    scales[16 + row] = f.has_minimum ? block.sub_minimum : block.sub_scale[1];
    if (super) {
      std::memcpy(super + 2 * row, &block.scale, 2);
      if (f.has_minimum) std::memcpy(super + 32 + 2 * row, &block.minimum, 2);
    }
  } else {
    std::memcpy(scales + 2 * row, &block.scale, 2);
    if (f.has_minimum) std::memcpy(scales + 32 + 2 * row, &block.minimum, 2);
  }
}

// scale and minimum of half h (16 columns) of a decoded block, as float32
void block_scales(const FormatInfo& f, const RowBlock& block, int h, float& scale, float& minimum) {
  scale = half_to_float(block.scale), minimum = f.has_minimum ? half_to_float(block.minimum) : 0.0f;
  if (!f.k_quant) return;
  if (f.has_minimum) {
    scale *= static_cast<float>(block.sub_scale[0]);
    minimum = -(minimum * static_cast<float>(block.sub_minimum));
  } else {
    scale *= static_cast<float>(static_cast<int8_t>(block.sub_scale[h]));
  }
}

void dequantise_block(const FormatInfo& f, const RowBlock& block, float* out, int64_t stride) {
  for (int h = 0; h < 2; h++) {
    float scale, minimum;
    block_scales(f, block, h, scale, minimum);
    for (int i = 16 * h; i < 16 * h + 16; i++) {
      float v = scale * static_cast<float>(block.codes[i] - f.offset());
      out[i * stride] = f.has_minimum ? v + minimum : v;
    }
  }
}

// Undo place(): the codes and scales of one row of a record.
void unplace(const FormatInfo& f, const uint8_t* record, const uint8_t* super, int row, RowBlock& block) {
  const int R = f.residual_bits;
  for (int k = 0; k < 32; k++) {
    int q = k / 4, at = 4 * row + k % 4;
    int nibble = record[64 * (q / 2) + at] >> 4 * (q & 1) & 15;
    const uint8_t* r = record + 256;
    int code = nibble;
    if (R == 1) code |= (r[at] >> q & 1) << 4;
    if (R == 2) code |= (r[64 * (q / 4) + at] >> 2 * (q % 4) & 3) << 4;
    if (R == 4) code = nibble << 4 | (r[64 * (q / 2) + at] >> 4 * (q & 1) & 15);
    block.codes[k] = static_cast<uint8_t>(code);
  }
  const uint8_t* scales = record + 256 + 64 * R;
  if (f.k_quant) {
    block.sub_scale[0] = scales[row];
    block.sub_scale[1] = block.sub_minimum = scales[16 + row];
    block.scale = read_u16(super + 2 * row);
    if (f.has_minimum) block.minimum = read_u16(super + 32 + 2 * row);
  } else {
    block.scale = read_u16(scales + 2 * row);
    if (f.has_minimum) block.minimum = read_u16(scales + 32 + 2 * row);
  }
}

float read_float(GgmlType type, const uint8_t* p, int64_t i) {
  if (type == kF32) {
    float v;
    std::memcpy(&v, p + 4 * i, 4);
    return v;
  }
  return type == kF16 ? half_to_float(read_u16(p + 2 * i)) : bf16_to_float(read_u16(p + 2 * i));
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
                       static_cast<size_t>(b / 8) * out.format->super_bytes();
      for (int i = 0; i < rows; i++) {
        decode_block(source.type, first + row_bytes * i, b, block);
        if (!out.format->quantised())
          dequantise_block(source, block, reinterpret_cast<float*>(panel) + b * kBlock * kPanelRows + i, kPanelRows);
        else
          place(source, block, i, super + source.super_bytes(), source.k_quant && b % 8 == 0 ? super : nullptr);
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
    const uint8_t* super = f.k_quant ? w.record(p, b / 8 * 8) - f.super_bytes() : nullptr;
    unplace(f, w.record(p, b), super, row, block);
    dequantise_block(f, block, out + b * kBlock, 1);
  }
}

}  // namespace gemkit
