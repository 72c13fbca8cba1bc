// Streams of equal slices, which can share what is computed from a row of logits.
#pragma once

#include <algorithm>
#include <vector>

#include "multistream_loss/multistream_loss.h"

namespace speechlm {

template <typename T>
bool equal_slices(const LossRowsArgs<T>& args, const LossStream& a, const LossStream& b) {
  return a.num_slices == b.num_slices &&
         std::equal(args.slices + a.first_slice, args.slices + a.first_slice + a.num_slices,
                    args.slices + b.first_slice, [](const LossSlice& x, const LossSlice& y) {
                      return x.id == y.id && x.begin == y.begin && x.count == y.count;
                    });
}

// The streams in tiles of equal slices, up to `max_size` of them in each.
template <typename T>
std::vector<std::vector<int64_t>> loss_tiles(const LossRowsArgs<T>& args, size_t max_size) {
  std::vector<std::vector<int64_t>> tiles;
  std::vector<bool> is_placed(args.num_streams);
  for (int64_t k = 0; k < args.num_streams; ++k) {
    if (is_placed[k]) continue;
    std::vector<int64_t> tile;
    for (int64_t other = k; other < args.num_streams && tile.size() < max_size; ++other) {
      if (is_placed[other] || !equal_slices(args, args.streams[k], args.streams[other])) continue;
      is_placed[other] = true;
      tile.push_back(other);
    }
    tiles.push_back(std::move(tile));
  }
  return tiles;
}

}  // namespace speechlm
