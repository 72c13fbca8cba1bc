// Prefetches of rows, and the work that pays for another thread.
#pragma once

#include <algorithm>
#include <cstdint>

namespace speechlm {

constexpr int64_t kGrainBytes = 256 * 1024;  // less than this is not worth waking a thread

// Fetches the first 4 KiB of a row; the processor guesses the rest.
inline void fetch(const void* row, int64_t bytes) {
  constexpr int64_t kLine = 64, kMaxBytes = 4096;
  const char* p = static_cast<const char*>(row);
  for (int64_t b = 0; b < std::min(bytes, kMaxBytes); b += kLine) __builtin_prefetch(p + b, 0, 2);
}

}  // namespace speechlm
