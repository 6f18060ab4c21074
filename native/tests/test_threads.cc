// The team of threads: every member runs every phase and none begins one before all have ended the last, with more
// threads than cores too.
#include <chrono>
#include <memory>

#include "check.h"
#include "threads.h"
#if !defined(_WIN32)
#include <sys/wait.h>
#endif

using namespace gemkit;

namespace {

void test_phases(int size) {
  constexpr int kRuns = 20, kPhases = 25;
  Team team(size);
  CHECK(team.size() == size, "%d threads, not %d", team.size(), size);
  std::vector<int> done(static_cast<size_t>(size));
  const auto begin = std::chrono::steady_clock::now();
  for (int run = 0; run < kRuns; run++) {
    if (run % 10 == 9) std::this_thread::sleep_for(std::chrono::milliseconds(40));  // so that the others fall asleep
    auto body = [&](int rank, int count) {
      CHECK(count == size, "%d members, not %d", count, size);
      for (int phase = 0; phase < kPhases; phase++) {
        done[static_cast<size_t>(rank)]++;
        team.barrier();
        for (int n : done) CHECK(n == run * kPhases + phase + 1, "%d threads: a phase began too early", size);
        team.barrier();
      }
    };
    team.run(body);
    for (int n : done) CHECK(n == (run + 1) * kPhases, "%d threads: run() returned too early", size);
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  std::printf("%d threads on %d cores: %.1f us a phase\n", size, usable_cores(), seconds / (kRuns * kPhases * 2) * 1e6);
}

#if !defined(_WIN32) && !defined(__SANITIZE_THREAD__)  // which refuses threads after a fork
// In the child of a fork a team works with new threads, and one that is not used ends without the threads it had.
void test_forks(int size) {
  Team team(size);
  auto idle = std::make_unique<Team>(size);
  std::vector<int> done(static_cast<size_t>(size));
  auto body = [&](int rank, int) {
    done[static_cast<size_t>(rank)]++;
    team.barrier();
  };
  team.run(body);
  const pid_t child = fork();
  CHECK(child >= 0, "fork");
  if (child == 0) {
    idle->forked(), idle.reset();
    team.forked();
    for (int i = 0; i < 50; i++) team.run(body);
    for (int n : done) CHECK(n == 51, "%d threads: %d runs after a fork", size, n);
    _exit(0);
  }
  int status = 1;
  CHECK(waitpid(child, &status, 0) == child && status == 0, "%d threads: the child of a fork failed", size);
  for (int i = 0; i < 50; i++) team.run(body);
  for (int n : done) CHECK(n == 51, "%d threads: %d runs beside a fork", size, n);
}
#else
void test_forks(int) {}
#endif

// Denormal results are zero on every member while a body runs, and the caller's mode comes back.
void test_denormals(int size) {
  const volatile float tiny = 1e-30f;
  std::vector<float> products(static_cast<size_t>(size), 1);
  auto body = [&](int rank, int) { products[static_cast<size_t>(rank)] = tiny * 1e-10f; };
  Team(size).run(body);
  for (float p : products) CHECK(p == 0, "%d threads: a denormal result of %g", size, p);
  CHECK(tiny * 1e-10f > 0, "the caller's mode was not restored");
}

void test_shares() {
  for (int64_t n : {0, 1, 7, 64, 1000003})
    for (int size : {1, 2, 3, 8}) {
      int64_t at = 0;
      for (int rank = 0; rank < size; rank++) {
        const Range r = share(n, rank, size);
        CHECK(r.begin == at && r.end >= at && r.end - r.begin <= n / size + 1, "share %d of %d", rank, size);
        at = r.end;
      }
      CHECK(at == n, "shares of %d end at %d", int(n), int(at));
    }
}

// Each piece goes to one member, none is left, and no piece but the last is smaller than asked for.
void test_dynamic_scheduling(int size) {
  for (int64_t n : {0, 1, 5, 64, 10007})
    for (int64_t least : {1, 2, 100}) {
      Team team(size);
      WorkQueue queue{0};
      std::vector<std::atomic<int>> times(static_cast<size_t>(n));
      auto body = [&](int, int count) {
        guided_for(queue, n, least, count, [&](Range r) {
          CHECK(r.end - r.begin >= least || r.end == n, "a piece of %d", int(r.end - r.begin));
          for (int64_t i = r.begin; i < r.end; i++) times[static_cast<size_t>(i)]++;
        });
      };
      team.run(body);
      for (const auto& t : times) CHECK(t == 1, "%d members, %d items: one was run %d times", size, int(n), t.load());
    }
}

}  // namespace

// An emulator's short run leaves forks out: QEMU cannot start threads in the child of a process that has some.
int main(int argc, char** argv) {
  const bool whole = !short_run(argc, argv);
  test_shares();
  for (int size : {1, 2, 3, 8}) test_dynamic_scheduling(size);
  for (int size : {1, 2, 3, 8}) {
    {
      Team idle(size);
    }  // goes as it came, without a run
    test_phases(size);
    test_denormals(size);
    if (whole) test_forks(size);
  }
}
