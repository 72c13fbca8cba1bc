// The rooms' entries into the Python module: one line per op, called by module.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace speechlm {

void bind_delay_pack(pybind11::module_& m);

}  // namespace speechlm
