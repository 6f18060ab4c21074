// All calls to the operating system: large zeroed memory, the processor and its usable cores, waiting, denormals.
#pragma once
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <utility>

#if defined(_WIN32)
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>
#else
#include <sys/mman.h>
#include <unistd.h>
#if defined(__linux__)
#include <sched.h>
#include <sys/prctl.h>
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif
#endif
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace gemkit {

constexpr size_t kHugePage = size_t{2} << 20;
// Kernels may prefetch or load a little past the end of a matrix.
constexpr size_t kArenaSlack = 8192;

// Bytes rounded up to whole cache lines, on which all buffers begin.
constexpr int64_t kLine = 64;
inline int64_t whole_lines(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

// The error for an allocation that failed.
inline std::string out_of_memory(const char* what, int64_t bytes) {
  char text[160];
  std::snprintf(text, sizeof text,
                "not enough memory for %s (%.2f GB); close other programs or use a smaller model or context", what,
                static_cast<double>(bytes) / 1e9);
  return text;
}

// Zeroed memory in huge pages where the system grants them. Empty (data == nullptr) when memory is short.
struct Arena {
  uint8_t* data = nullptr;
  size_t size = 0;

  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  Arena(Arena&& other) noexcept { *this = std::move(other); }
  Arena& operator=(Arena&& other) noexcept {
    std::swap(data, other.data), std::swap(size, other.size);
    return *this;
  }
  ~Arena() { release(); }

  bool allocate(size_t bytes) {
    release();
    if (bytes > SIZE_MAX - kArenaSlack - kHugePage) return false;
    size_t want = bytes + kArenaSlack;
    if (want >= kHugePage) want = (want + kHugePage - 1) / kHugePage * kHugePage;
#if defined(_WIN32)
    data = static_cast<uint8_t*>(VirtualAlloc(nullptr, want, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE));
    if (!data) return false;
#else
    const size_t extra = want >= kHugePage ? kHugePage : 0;  // huge pages need an aligned start
    void* p = mmap(nullptr, want + extra, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return false;
    data = static_cast<uint8_t*>(p);
    if (extra) {
      uint8_t* aligned = data + (kHugePage - reinterpret_cast<uintptr_t>(data) % kHugePage) % kHugePage;
      if (aligned > data) munmap(data, static_cast<size_t>(aligned - data));
      if (aligned < data + extra) munmap(aligned + want, static_cast<size_t>(data + extra - aligned));
      data = aligned;
#if defined(MADV_HUGEPAGE)
      madvise(data, want, MADV_HUGEPAGE);
#endif
    }
#endif
    size = want;
    return true;
  }

  void release() {
    if (!data) return;
#if defined(_WIN32)
    VirtualFree(data, 0, MEM_RELEASE);
#else
    munmap(data, size);
#endif
    data = nullptr, size = 0;
  }

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }
};

// Brings a mapped file's pages in at once: a fault for each costs more than the whole table does.
inline void populate(const uint8_t* data, size_t bytes) {
#if defined(__linux__)
  constexpr int kPopulateRead = 22;  // since Linux 5.14; where it fails, pages come one by one
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), skip = reinterpret_cast<uintptr_t>(data) % page;
  madvise(const_cast<uint8_t*>(data) - skip, bytes + skip, kPopulateRead);
#else
  (void)data, (void)bytes;
#endif
}

// Releases a mapped file's whole pages; reading them again brings them back.
inline void let_go(const uint8_t* data, size_t bytes) {
#if defined(__linux__)
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), at = reinterpret_cast<uintptr_t>(data);
  const size_t begin = (at + page - 1) / page * page, end = (at + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
#else
  (void)data, (void)bytes;
#endif
}

// Whether asking for huge pages can get them.
inline bool huge_pages() {
#if defined(__linux__)
  char text[64] = {};
  std::FILE* file = std::fopen("/sys/kernel/mm/transparent_hugepage/enabled", "r");
  if (!file) return false;
  const size_t read = std::fread(text, 1, sizeof text - 1, file);
  std::fclose(file);
  return read > 0 && !std::strstr(text, "[never]") && prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) == 0;
#else
  return false;
#endif
}

// Cores this process may run on.
inline int usable_cores() {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    int n = CPU_COUNT(&set);
    if (n > 0) return n;
  }
#elif defined(_WIN32)  // none where they span several groups of 64
  DWORD_PTR mine = 0, all = 0;
  if (GetProcessAffinityMask(GetCurrentProcess(), &mine, &all) && mine) return std::popcount(uint64_t{mine});
#endif
  int n = static_cast<int>(std::thread::hardware_concurrency());
  return n > 0 ? n : 1;
}

#if defined(__aarch64__) || defined(_M_ARM64)
// Whether the processor has NEON's dot products.
inline bool has_dot_product() {
#if defined(__APPLE__)  // from the first Macs on
  return true;
#elif defined(_WIN32)
  return IsProcessorFeaturePresent(43);  // PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE
#elif defined(__linux__)
  return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#else
  return false;
#endif
}
#endif

// Sleeps while `value` is `old`, and wakes all who do; may return early. Some standard libraries for Windows lose a
// wake-up in std::atomic's own.
inline void sleep_while(const std::atomic<uint32_t>& value, uint32_t old) {
#if defined(_WIN32)
  WaitOnAddress(const_cast<std::atomic<uint32_t>*>(&value), &old, sizeof old, INFINITE);
#else
  value.wait(old, std::memory_order_acquire);
#endif
}
inline void wake_all(std::atomic<uint32_t>& value) {
#if defined(_WIN32)
  WakeByAddressAll(&value);
#else
  value.notify_all();
#endif
}

inline void cpu_relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Denormal results cost up to a hundred cycles each: flush them to zero while a step runs, then restore the caller's
// mode.
class FlushDenormals {
 public:
  FlushDenormals() {
#if defined(__x86_64__) || defined(_M_X64)
    saved_ = _mm_getcsr();
    _mm_setcsr(static_cast<unsigned>(saved_) | 0x8040u);
#elif defined(__aarch64__)
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ | (uint64_t{1} << 24)));
#endif
  }
  ~FlushDenormals() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_setcsr(static_cast<unsigned>(saved_));
#elif defined(__aarch64__)
    asm volatile("msr fpcr, %0" ::"r"(saved_));
#endif
  }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  uint64_t saved_ = 0;
};

}  // namespace gemkit
