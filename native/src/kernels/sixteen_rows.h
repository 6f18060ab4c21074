// The quantised product of an instruction set that works on a panel's sixteen rows at once. Ends a translation unit
// that has defined RecordCodes, ChunkCodes, add_block (one block into the sums of M rows) and kAhead.
#pragma once
#include "int8_driver.h"

namespace gemkit::GEMKIT_ISA {

template <class F, int M>
GEMKIT_NOINLINE static void fused_panel(const Product& product, int64_t m, int64_t p) {
  const Packed& w = *product.w;
  const ActivationBlock* a[M];
  f32x16 f[M];
#pragma GCC unroll 16
  for (int i = 0; i < M; i++) a[i] = product.a->blocks + (m + i) * product.a->per_row, f[i] = zero();
  const uint8_t *record = w.panel(p), *super = record;
  for (int64_t b = 0; b < w.blocks(); b++) {
    if (F::kQuant && b % kSuperBlocks == 0) super = record, record += F::kSuperBytes;
    if constexpr (kAhead > 0)
      for (int line = 0; line < F::kRecord; line += 64) prefetch(record + kAhead + line);
    add_block<F, M>(
        f, RecordCodes<F>{record}, a, [&](int sub) { return record_scale<F>(record, super, sub); },
        [&] { return record_minimum<F>(record, super); });
    record += F::kRecord;
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) a[i]++;
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; i++) store(product.y + (m + i) * product.ldy + p * kPanelRows, f[i]);
}

template <class F, int M>
static void fused_panels(const Product& product, int64_t m, int64_t p0, int64_t p1) {
  for (int64_t p = p0; p < p1; p++) fused_panel<F, M>(product, m, p);
}

template <class F, int M>
GEMKIT_NOINLINE static void tile(const Chunk& chunk, int count, const ActivationBlock* const* rows, float* const* y,
                                 bool first) {
  const ActivationBlock* a[M];
  f32x16 f[M];
#pragma GCC unroll 16
  for (int i = 0; i < M; i++) a[i] = rows[i], f[i] = first ? zero() : load(y[i]);
  for (int b = 0; b < count; b++) {
    add_block<F, M>(
        f, ChunkCodes<F>{chunk.codes + kUnpacked * b}, a, [&](int sub) { return load(chunk.scale[b * F::kSub + sub]); },
        [&] { return load(chunk.minimum[b]); });
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) a[i]++;
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; i++) store(y[i], f[i]);
}

}  // namespace gemkit::GEMKIT_ISA
