#include "tests/check.h"

int main() {
  int passed = 0;
  int failed = 0;
  for (const auto& [name, body] : speechlm::testing::registry()) {
    try {
      body();
      ++passed;
    } catch (const std::exception& error) {
      std::cerr << "FAILED " << name << ": " << error.what() << "\n";
      ++failed;
    }
  }
  std::cout << passed << " passed, " << failed << " failed\n";
  return failed == 0 ? 0 : 1;
}
