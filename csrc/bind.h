// Each op's room binds itself; a new op adds two lines here.
#pragma once

#include <pybind11/pybind11.h>

namespace speechlm {

void bind_delay_pack(pybind11::module_& m);

inline void bind_ops(pybind11::module_& m) { bind_delay_pack(m); }

}  // namespace speechlm
