// SX_CHECK: argument checks whose message is streamed together only when they fail.
//
//   SX_CHECK(rows == n, "delay_pack: ids has ", rows, " rows but the offsets end at ", n);
//
// Throws std::invalid_argument, which pybind11 turns into ValueError. State the expected and the given value,
// the argument and the remedy; never abort the interpreter.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace speechlm {

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace speechlm

#define SX_CHECK(condition, ...)                                  \
  do {                                                            \
    if (!(condition)) {                                           \
      throw std::invalid_argument(speechlm::concat(__VA_ARGS__)); \
    }                                                             \
  } while (false)
