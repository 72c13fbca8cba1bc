// parallel_for and the tensor checks, without Python.
#include <dlfcn.h>

#include <mutex>

#include "common/cpu/parallel.h"
#include "common/tensor/tensor_view.h"
#include "tests/check.h"

namespace speechlm {
namespace {

// The compiler's own OpenMP runtime stands in for torch's; without one the loops run on one thread.
void load_openmp() {
  if (dlopen("libgomp.so.1", RTLD_NOW | RTLD_GLOBAL) != nullptr) use_openmp_of("libgomp.so.1");
}

TEST(parallel_for_visits_each_index_once) {
  load_openmp();
  for (int threads : {1, 2, 7}) {
    for (int64_t n : {0, 1, 5, 1000}) {
      for (int64_t grain : {0, 1, 3, 5000}) {
        std::vector<std::atomic<int>> visits(n);
        parallel_for(n, grain, threads, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) ++visits[i];
        });
        for (const auto& count : visits) EXPECT(count == 1);
      }
    }
  }
}

TEST(parallel_for_passes_exceptions_on) {
  load_openmp();
  for (int threads : {1, 4}) {
    const std::string message = testing::error_of([&] {
      parallel_for(100, 1, threads, [](int64_t begin, int64_t) { SX_CHECK(begin > 1000, "bad chunk ", begin); });
    });
    EXPECT(message.rfind("bad chunk ", 0) == 0);
  }
}

TEST(contiguity_ignores_dimensions_of_one) {
  TensorView view;
  view.sizes = {3, 1, 4};
  view.strides = {4, 99, 1};
  EXPECT(view.is_contiguous());
  view.strides = {5, 4, 1};
  EXPECT(!view.is_contiguous());
  view.sizes = {0, 7};
  view.strides = {1, 1};
  EXPECT(view.is_contiguous());
}

TEST(expect_names_argument_and_value) {
  TensorView view;
  view.dtype = DType::kInt64;
  view.device = Device::kCuda;
  view.device_index = 1;
  view.sizes = {812, 9};
  view.strides = {9, 1};
  view.expect("op", "ids", {DType::kInt32, DType::kInt64}, Device::kCuda, {-1, 9});
  const std::string message = testing::error_of([&] { view.expect("op", "ids", {DType::kInt32}, Device::kCpu, {-1}); });
  EXPECT(message == "op: ids must be on cpu; got int64 [812, 9] on cuda:1");
}

}  // namespace
}  // namespace speechlm
