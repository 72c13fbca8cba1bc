// From Python's arguments to an EmbedRule, for the bindings of multistream_embed and scatter_sum.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "multistream_embed/multistream_embed.h"

namespace speechlm {

inline EmbedRule rule_of(const char* op, int64_t num_streams, std::optional<int64_t> pad_id,
                         const std::vector<int64_t>& offsets, const std::vector<double>& scale) {
  SX_CHECK(num_streams <= kMaxStreams, op, ": at most ", kMaxStreams, " streams; got ", num_streams);
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

}  // namespace speechlm
