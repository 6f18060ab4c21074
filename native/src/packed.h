// One packed weight family for every GGUF type that Gemma is published in, and the only description of its layout.
//
// A quantised weight is  scale · (code − offset) + minimum,  codes of 4 bits plus 0, 1, 2 or 4 more. Rows are taken 16
// at a time (a panel), columns 32 at a time (a block). A quad is 4 neighbouring columns of a block. A plane vector has
// 4 bytes for each row of the panel, one for each column of a quad. A block of a panel is one record:
//   nibble plane     4 vectors  vector j holds quad 2j in its low and quad 2j + 1 in its high nibbles
//   residual plane   R vectors  R = 1: bit q of each byte is bit 4 of quad q;  R = 2: vector q/4, bits 2·(q%4)…;
//                               R = 4: low nibbles laid out as the nibble plane, which then holds the high ones
//   scales           f16[16] (and f16[16] minima), or for K-quants 16 or 32 bytes of sub-scales (and sub-minima)
// K-quants put f16[16] super-scales (and super-minima) in front of every 8 blocks. Nothing is rounded: codes and scales
// are the file's. Float weights are panels of 16 interleaved rows: element [k][row].
#pragma once
#include <cstddef>
#include <cstdint>

// Each instruction set's translation unit must keep its own copy of what it calls: a shared inline function could be
// linked in the form that needs the newest processor. So members here are always inlined.
#if defined(_MSC_VER)
#define GEMKIT_MEMBER __forceinline
#else
#define GEMKIT_MEMBER inline __attribute__((always_inline))
#endif

namespace gemkit {

// ggml's numbers
enum GgmlType : int32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kBF16 = 30,
};

constexpr int kPanelRows = 16;
constexpr int kBlock = 32;                      // columns
constexpr int kSuper = 256;                     // columns under one super-scale
constexpr int kSuperBlocks = kSuper / kBlock;   // blocks under one super-scale
constexpr int kQuad = 4;                        // columns
constexpr int kQuads = kBlock / kQuad;          // in a block
constexpr int kVector = kQuad * kPanelRows;     // bytes of a plane vector
constexpr int kPlane = kVector * kQuads / 2;    // bytes of the nibble plane
constexpr int kPanelHalves = 2 * kPanelRows;    // bytes of one f16 for each row
constexpr int kUnpacked = kBlock * kPanelRows;  // bytes of a block with a byte for each code

struct FormatInfo {
  GgmlType type;
  const char* name;
  int file_elements, file_bytes;  // one block in a file
  int residual_bits;              // R: code bits above (R = 4: below) the nibble plane
  int offset_log2;                // offset = 1 << offset_log2, or 0 where -1
  int sub_blocks;                 // scales per 32 columns
  bool k_quant, has_minimum;

  GEMKIT_MEMBER constexpr bool quantised() const { return file_elements > 1; }
  GEMKIT_MEMBER constexpr int offset() const { return offset_log2 < 0 ? 0 : 1 << offset_log2; }
  GEMKIT_MEMBER constexpr int scales_at() const { return kPlane + kVector * residual_bits; }
  GEMKIT_MEMBER constexpr int record_bytes() const {
    return scales_at() + (has_minimum && !k_quant ? 2 * kPanelHalves : kPanelHalves);
  }
  GEMKIT_MEMBER constexpr int super_bytes() const { return k_quant ? (has_minimum ? 2 : 1) * kPanelHalves : 0; }
};

// All formats: the loader, the kernels' choice of code and the check at start go by this table alone.
inline constexpr FormatInfo kFormats[] = {
    // type  name   elements bytes  R  offset sub  k      min
    {kF32, "F32", 1, 4, 0, -1, 1, false, false},     {kF16, "F16", 1, 2, 0, -1, 1, false, false},
    {kBF16, "BF16", 1, 2, 0, -1, 1, false, false},   {kQ4_0, "Q4_0", 32, 18, 0, 3, 1, false, false},
    {kQ4_1, "Q4_1", 32, 20, 0, -1, 1, false, true},  {kQ5_0, "Q5_0", 32, 22, 1, 4, 1, false, false},
    {kQ5_1, "Q5_1", 32, 24, 1, -1, 1, false, true},  {kQ8_0, "Q8_0", 32, 34, 4, 7, 1, false, false},
    {kQ4_K, "Q4_K", 256, 144, 0, -1, 1, true, true}, {kQ5_K, "Q5_K", 256, 176, 1, -1, 1, true, true},
    {kQ6_K, "Q6_K", 256, 210, 2, 5, 2, true, false},
};
constexpr int kFormatCount = sizeof kFormats / sizeof kFormats[0];

// nullptr for a type that is not supported
const FormatInfo* find_format(int32_t type);

// A matrix [rows, cols] in packed form. Rows past the last are zero.
struct Packed {
  const FormatInfo* format = nullptr;
  int64_t rows = 0, cols = 0;
  const uint8_t* data = nullptr;

  GEMKIT_MEMBER int64_t panels() const { return (rows + kPanelRows - 1) / kPanelRows; }
  GEMKIT_MEMBER int64_t blocks() const { return cols / kBlock; }
  GEMKIT_MEMBER size_t panel_bytes() const {
    if (!format->quantised()) return static_cast<size_t>(cols) * kPanelRows * format->file_bytes;
    return static_cast<size_t>(blocks()) * format->record_bytes() +
           static_cast<size_t>(cols / kSuper) * format->super_bytes();
  }
  GEMKIT_MEMBER size_t bytes() const { return panel_bytes() * panels(); }
  GEMKIT_MEMBER const uint8_t* panel(int64_t p) const { return data + panel_bytes() * p; }
  // The record of block b of panel p, and the super-scales that it is under.
  GEMKIT_MEMBER const uint8_t* record(int64_t p, int64_t b) const {
    return panel(p) + static_cast<size_t>(b) * format->record_bytes() +
           (format->k_quant ? static_cast<size_t>(b / kSuperBlocks + 1) * format->super_bytes() : 0);
  }
  GEMKIT_MEMBER const uint8_t* super(int64_t p, int64_t b) const {
    return record(p, b / kSuperBlocks * kSuperBlocks) - format->super_bytes();
  }
};

// Rows rounded up to whole panels: the row length of every product's output.
static inline int64_t padded(int64_t rows) { return (rows + kPanelRows - 1) / kPanelRows * kPanelRows; }

// Packs the panels [p0, p1) from a matrix as it stands in a GGUF file, rows contiguous, into `to`, out.bytes() zeroed
// bytes. `out` has the shape and format; with the format float32 and a quantised source the values are dequantised.
void pack_panels(const FormatInfo& source, const uint8_t* file, const Packed& out, uint8_t* to, int64_t p0, int64_t p1);

// Row r as float32[cols].
void unpack_row(const Packed& w, int64_t r, float* out);

}  // namespace gemkit
