// Instantiates common/cub.cuh, so that it is known to compile before and beside its users.
#include "common/cuda/cub.cuh"

namespace speechlm {

template void sort_pairs<uint32_t, uint32_t>(void*, size_t&, const uint32_t*, uint32_t*, const uint32_t*, uint32_t*,
                                             uint32_t, int, int, cudaStream_t);
template void exclusive_sum<int32_t, int64_t>(void*, size_t&, const int32_t*, int64_t*, uint32_t, cudaStream_t);

}  // namespace speechlm
