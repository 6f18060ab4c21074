#include "ladder.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "kernels/half.h"
#include "kernels/kernels.h"
#include "os.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define GEMKIT_LADDER_AVX2 __attribute__((target("avx2,fma,f16c")))
#endif

namespace {
using namespace gemkit;

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

double best_of(int reps, const std::function<void()>& f) {
  double best = 1e30;
  for (int rep = 0; rep < reps; rep++) {
    const double begin = seconds();
    f();
    best = std::min(best, seconds() - begin);
  }
  return best;
}

constexpr int64_t kQ8Bytes = 34, kQ4Bytes = 18;

float scale_at(const uint8_t* block) {
  uint16_t bits;
  std::memcpy(&bits, block, 2);
  return half_to_float(bits);
}

// y = W x for M rows of activations: rows x cols weights as the file holds them (Q8_0 or Q4_0). Activations are whole
// numbers of up to 254 steps, 16 bits each, and one scale per 32.
struct Problem {
  GgmlType type;
  int64_t rows, cols, M;
  std::vector<uint8_t> file;
  std::vector<int16_t> x;       // [M][cols]
  std::vector<float> scales;    // [M][blocks]
  std::vector<float> expected;  // [M][rows], by the first rung
  Arena input, blocks, packed, y;
  Packed w;

  int64_t per_row() const { return cols / kBlock; }
  int64_t block_bytes() const { return type == kQ8_0 ? kQ8Bytes : kQ4Bytes; }
  const uint8_t* row(int64_t r) const { return file.data() + r * per_row() * block_bytes(); }
  Activations activations() { return {blocks.as<ActivationBlock>(), per_row()}; }
};

bool fill(Problem& p, const Kernels& k) {
  const int64_t B = p.per_row();
  p.w.format = find_format(p.type), p.w.rows = p.rows, p.w.cols = p.cols;
  if (!p.packed.allocate(p.w.bytes()) || !p.input.allocate(static_cast<size_t>(p.M * p.cols * 4)) ||
      !p.y.allocate(static_cast<size_t>(p.M * p.rows * 4)) ||
      !p.blocks.allocate(static_cast<size_t>(p.M * B) * sizeof(ActivationBlock)))
    return false;
  p.file.resize(static_cast<size_t>(p.rows * B * p.block_bytes()));
  uint32_t state = 1;
  auto next = [&] { return state = state * 1664525 + 1013904223, state >> 8; };
  for (int64_t b = 0; b < p.rows * B; b++) {
    uint8_t* block = p.file.data() + b * p.block_bytes();
    const uint16_t scale = float_to_half(0.001f + static_cast<float>(next() % 1024) * 1e-5f);
    std::memcpy(block, &scale, 2);
    for (int64_t i = 2; i < p.block_bytes(); i++) block[i] = static_cast<uint8_t>(next());
  }
  pack_panels(*p.w.format, p.file.data(), p.w, p.packed.data, 0, p.w.panels());
  p.w.data = p.packed.data;
  for (int64_t i = 0; i < p.M * p.cols; i++)
    p.input.as<float>()[i] = static_cast<float>(next()) / 8388608.0f - 1.0f + (i % 101 == 0 ? 12.0f : 0.0f);
  p.x.resize(static_cast<size_t>(p.M * p.cols)), p.scales.resize(static_cast<size_t>(p.M * B));
  const Activations a = p.activations();
  for (int64_t m = 0; m < p.M; m++) {
    k.quantise(p.input.as<float>() + m * p.cols, a.row(m), a.per_row);
    for (int64_t b = 0; b < B; b++) {
      const ActivationBlock& block = a.blocks[m * B + b];
      p.scales[static_cast<size_t>(m * B + b)] = block.scale;
      for (int i = 0; i < kBlock; i++)
        p.x[static_cast<size_t>(m * p.cols + b * kBlock + i)] =
            static_cast<int16_t>(block.q[i] + (i / 4 == block.quad ? block.spare[i % 4] : 0));
    }
  }
  return true;
}

// The contract of kernels.h, as it stands there.
void naive(const Problem& p, float* y) {
  for (int64_t m = 0; m < p.M; m++)
    for (int64_t r = 0; r < p.rows; r++) {
      const uint8_t* row = p.row(r);
      float f = 0;
      for (int64_t b = 0; b < p.per_row(); b++) {
        const uint8_t* block = row + b * p.block_bytes();
        const int16_t* x = p.x.data() + m * p.cols + b * kBlock;
        int32_t dot = 0;
        for (int i = 0; i < kBlock; i++) {
          const int code =
              p.type == kQ8_0 ? static_cast<int8_t>(block[2 + i]) : (block[2 + i % 16] >> i / 16 * 4 & 15) - 8;
          dot += code * x[i];
        }
        f = std::fma(static_cast<float>(dot) * scale_at(block), p.scales[static_cast<size_t>(m * p.per_row() + b)], f);
      }
      y[m * p.rows + r] = f;
    }
}

#if defined(GEMKIT_LADDER_AVX2)
// Vectors along a row, in ggml's blocks of one scale and 32 numbers. Adds in another order than the contract.
GEMKIT_LADDER_AVX2 void row_major(const Problem& p, float* y) {
  for (int64_t r = 0; r < p.rows; r++)
    for (int64_t m = 0; m < p.M; m++) {
      const uint8_t* block = p.row(r);
      const int16_t* x = p.x.data() + m * p.cols;
      const float* scales = p.scales.data() + m * p.per_row();
      __m256 sum = _mm256_setzero_ps();
      for (int64_t b = 0; b < p.per_row(); b++, block += kQ8Bytes, x += kBlock) {
        uint16_t bits;
        std::memcpy(&bits, block, 2);
        const __m256i low = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(block + 2)));
        const __m256i high = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(block + 18)));
        const __m256i dot =
            _mm256_add_epi32(_mm256_madd_epi16(low, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))),
                             _mm256_madd_epi16(high, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 16))));
        sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_set1_ps(_cvtsh_ss(bits) * scales[b]), sum);
      }
      __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
      four = _mm_add_ps(four, _mm_movehl_ps(four, four));
      y[m * p.rows + r] = _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
    }
}

// Sixteen rows side by side, a block of a panel: 8 quads of [16 rows][4 columns], then 16 scales.
constexpr int64_t kRecord = 16 * 32 + 32;

std::vector<uint8_t> interleave(const Problem& p) {
  std::vector<uint8_t> to(static_cast<size_t>(p.rows / 16 * p.per_row() * kRecord));
  for (int64_t r = 0; r < p.rows; r++)
    for (int64_t b = 0; b < p.per_row(); b++) {
      const uint8_t* block = p.row(r) + b * kQ8Bytes;
      uint8_t* record = to.data() + (r / 16 * p.per_row() + b) * kRecord;
      for (int i = 0; i < kBlock; i++) record[i / 4 * 64 + r % 16 * 4 + i % 4] = block[2 + i];
      std::memcpy(record + 512 + r % 16 * 2, block, 2);
    }
  return to;
}

GEMKIT_LADDER_AVX2 void interleaved(const Problem& p, const uint8_t* data, float* y) {
  const int64_t B = p.per_row();
  for (int64_t panel = 0; panel < p.rows / 16; panel++)
    for (int64_t m = 0; m < p.M; m++) {
      const uint8_t* record = data + panel * B * kRecord;
      const int16_t* x = p.x.data() + m * p.cols;
      __m256 sums[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
      for (int64_t b = 0; b < B; b++, record += kRecord, x += kBlock) {
        __m256i dots[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(),
                           _mm256_setzero_si256()};
        for (int quad = 0; quad < 8; quad++) {
          int64_t four;
          std::memcpy(&four, x + quad * 4, 8);
          const __m256i broadcast = _mm256_set1_epi64x(four);
          for (int part = 0; part < 4; part++) {
            const auto* at = reinterpret_cast<const __m128i*>(record + quad * 64 + part * 16);
            dots[part] =
                _mm256_add_epi32(dots[part], _mm256_madd_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128(at)), broadcast));
          }
        }
        const __m256 scale_x = _mm256_set1_ps(p.scales[static_cast<size_t>(m * B + b)]);
        for (int half = 0; half < 2; half++) {
          const __m256i pairs = _mm256_hadd_epi32(dots[2 * half], dots[2 * half + 1]);
          const __m256i dot = _mm256_permute4x64_epi64(pairs, 0xd8);
          const auto* at = reinterpret_cast<const __m128i*>(record + 512 + half * 16);
          const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128(at));
          sums[half] = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(dot), scale), scale_x, sums[half]);
        }
      }
      _mm256_storeu_ps(y + m * p.rows + panel * 16, sums[0]);
      _mm256_storeu_ps(y + m * p.rows + panel * 16 + 8, sums[1]);
    }
}
#endif

// The largest error of y, as a share of the largest number expected; NaN counts as infinite.
double error(const Problem& p, const float* y) {
  double most = 0, wrong = 0;
  for (size_t i = 0; i < p.expected.size(); i++) {
    const double d = std::fabs(static_cast<double>(y[i]) - p.expected[i]);
    most = std::max(most, std::fabs(static_cast<double>(p.expected[i])));
    wrong = std::max(wrong, std::isfinite(d) ? d : INFINITY);
  }
  return wrong / most;
}

struct Rung {
  std::string name;
  double bytes;  // of weights
  double tolerance;
  std::function<void()> run;
};

// `limit`: of this machine, in GB/s for a product of one row, in 10^9 operations a second for more.
bool climb(Problem& p, const std::vector<Rung>& rungs, double limit, int reps) {
  float* y = p.y.as<float>();
  const double operations = 2.0 * static_cast<double>(p.M * p.rows * p.cols);
  double first = 0;
  for (const Rung& rung : rungs) {
    std::fill(y, y + p.M * p.rows, NAN);
    rung.run();
    if (p.expected.empty()) p.expected.assign(y, y + p.M * p.rows);
    const double off = error(p, y);
    if (!(off <= rung.tolerance)) {
      std::fprintf(stderr, "%s is wrong by %g\n", rung.name.c_str(), off);
      return false;
    }
    const double t = best_of(first == 0 ? 2 : reps, rung.run);
    if (first == 0) first = t;
    const double rate = (p.M == 1 ? rung.bytes : operations) / t / 1e9;
    std::printf("  %-44s %9.2f ms %7.1fx %9.1f %s %5.0f%%  %s\n", rung.name.c_str(), t * 1e3, first / t, rate,
                p.M == 1 ? "GB/s" : "GOPS", 100 * rate / limit, off == 0 ? "the same bits" : "");
    std::fflush(stdout);
  }
  return true;
}

bool ladder(const char* title, Problem p, const std::vector<const Kernels*>& paths, double limit, int reps) {
  if (!fill(p, *portable_kernels())) return std::fprintf(stderr, "not enough memory\n"), false;
  std::printf("%s\n", title);
  float* y = p.y.as<float>();
  const auto file_bytes = static_cast<double>(p.file.size());
  std::vector<Rung> rungs = {{"plain loop, the file's layout", file_bytes, 0, [&] { naive(p, y); }}};
#if defined(GEMKIT_LADDER_AVX2)
  std::vector<uint8_t> records;
  if (p.type == kQ8_0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) {
    records = interleave(p);
    rungs.push_back({"AVX2 along a row, the file's layout", file_bytes, 1e-5, [&] { row_major(p, y); }});
    rungs.push_back({"AVX2, 16 rows interleaved", static_cast<double>(records.size()), 0,
                     [&] { interleaved(p, records.data(), y); }});
  }
#endif
  for (const Kernels* k : paths) {
    if (k == portable_kernels() && p.M > 1) continue;
    auto run = [&p, y, k] {
      const Activations a = p.activations();
      k->matmul({&p.w, &a, p.input.as<float>(), p.cols, y, p.rows}, 0, p.M, 0, p.w.panels());
    };
    const std::string name = std::string("gemkit's kernel, ") + k->name;
    rungs.push_back({name, static_cast<double>(p.w.bytes()), 0, run});
  }
  return climb(p, rungs, limit, reps);
}

Problem problem(GgmlType type, int64_t rows, int64_t cols, int64_t M) {
  Problem p;
  p.type = type, p.rows = rows, p.cols = cols, p.M = M;
  return p;
}

}  // namespace

int run_ladders() {
  FlushDenormals flush;
  std::vector<const Kernels*> paths;
  for (const char* name : {"portable", "neon", "avx2", "avx512"}) {
    const char* error = nullptr;
    if (const Kernels* k = select_kernels(name, &error)) paths.push_back(k);
  }
  const Kernels& best = *paths.back();
  Arena memory;
  constexpr size_t kRead = size_t{256} << 20;
  if (!memory.allocate(kRead)) return std::fprintf(stderr, "not enough memory\n"), 1;
  std::memset(memory.data, 1, kRead);
  volatile uint64_t sink = 0;
  const double bandwidth = kRead / best_of(7, [&] { sink = sink + best.read(memory.data, kRead); }) / 1e9;
  int64_t done = 0;
  const double spent = best_of(7, [&] { done = best.peak_int8(1 << 20); });
  const double peak = static_cast<double>(done) / spent / 1e9;
  memory.release();
  std::printf(
      "one thread; this machine reads %.1f GB/s and multiplies %.0f GOPS in int8 (%s), the shares are of these\n",
      bandwidth, peak, best.name);
  if (!ladder("head, 262,144 x 640 in Q8_0, one token", problem(kQ8_0, 262144, 640, 1), paths, bandwidth, 9)) return 1;
  if (!ladder("its 4-bit copy, which the screen reads", problem(kQ4_0, 262144, 640, 1), paths, bandwidth, 9)) return 1;
  if (!ladder("gate, 2,048 x 640 in Q8_0, 512 tokens of a prompt", problem(kQ8_0, 2048, 640, 512), paths, peak, 7))
    return 1;
  return 0;
}
