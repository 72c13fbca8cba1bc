// The inner loop of delay_pack, compiled once per instruction set; see common/cpu/simd.h.
//
// Four ids are loaded one by one, because neighbours in a row are from different frames, and processed and stored as
// one vector: on common processors that is as fast as a plain copy, which hardware gathers are not.
#include "delay_pack/rows.h"

#include <cstring>
#include <type_traits>

namespace speechlm {
namespace SX_SIMD {
namespace {

using Wide = int64_t __attribute__((vector_size(32)));
using WideUnsigned = uint64_t __attribute__((vector_size(32)));
using Narrow = int32_t __attribute__((vector_size(16)));
using Floats = float __attribute__((vector_size(16)));

// Unaligned. By reference, because a vector as return value would need one calling convention for every set.
template <typename Vector, typename T>
inline void load(Vector& v, const T* from) {
  std::memcpy(&v, from, sizeof v);
}

template <typename In, typename Out, bool kWeight, bool kCheck, bool kNarrow>
bool pack_rows(const PackRows<In, Out>& a, const PackPeriod& p) {
  Wide bad{};
  const int64_t all = p.limited ? -1 : 0;
  const Wide limited{all, all, all, all};
  const In* ids = a.ids;
  const float* weight = a.weight;
  Out* to = a.out_ids;
  Out* label = a.out_labels;
  float* out_weight = a.out_weight;
  for (int64_t i = 0; i < a.periods; ++i) {
    for (int64_t e = 0; e < p.elements; e += kPackLanes) {
      const int64_t* at = p.index + e;
      Wide mask;
      WideUnsigned limit, offset;
      Floats w;
      load(mask, p.mask + e);
      load(limit, p.limit + e);
      load(offset, p.offset + e);
      load(w, p.factor + e);
      Wide x{ids[at[0]], ids[at[1]], ids[at[2]], ids[at[3]]};
      if (kNarrow) x &= mask;
      if (kCheck) bad |= (reinterpret_cast<WideUnsigned>(x) >= limit) & limited;
      const Wide raw = x;
      x = reinterpret_cast<Wide>(reinterpret_cast<WideUnsigned>(x) + offset);
      // A sum has overflowed where its sign is neither of its terms'.
      if (kCheck) bad |= ((raw ^ x) & (reinterpret_cast<Wide>(offset) ^ x)) < 0;
      if constexpr (std::is_same_v<Out, int64_t>) {
        std::memcpy(to + e, &x, sizeof x);
        std::memcpy(label + e, &x, sizeof x);
      } else {
        const Narrow y = __builtin_convertvector(x, Narrow);
        if (kCheck) bad |= __builtin_convertvector(y, Wide) != x;
        std::memcpy(to + e, &y, sizeof y);
        std::memcpy(label + e, &y, sizeof y);
      }
      if (kWeight) {
        // A stream without content has the factor 0, but 0 * NaN is NaN.
        const Floats given{weight[at[0]], weight[at[1]], weight[at[2]], weight[at[3]]};
        w *= given;
        if (kNarrow) w = reinterpret_cast<Floats>(reinterpret_cast<Narrow>(w) & __builtin_convertvector(mask, Narrow));
      }
      std::memcpy(out_weight + e, &w, sizeof w);
    }
    ids += p.rows * a.width;
    if (kWeight) weight += p.rows * a.width;
    to += p.elements;
    label += p.elements;
    out_weight += p.elements;
  }
  return (bad[0] | bad[1] | bad[2] | bad[3]) != 0;
}

template <typename In, typename Out, bool kWeight, bool kCheck>
bool by_width(const PackRows<In, Out>& a, const PackPeriod& p) {
  return p.narrow ? pack_rows<In, Out, kWeight, kCheck, true>(a, p) : pack_rows<In, Out, kWeight, kCheck, false>(a, p);
}

template <typename In, typename Out>
bool dispatch(const PackRows<In, Out>& a, const PackPeriod& p, bool check) {
  if (a.weight != nullptr) return check ? by_width<In, Out, true, true>(a, p) : by_width<In, Out, true, false>(a, p);
  return check ? by_width<In, Out, false, true>(a, p) : by_width<In, Out, false, false>(a, p);
}

}  // namespace

template <typename In, typename Out>
PackRowsLoop<In, Out> pack_rows_loop() {
  return &dispatch<In, Out>;
}

template PackRowsLoop<int32_t, int32_t> pack_rows_loop();
template PackRowsLoop<int32_t, int64_t> pack_rows_loop();
template PackRowsLoop<int64_t, int32_t> pack_rows_loop();
template PackRowsLoop<int64_t, int64_t> pack_rows_loop();

}  // namespace SX_SIMD
}  // namespace speechlm
