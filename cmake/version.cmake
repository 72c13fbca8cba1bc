# The version, from its only place, and the variant of this build: "cpu", or "cu130" with the kernels of CUDA 13.0.
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS speechlm_ext/__init__.py)
file(STRINGS speechlm_ext/__init__.py SPEECHLM_VERSION REGEX "^__version__ = ")
if(NOT SPEECHLM_VERSION MATCHES "^__version__ = \"([^\"]+)\"$")
  message(FATAL_ERROR "speechlm_ext/__init__.py must have one line '__version__ = \"…\"'; found '${SPEECHLM_VERSION}'.")
endif()
set(SPEECHLM_VERSION "${CMAKE_MATCH_1}")

set(SPEECHLM_VARIANT cpu)
if(SPEECHLM_HAVE_CUDA)
  string(REPLACE "." "" SPEECHLM_VARIANT "cu${SPEECHLM_CUDA_VERSION}")
endif()
if(SPEECHLM_LOCAL_VERSION AND NOT SPEECHLM_LOCAL_VERSION STREQUAL SPEECHLM_VARIANT)
  message(FATAL_ERROR "SPEECHLM_LOCAL_VERSION is '${SPEECHLM_LOCAL_VERSION}', but this build is '${SPEECHLM_VARIANT}' "
    "(SPEECHLM_CUDA=${SPEECHLM_CUDA}). Set it to '${SPEECHLM_VARIANT}', or choose the other variant by SPEECHLM_CUDA.")
endif()
