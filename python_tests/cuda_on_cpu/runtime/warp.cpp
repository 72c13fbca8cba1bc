#include "cuda_on_cpu/kernel/warp.h"

#include "cuda_on_cpu/runtime/block.h"

namespace cuda_on_cpu {

const char* name_of(WarpOp op) {
  switch (op) {
    case WarpOp::kSync: return "__syncwarp";
    case WarpOp::kShfl: return "__shfl_sync";
    case WarpOp::kShflUp: return "__shfl_up_sync";
    case WarpOp::kShflDown: return "__shfl_down_sync";
    case WarpOp::kShflXor: return "__shfl_xor_sync";
    case WarpOp::kBallot: return "__ballot_sync";
    case WarpOp::kAny: return "__any_sync";
    case WarpOp::kAll: return "__all_sync";
    case WarpOp::kMatchAny: return "__match_any_sync";
    case WarpOp::kMatchAll: return "__match_all_sync";
    case WarpOp::kAddU: return "__reduce_add_sync";
    case WarpOp::kMinU:
    case WarpOp::kMinS: return "__reduce_min_sync";
    case WarpOp::kMaxU:
    case WarpOp::kMaxS: return "__reduce_max_sync";
    case WarpOp::kAnd: return "__reduce_and_sync";
    case WarpOp::kOr: return "__reduce_or_sync";
    case WarpOp::kXor: return "__reduce_xor_sync";
  }
  return "?";
}

uint64_t warp_collective(WarpOp op, unsigned mask, uint64_t value, int argument, const Site& site) {
  const Quiet quiet;
  if (running() == nullptr) fault(concat(name_of(op), " outside a kernel"), site);
  return running()->collective(op, mask, value, argument, site);
}

namespace {

uint64_t shuffled(const Collective& slot, int lane) {
  const int width = slot.argument[lane] >> 16, by = slot.argument[lane] & 0xffff;
  if (width < 1 || width > kWarp || (width & (width - 1))) {
    fault(concat(name_of(slot.op), ": width must be a power of two up to 32; got ", width), slot.site);
  }
  const int first = lane / width * width;
  int from = lane;
  switch (slot.op) {
    case WarpOp::kShfl: from = first + by % width; break;
    case WarpOp::kShflUp: from = lane - by < first ? lane : lane - by; break;
    case WarpOp::kShflDown: from = lane + by >= first + width ? lane : lane + by; break;
    default: from = (lane ^ by) >= first + width ? lane : lane ^ by; break;
  }
  if (!(slot.mask >> from & 1)) {
    fault(concat(name_of(slot.op), ": lane ", lane, " reads lane ", from, ", which mask ", hex(slot.mask),
                 " does not name"),
          slot.site);
  }
  return slot.value[from];
}

}  // namespace

uint64_t result_of(const Collective& slot, int lane) {
  uint64_t ballot = 0, same = 0;
  bool all_same = true;
  uint32_t u_min = ~0u, u_max = 0, sum = 0, all_and = ~0u, all_or = 0, all_xor = 0;
  int32_t s_min = INT32_MAX, s_max = INT32_MIN;
  for (int i = 0; i < kWarp; ++i) {
    if (!(slot.mask >> i & 1)) continue;
    const auto u = static_cast<uint32_t>(slot.value[i]);
    const auto s = static_cast<int32_t>(u);
    ballot |= static_cast<uint64_t>(u != 0) << i;
    if (slot.value[i] == slot.value[lane]) {
      same |= uint64_t{1} << i;
    } else {
      all_same = false;
    }
    sum += u;
    u_min = std::min(u_min, u);
    u_max = std::max(u_max, u);
    s_min = std::min(s_min, s);
    s_max = std::max(s_max, s);
    all_and &= u;
    all_or |= u;
    all_xor ^= u;
  }
  switch (slot.op) {
    case WarpOp::kSync: return 0;
    case WarpOp::kShfl:
    case WarpOp::kShflUp:
    case WarpOp::kShflDown:
    case WarpOp::kShflXor: return shuffled(slot, lane);
    case WarpOp::kBallot: return ballot;
    case WarpOp::kAny: return ballot != 0;
    case WarpOp::kAll: return ballot == slot.mask;
    case WarpOp::kMatchAny: return same;
    case WarpOp::kMatchAll: return all_same ? slot.mask : 0;
    case WarpOp::kAddU: return sum;
    case WarpOp::kMinU: return u_min;
    case WarpOp::kMaxU: return u_max;
    case WarpOp::kMinS: return static_cast<uint32_t>(s_min);
    case WarpOp::kMaxS: return static_cast<uint32_t>(s_max);
    case WarpOp::kAnd: return all_and;
    case WarpOp::kOr: return all_or;
    case WarpOp::kXor: return all_xor;
  }
  return 0;
}

}  // namespace cuda_on_cpu
