// A fixed team of threads that runs one function at a time, all members together, with barriers inside.
// Waiting spins briefly (the next phase is usually microseconds away), then yields for some milliseconds, then sleeps.
// Long spins do harm where another program holds a core: two members share the other core, and each spins away the time
// that the one it waits for needs. Sleeping within a step costs a wake-up each time.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "os.h"

namespace gemkit {

class Team {
 public:
  using Body = void (*)(void* context, int rank, int size);

  explicit Team(int size) : size_(size < 1 ? 1 : size), spins_(size_ > usable_cores() ? 16 : 128) { start(); }
  ~Team() {
    if (forked_) abandon();
    stop_.store(true, std::memory_order_relaxed);
    epoch_.fetch_add(1, std::memory_order_release);
    wake_all(epoch_);
    for (auto& worker : workers_) worker.join();
  }
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // In the child of a fork, which has none of the threads: the next run starts new ones. No run may have been under
  // way.
  void forked() { forked_ = true; }

  // Runs body on every member, the caller being rank 0; returns when all have finished.
  void run(Body body, void* context) {
    if (forked_) restart();
    body_ = body, context_ = context;
    epoch_.fetch_add(1, std::memory_order_release);
    wake_all(epoch_);
    {
      FlushDenormals flush;
      body(context, 0, size_);
    }
    barrier();
  }

  template <class F>
  void run(F& f) {
    run([](void* context, int rank, int size) { (*static_cast<F*>(context))(rank, size); }, &f);
  }

  // Every member must call it; none returns before all have.
  void barrier() {
    if (size_ == 1) return;
    uint32_t generation = generation_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
      wake_all(generation_);
    } else {
      wait_change(generation_, generation);
    }
  }

 private:
  static constexpr int kYields = 20000;

  void start() {
    for (int rank = 1; rank < size_; rank++) workers_.emplace_back([this, rank] { work(rank); });
  }
  // Handles of threads that this process does not have can be neither joined nor detached: they are leaked.
  void abandon() {
    new std::vector<std::thread>(std::move(workers_));
    workers_.clear();
  }
  void restart() {
    abandon();
    epoch_ = 0, generation_ = 0, arrived_ = 0;
    start();
    forked_ = false;
  }

  void wait_change(const std::atomic<uint32_t>& value, uint32_t old) {
    for (int i = 0; i < spins_; i++) {
      if (value.load(std::memory_order_acquire) != old) return;
      cpu_relax();
    }
    for (int i = 0; i < kYields; i++) {
      if (value.load(std::memory_order_acquire) != old) return;
      std::this_thread::yield();
    }
    while (value.load(std::memory_order_acquire) == old) sleep_while(value, old);
  }

  void work(int rank) {
    FlushDenormals flush;
    for (uint32_t seen = 0;;) {
      wait_change(epoch_, seen);
      seen++;
      if (stop_.load(std::memory_order_relaxed)) return;
      body_(context_, rank, size_);
      barrier();
    }
  }

  const int size_;
  const int spins_;
  alignas(64) std::atomic<uint32_t> epoch_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<int> arrived_{0};
  std::atomic<bool> stop_{false};
  bool forked_ = false;
  Body body_ = nullptr;
  void* context_ = nullptr;
  std::vector<std::thread> workers_;
};

struct Range {
  int64_t begin, end;
};
// The contiguous share of [0, n) of one of `size` threads.
inline Range share(int64_t n, int rank, int size) { return {n * rank / size, n * (rank + 1) / size}; }

// A member of a team within a run.
struct Worker {
  Team& team;
  int rank, size;
  Range share(int64_t n) const { return gemkit::share(n, rank, size); }
  void barrier() const { team.barrier(); }
};

// Index of the next item that no thread has taken.
using WorkQueue = std::atomic<int64_t>;

// Dynamic scheduling: runs each(range) over [0, n) on all threads of a team that call this with the same queue, zero at
// first. Large pieces come first, so that there are few, and small ones last, so that all threads end together.
template <class Each>
void guided_for(WorkQueue& queue, int64_t n, int64_t smallest, int size, Each each) {
  int64_t begin = queue.load(std::memory_order_relaxed);
  while (begin < n) {
    const int64_t end = std::min(n, begin + std::max(smallest, (n - begin) / (2 * size)));
    if (!queue.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
    each(Range{begin, end});
    begin = queue.load(std::memory_order_relaxed);
  }
}

}  // namespace gemkit
