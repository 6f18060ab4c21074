// Packing and the inner loops: against formulas written here, and every path against every other, bit for bit.
#include <cmath>
#include <cstring>

#include "check.h"
#include "kernels/half.h"
#include "os.h"

using namespace gemkit;

namespace {

constexpr double kPi = 3.14159265358979323846;
const GgmlType kTypes[] = {kQ4_0, kQ4_1, kQ5_0, kQ5_1, kQ8_0, kQ4_K, kQ5_K, kQ6_K, kF32, kF16, kBF16};

// Random file bytes whose scales are of ordinary size.
std::vector<uint8_t> random_file(GgmlType type, int64_t rows, int64_t cols, Random& random) {
  const FormatInfo& f = *find_format(type);
  std::vector<uint8_t> bytes(static_cast<size_t>(rows * (cols / f.file_elements) * f.file_bytes));
  for (auto& b : bytes) b = static_cast<uint8_t>(random.bits());
  auto put_half = [&](size_t at, float v) {
    const uint16_t h = float_to_half(v);
    std::memcpy(&bytes[at], &h, 2);
  };
  for (size_t at = 0; at < bytes.size(); at += static_cast<size_t>(f.file_bytes)) {
    const float scale = 0.002f + 0.01f * random.uniform();
    if (type == kF32) {
      const float v = random.normal();
      std::memcpy(&bytes[at], &v, 4);
    } else if (type == kF16) {
      put_half(at, random.normal());
    } else if (type == kBF16) {
      const float v = random.normal();
      std::memcpy(&bytes[at], reinterpret_cast<const uint8_t*>(&v) + 2, 2);
    } else if (type == kQ6_K) {
      put_half(at + 208, scale / 32);
    } else {
      put_half(at, f.k_quant ? scale / 32 : scale);
      if (f.has_minimum) put_half(at + 2, f.k_quant ? scale / 16 : -scale * 8);
    }
  }
  return bytes;
}

// Element (r, k) of a file, straight from the published block layouts: code, scale and minimum, w =
// scale·(code−offset)+minimum.
struct Element {
  int code;
  float scale, minimum;
};
Element element(GgmlType type, const uint8_t* row, int64_t k) {
  auto half = [](const uint8_t* p) { return half_to_float(static_cast<uint16_t>(p[0] | p[1] << 8)); };
  const int64_t i = k % 32;
  auto nibble = [&](const uint8_t* q) { return i < 16 ? q[i] & 15 : q[i - 16] >> 4; };
  auto fifth = [&](const uint8_t* q) { return (q[i / 8] >> i % 8 & 1) << 4; };
  switch (type) {
    case kQ4_0:
      row += k / 32 * 18;
      return {nibble(row + 2), half(row), 0};
    case kQ4_1:
      row += k / 32 * 20;
      return {nibble(row + 4), half(row), half(row + 2)};
    case kQ5_0:
      row += k / 32 * 22;
      return {nibble(row + 6) | fifth(row + 2), half(row), 0};
    case kQ5_1:
      row += k / 32 * 24;
      return {nibble(row + 8) | fifth(row + 4), half(row), half(row + 2)};
    case kQ8_0:
      row += k / 32 * 34;
      return {static_cast<int8_t>(row[2 + i]) + 128, half(row), 0};
    case kQ4_K:
    case kQ5_K: {
      row += k / 256 * (type == kQ4_K ? 144 : 176);
      const int e = static_cast<int>(k % 256), j = e / 32;
      const uint8_t* s = row + 4;
      const int sc = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | (s[j - 4] >> 6 << 4);
      const int mn = j < 4 ? s[j + 4] & 63 : (s[j + 4] >> 4) | (s[j] >> 6 << 4);
      const uint8_t q = row[(type == kQ4_K ? 16 : 48) + e / 64 * 32 + e % 32];
      int code = e % 64 < 32 ? q & 15 : q >> 4;
      if (type == kQ5_K) code |= (row[16 + e % 32] >> j & 1) << 4;
      return {code, half(row) * static_cast<float>(sc), -(half(row + 2) * static_cast<float>(mn))};
    }
    default: {
      row += k / 256 * 210;
      const int e = static_cast<int>(k % 256), n = e / 128, l = e % 32, quarter = e % 128 / 32;
      const uint8_t low = row[64 * n + l + (quarter & 1) * 32];
      const int code = (quarter < 2 ? low & 15 : low >> 4) | (row[128 + 32 * n + l] >> 2 * quarter & 3) << 4;
      return {code, half(row + 208) * static_cast<float>(static_cast<int8_t>(row[192 + e / 16])), 0};
    }
  }
}

float file_float(GgmlType type, const uint8_t* p) {
  float v;
  if (type == kF32) return std::memcpy(&v, p, 4), v;
  const uint16_t h = static_cast<uint16_t>(p[0] | p[1] << 8);
  return type == kF16 ? half_to_float(h) : bf16_to_float(h);
}

struct Matrix {
  std::vector<uint8_t> file;
  Arena memory;
  Packed packed;
};
void make(Matrix& m, GgmlType type, int64_t rows, int64_t cols, Random& random) {
  m.file = random_file(type, rows, cols, random);
  m.packed.format = find_format(type), m.packed.rows = rows, m.packed.cols = cols;
  CHECK(m.memory.allocate(m.packed.bytes()), "memory");
  pack_panels(*m.packed.format, m.file.data(), m.packed, m.memory.data, 0, m.packed.panels());
  m.packed.data = m.memory.data;
}

void test_unpack(GgmlType type) {
  Random random(type + 1);
  const int64_t rows = 37, cols = 768;
  Matrix m;
  make(m, type, rows, cols, random);
  const FormatInfo& f = *m.packed.format;
  std::vector<float> out(cols);
  // The same matrix dequantised while packing
  Packed as_float = m.packed;
  as_float.format = find_format(kF32);
  std::vector<uint8_t> floats(as_float.bytes());
  if (f.quantised()) pack_panels(f, m.file.data(), as_float, floats.data(), 0, as_float.panels());
  as_float.data = floats.data();
  std::vector<float> other(cols);
  for (int64_t r = 0; r < rows; r++) {
    unpack_row(m.packed, r, out.data());
    const uint8_t* row = m.file.data() + r * (cols / f.file_elements) * f.file_bytes;
    for (int64_t k = 0; k < cols; k++) {
      float want;
      if (f.quantised()) {
        const Element e = element(type, row, k);
        want = e.scale * static_cast<float>(e.code - f.offset());
        if (f.has_minimum) want = want + e.minimum;
      } else {
        want = file_float(type, row + k * f.file_bytes);
      }
      CHECK(out[k] == want, "%s row %d column %d: %g, not %g", f.name, int(r), int(k), out[k], want);
    }
    if (!f.quantised()) continue;
    unpack_row(as_float, r, other.data());
    CHECK(!std::memcmp(out.data(), other.data(), cols * 4), "%s dequantised while packing, row %d", f.name, int(r));
  }
}

// Quantised rows, with outliers as Gemma's activations have them.
std::vector<float> activations(int64_t m, int64_t cols, Random& random) {
  std::vector<float> x = random.normals(static_cast<size_t>(m * cols));
  for (size_t i = 0; i < x.size(); i += 97) x[i] *= 40;
  for (int64_t k = 0; k < 32; k++) x[k] = 0;  // an all-zero block
  return x;
}

void test_quantise() {
  Random random(5);
  const int64_t cols = 1024, m = 8;
  const std::vector<float> x = activations(m, cols, random);
  std::vector<std::vector<ActivationBlock>> results;
  for (const Kernels* k : paths()) {
    std::vector<ActivationBlock> blocks(m * cols / 32);
    for (int64_t i = 0; i < m; i++) k->quantise(x.data() + i * cols, blocks.data() + i * cols / 32, cols / 32);
    for (size_t b = 0; b < blocks.size(); b++) {
      const ActivationBlock& a = blocks[b];
      int sum = 0, first = 0;
      for (int i = 0; i < 32; i++) {
        const int q = a.q[i] + (i / 4 == a.quad ? a.spare[i % 4] : 0);
        sum += q, first += i < 16 ? q : 0;
        CHECK(std::fabs(q * a.scale - x[b * 32 + i]) <= 0.5001f * a.scale, "%s block %d element %d", k->name, int(b),
              i);
      }
      CHECK(sum == a.sum && first == a.first_sum && a.scaled_sum == a.scale * static_cast<float>(a.sum), "%s sums",
            k->name);
    }
    results.push_back(blocks);
    for (size_t b = 0; b < blocks.size(); b++)
      CHECK(!std::memcmp(&results[0][b], &blocks[b], sizeof(ActivationBlock)), "%s differs from %s", k->name,
            paths()[0]->name);
  }
}

// NaN and infinities: every path makes the same of them.
void test_special_values() {
  const float row[] = {NAN, 1, -2, INFINITY, -INFINITY, 0.0f, -0.0f, 1e-40f, 3e38f, -3e38f};
  Random random(6);
  const int64_t cols = 64;
  for (int round = 0; round < 200; round++) {
    std::vector<float> x = random.normals(cols);
    for (int i = 0; i < 8; i++) x[random.below(cols)] = row[random.below(10)];
    std::vector<ActivationBlock> first(2), blocks(2);
    Extent first_extent{};
    for (const Kernels* k : paths()) {
      k->quantise(x.data(), blocks.data(), 2);
      const Extent extent = k->largest(x.data(), cols - round % 20);
      if (k == paths()[0]) first = blocks, first_extent = extent;
      CHECK(!std::memcmp(first.data(), blocks.data(), 2 * sizeof(ActivationBlock)) &&
                !std::memcmp(&first_extent.max, &extent.max, 4) && first_extent.arg == extent.arg,
            "%s differs from %s in round %d", k->name, paths()[0]->name, round);
    }
  }
}

// Every float16, subnormals too, out of a weight and into the cache.
void test_halves() {
  const int64_t rows = 65536;
  std::vector<uint16_t> file(rows);
  for (int64_t r = 0; r < rows; r++) file[r] = static_cast<uint16_t>(r);
  Packed w;
  w.format = find_format(kF16), w.rows = rows, w.cols = 1;
  Arena memory;
  CHECK(memory.allocate(w.bytes()), "memory");
  pack_panels(*w.format, reinterpret_cast<const uint8_t*>(file.data()), w, memory.data, 0, w.panels());
  w.data = memory.data;
  const float one = 1;
  std::vector<uint8_t> page(4 * kPagePositions * 64);
  for (const Kernels* k : paths()) {
    std::vector<float> y(rows);
    k->matmul({&w, nullptr, &one, 1, y.data(), rows}, 0, 1, 0, w.panels());
    for (int64_t r = 0; r < rows; r++) {
      const float want = half_to_float(file[r]);
      CHECK(std::isnan(want) ? std::isnan(y[r]) : y[r] == want, "%s reads float16 %04x as %g", k->name, int(r), y[r]);
    }
    // Values around every float16: the neighbours below and above the middle of a step, and the middle
    for (int64_t r = 0; r < rows; r += 32) {
      float v[64];
      for (int i = 0; i < 64; i++) {
        const float f = half_to_float(file[r + i / 2]), g = half_to_float(static_cast<uint16_t>(file[r + i / 2] + 1));
        const float middle = 0.5f * f + 0.5f * g;
        v[i] = i % 2 ? middle : std::nextafter(middle, r % 64 ? f : g);
        if (!(std::fabs(v[i]) < 65504.0f)) v[i] = 0;
      }
      k->write_cache({v, v, 64, page.data(), 0, 2 * kPagePositions * 64, 0, true});
      for (int i = 0; i < 64; i++) {
        uint16_t key, value;
        std::memcpy(&key, &page[2 * 16 * i], 2);
        std::memcpy(&value, &page[2 * (kPagePositions * 64 + i)], 2);
        CHECK(key == float_to_half(v[i]) && value == key, "%s writes %.9g as float16 %04x", k->name, v[i], key);
      }
    }
  }
}

// The short run has more than one chunk of unpacked blocks too, the last not whole, and every tile's number of rows.
void test_matmul(GgmlType type, bool whole_run) {
  Random random(type + 100);
  const int64_t rows = whole_run ? 80 : 48, M = whole_run ? 37 : 19;
  const int64_t cols = whole_run ? (type == kQ4_0 ? 2048 + 32 : 2304) : type == kQ4_0 ? 1024 + 32 : 1280;
  Matrix m;
  make(m, type, rows, cols, random);
  const FormatInfo& f = *m.packed.format;
  const std::vector<float> x = activations(M, cols, random);
  std::vector<float> first;
  for (const Kernels* k : paths()) {
    std::vector<ActivationBlock> blocks(M * cols / 32);
    const Activations a{blocks.data(), cols / 32};
    for (int64_t i = 0; i < M; i++) k->quantise(x.data() + i * cols, a.row(i), a.per_row);
    std::vector<float> whole(M * rows), part(M * rows);
    const Product product{&m.packed, &a, x.data(), cols, whole.data(), rows};
    k->matmul(product, 0, M, 0, m.packed.panels());
    for (int64_t i = 0; i < M; i += 9)
      for (int64_t r = 0; r < rows; r += 7) {
        const uint8_t* row = m.file.data() + r * (cols / f.file_elements) * f.file_bytes;
        float exact = 0;
        double real = 0, size = 0;
        if (!f.quantised()) {
          for (int64_t c = 0; c < cols; c++)
            exact = fused(file_float(type, row + c * f.file_bytes), x[i * cols + c], exact);
        } else {
          for (int64_t b = 0; b < cols / 32; b++) {
            const ActivationBlock& block = blocks[i * cols / 32 + b];
            Element e{};
            const int width = 32 / f.sub_blocks;
            for (int h = 0; h < f.sub_blocks; h++) {
              int dot = 0;
              for (int c = h * width; c < (h + 1) * width; c++) {
                e = element(type, row, b * 32 + c);
                const int q = block.q[c] + (c / 4 == block.quad ? block.spare[c % 4] : 0);
                dot += (e.code - f.offset()) * q;
                real += (static_cast<double>(e.scale) * (e.code - f.offset()) + e.minimum) * q * block.scale;
                size += std::fabs(static_cast<double>(e.scale) * (e.code - f.offset()) * q * block.scale);
              }
              exact = fused(static_cast<float>(dot) * e.scale, block.scale, exact);
            }
            if (f.has_minimum) exact = fused(e.minimum, block.scaled_sum, exact);
          }
          CHECK(std::fabs(exact - real) < 1e-5 * size, "%s %s: %g against %g in float64", k->name, f.name, exact, real);
        }
        CHECK(whole[i * rows + r] == exact, "%s %s row %d of %d: %.9g, contract %.9g", k->name, f.name, int(i), int(M),
              whole[i * rows + r], exact);
      }
    // Any number of rows, any share of the panels: the same bits
    for (int64_t count = 1; count <= (whole_run ? 24 : 14); count++) {
      const Product again{&m.packed, &a, x.data(), cols, part.data(), rows};
      const int64_t m0 = M - count;
      k->matmul(again, m0, M, 0, 2);
      k->matmul(again, m0, M, 2, m.packed.panels());
      CHECK(!std::memcmp(&part[m0 * rows], &whole[m0 * rows], count * rows * 4), "%s %s with %d rows", k->name, f.name,
            int(count));
    }
    if (first.empty()) first = whole;
    CHECK(!std::memcmp(first.data(), whole.data(), whole.size() * 4), "%s: %s differs from %s", f.name, k->name,
          paths()[0]->name);
  }
}

void test_floats() {
  Random random(9);
  for (int64_t n : {1, 15, 16, 40, 640}) {
    std::vector<float> x = random.normals(n), w = random.normals(n), up = random.normals(n), first_norm, first_gelu,
                       first_cap;
    for (float& v : x) v *= 6;
    for (const Kernels* k : paths()) {
      std::vector<float> norm(n), gelu = x, cap = x, rotated = x;
      k->rms_norm(x.data(), w.data(), norm.data(), n, 1e-6f);
      k->gelu_multiply(gelu.data(), up.data(), n);
      k->softcap(cap.data(), 5.0f, n);
      double squares = 0, exps = 0;
      for (float v : x) squares += static_cast<double>(v) * v, exps += std::exp(static_cast<double>(v) - 20);
      for (int64_t i = 0; i < n; i++) {
        const double v = x[i], want = v / std::sqrt(squares / n + 1e-6) * w[i];
        CHECK(std::fabs(norm[i] - want) <= 1e-6 * std::fabs(want) + 1e-9, "%s rms_norm", k->name);
        const double u = std::sqrt(2 / kPi) * (v + 0.044715 * v * v * v), g = 0.5 * v * (1 + std::tanh(u)) * up[i];
        CHECK(std::fabs(gelu[i] - g) <= 2e-6 * std::fabs(v * up[i]) + 1e-9, "%s gelu(%g) = %g, not %g", k->name, v,
              gelu[i], g);
        const double c = 5 * std::tanh(v / 5);
        CHECK(std::fabs(cap[i] - c) <= 2e-6 * std::fabs(c) + 1e-9, "%s softcap(%g) = %g, not %g", k->name, v, cap[i],
              c);
      }
      CHECK(std::fabs(k->sum_exp(x.data(), n, 20) - exps) < 2e-6 * exps, "%s sum_exp", k->name);
      const Extent e = k->largest(x.data(), n);
      for (int64_t i = 0; i < n; i++) CHECK(x[i] <= e.max && (i >= e.arg || x[i] < e.max), "%s largest", k->name);
      if (first_norm.empty()) first_norm = norm, first_gelu = gelu, first_cap = cap;
      CHECK(first_norm == norm && first_gelu == gelu && first_cap == cap, "%s differs in bits from %s", k->name,
            paths()[0]->name);
    }
  }
  for (uint32_t h = 0; h < 65536; h++) {
    const float f = half_to_float(static_cast<uint16_t>(h));
    if (!std::isnan(f)) CHECK(float_to_half(f) == h, "float16 %04x", h);
  }
}

void test_attention(bool half) {
  Random random(11);
  const int64_t H = 64, S = 300, count = 6;
  const int64_t element = half ? 2 : 4, page_bytes = 2 * kPagePositions * H * element;
  std::vector<float> keys = random.normals(S * H), values = random.normals(S * H), q = random.normals(count * H);
  std::vector<float> first;
  for (const Kernels* k : paths()) {
    std::vector<std::vector<uint8_t>> memory((S + kPagePositions - 1) / kPagePositions,
                                             std::vector<uint8_t>(page_bytes));
    std::vector<const uint8_t*> pages;
    for (auto& page : memory) pages.push_back(page.data());
    for (int64_t s = 0; s < S; s++)
      k->write_cache({&keys[s * H], &values[s * H], H, memory[s / kPagePositions].data(), 0, page_bytes / 2,
                      int(s % kPagePositions), half});
    for (int64_t window : {0, 70}) {
      std::vector<float> out(count * H);
      const float* queries[6];
      int64_t positions[6];
      for (int64_t i = 0; i < count; i++) queries[i] = &q[i * H], positions[i] = S - 1 - 40 * i;
      // Queries [first, first + number) over all pages; `apart`: each page's sums are merged later
      auto attend = [&](int64_t first, int64_t number, bool apart, float* to) {
        PartialAttention all[6], part[6];
        std::vector<float> part_out(count * H);
        for (int64_t i = 0; i < number; i++) all[i] = {-INFINITY, 0, to + i * H};
        for (size_t page = 0; page < pages.size(); page++) {
          for (int64_t i = 0; i < number; i++) part[i] = {-INFINITY, 0, &part_out[i * H]};
          AttentionTile a;
          a.head_dim = H, a.queries = queries + first, a.positions = positions + first, a.partials = apart ? part : all,
          a.count = static_cast<int>(number), a.window = window, a.softcap = 20, a.keys = pages[page],
          a.values = pages[page] + page_bytes / 2, a.first = static_cast<int64_t>(page) * kPagePositions, a.half = half;
          k->attend(a);
          for (int64_t i = 0; apart && i < number; i++) k->merge(all[i], part[i], H);
        }
        for (int64_t i = 0; i < number; i++) k->scale(all[i].out, 1.0f / all[i].sum, H);
      };
      attend(0, count, false, out.data());
      std::vector<float> alone(H), merged(count * H);
      attend(0, count, true, merged.data());
      CHECK(merged == out, "%s attention differs when pages are merged later", k->name);
      for (int64_t i = 0; i < count; i++) {
        std::vector<double> p, sum(H);
        double total = 0;
        for (int64_t s = 0; s <= positions[i]; s++) {
          if (window && positions[i] - s >= window) continue;
          double d = 0;
          for (int64_t h = 0; h < H; h++) d += static_cast<double>(q[i * H + h]) * keys[s * H + h];
          const double e = std::exp(20 * std::tanh(d / 20));
          total += e;
          for (int64_t h = 0; h < H; h++) sum[h] += e * values[s * H + h];
        }
        for (int64_t h = 0; h < H; h++)
          CHECK(std::fabs(out[i * H + h] - sum[h] / total) < (half ? 1e-2 : 2e-5), "%s attention", k->name);
        // alone, the query gets the same bits
        attend(i, 1, false, alone.data());
        CHECK(!std::memcmp(alone.data(), &out[i * H], H * 4), "%s attention of one query differs", k->name);
      }
      if (window == 0 && first.empty()) first = out;
      if (window == 0) CHECK(first == out, "%s attention differs in bits", k->name);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bool whole = !short_run(argc, argv);
  FlushDenormals flush;
  for (const Kernels* k : paths()) std::printf("path %s\n", k->name);
  for (GgmlType type : kTypes) test_unpack(type), test_matmul(type, whole);
  test_quantise();
  test_special_values();
  test_halves();
  test_floats();
  test_attention(false), test_attention(true);
  std::printf("kernels: all paths agree\n");
}
