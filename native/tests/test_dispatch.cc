// The choice of the kernel path:  test_dispatch [NAME]  also checks that NAME is the path chosen on this processor.
#include <cstring>
#include <string>

#include "check.h"

using namespace gemkit;

int main(int argc, char** argv) {
  const char* error = nullptr;
  const Kernels* chosen = select_kernels(nullptr, &error);
  CHECK(chosen && !error, "no path chosen");
  CHECK(select_kernels("", &error) == chosen && !error, "an empty name must mean none");
  bool found = false;
  for (const Kernels* k : paths()) found |= k == chosen;
  CHECK(found, "%s cannot be forced", chosen->name);
  CHECK(argc < 2 || !std::strcmp(chosen->name, argv[1]), "%s was chosen, not %s", chosen->name, argv[1]);

  for (const Kernels* k : paths()) {
    CHECK(agrees_with_portable(*k), "%s would not be chosen", k->name);
    // A path that a processor runs otherwise than meant is not taken
    Kernels other = *k;
    other.matmul = [](const Product& p, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
      portable_kernels()->matmul(p, m0, m1, p0, p1);
      if (m1 > 1) p.y[p.ldy] += 1e-3f;
    };
    CHECK(!agrees_with_portable(other), "wrong products were not noticed");
  }

  CHECK(!select_kernels("neither", &error) && error, "an unknown name must be refused");
  const std::string message = error;
  for (const char* name : {"avx512", "avx2", "neon", "portable"}) {
    const Kernels* k = select_kernels(name, &error);
    CHECK(!k == (error != nullptr) && (!k || !std::strcmp(k->name, name)), "%s", name);
    const bool listed = message.find(name) != std::string::npos;
    CHECK(listed || (!k && message == error), "%s is not among: %s", name, message.c_str());
  }
  std::printf("dispatch: %s is chosen; %s\n", chosen->name, message.c_str());
}
