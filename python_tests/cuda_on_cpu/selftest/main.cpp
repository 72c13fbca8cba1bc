// Runs the shim's test kernels without Python, so that the address and undefined-behaviour sanitizers can watch them:
// `selftest NAME...` runs those, each in 8 orders of threads. Exit code 1: a fault was thrown.
#include <cstdio>
#include <stdexcept>

#include "cuda_on_cpu/kernel/device.h"
#include "cuda_on_cpu/selftest/selftest.h"

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    for (int seed = 0; seed < 8; ++seed) {
      cuda_on_cpu::set_seed(seed);
      try {
        std::printf("%s %d:", argv[i], seed);
        for (const float value : cuda_on_cpu::selftest(argv[i])) std::printf(" %g", value);
        std::printf("\n");
      } catch (const std::exception& error) {
        std::printf(" fault\n%s\n", error.what());
        return 1;
      }
    }
  }
  return 0;
}
