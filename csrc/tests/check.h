// A test framework in thirty lines: TEST(name) { EXPECT(condition); }. main() runs all and counts failures.
#pragma once

#include <functional>
#include <iostream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace speechlm::testing {

inline std::vector<std::pair<std::string, std::function<void()>>>& registry() {
  static std::vector<std::pair<std::string, std::function<void()>>> tests;
  return tests;
}

struct Registrar {
  Registrar(const char* name, std::function<void()> body) { registry().emplace_back(name, std::move(body)); }
};

inline void expect(bool condition, const char* text, const char* file, int line) {
  if (!condition) throw std::logic_error(std::string(file) + ":" + std::to_string(line) + ": expected " + text);
}

// The message of the std::invalid_argument that `body` throws, "" if it throws none.
template <typename Body>
std::string error_of(const Body& body) {
  try {
    body();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

}  // namespace speechlm::testing

#define EXPECT(condition) speechlm::testing::expect((condition), #condition, __FILE__, __LINE__)
#define TEST(name)                                                          \
  static void test_##name();                                                \
  static const speechlm::testing::Registrar reg_##name(#name, test_##name); \
  static void test_##name()
