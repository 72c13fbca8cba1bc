// The ops' bindings, and that of the products that they share; a new op adds two lines here.
#pragma once

#include <pybind11/pybind11.h>

namespace speechlm {

void bind_cublas(pybind11::module_& m);
void bind_decode_layer(pybind11::module_& m);
void bind_delay_pack(pybind11::module_& m);
void bind_kmeans_assign(pybind11::module_& m);
void bind_kmeans_sums(pybind11::module_& m);
void bind_multistream_embed(pybind11::module_& m);
void bind_multistream_loss(pybind11::module_& m);
void bind_multistream_sample(pybind11::module_& m);
void bind_packed_layer(pybind11::module_& m);
void bind_scatter_sum(pybind11::module_& m);

#ifdef SPEECHLM_PLANT_FAULTS
void bind_planted(pybind11::module_& m);
#endif

inline void bind_ops(pybind11::module_& m) {
  bind_cublas(m);
  bind_decode_layer(m);
  bind_delay_pack(m);
  bind_kmeans_assign(m);
  bind_kmeans_sums(m);
  bind_multistream_embed(m);
  bind_multistream_loss(m);
  bind_multistream_sample(m);
  bind_packed_layer(m);
  bind_scatter_sum(m);
}

}  // namespace speechlm
