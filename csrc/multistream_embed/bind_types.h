// What both bindings of this room share: element types, and how ids become rows.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "common/tensor/small_float.h"
#include "common/tensor/tensor_caster.h"
#include "multistream_embed/multistream_embed.h"

namespace speechlm {

constexpr auto kIds = {DType::kInt32, DType::kInt64};
constexpr auto kFloats = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};

inline EmbedRule rule_of(const char* op, int64_t num_streams, std::optional<int64_t> pad_id,
                         const std::vector<int64_t>& offsets, const std::vector<double>& scale) {
  SX_CHECK(num_streams <= kMostStreams, op, ": at most ", kMostStreams, " streams; got ", num_streams);
  const auto count = static_cast<size_t>(num_streams);
  SX_CHECK(offsets.empty() || offsets.size() == count, op, ": offsets must have ", count, " values");
  SX_CHECK(scale.empty() || scale.size() == count, op, ": scale must have ", count, " values");
  EmbedRule rule;
  rule.has_pad = pad_id.has_value();
  rule.pad_id = pad_id.value_or(0);
  rule.has_scale = !scale.empty();
  std::copy(offsets.begin(), offsets.end(), rule.offset);
  std::copy(scale.begin(), scale.end(), rule.scale);
  return rule;
}

// Calls run(T{}) with the type of a table's elements.
template <typename Run>
auto with_float(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kFloat64: return run(double{});
    case DType::kBFloat16: return run(BFloat16{});
    case DType::kFloat16: return run(Float16{});
    default: return run(float{});
  }
}

// Calls run(Id{}) with the type of the ids.
template <typename Run>
auto with_id(DType dtype, const Run& run) {
  return dtype == DType::kInt64 ? run(int64_t{}) : run(int32_t{});
}

}  // namespace speechlm
