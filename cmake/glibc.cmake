# Links _C for an older glibc than this system's (SPEECHLM_GLIBC, e.g. 2.28 for manylinux_2_28). Objects are compiled as
# always; only the link differs:
# - stubs of libc and libm in place of the system's give each symbol its newest version up to SPEECHLM_GLIBC;
# - before glibc 2.34, threads, dlopen and shared memory were libraries of their own, which the module then names;
# - libstdc++ is linked in, since the system's would need new versions of it; libgcc_s is not, as every system has it.
# `auditwheel repair` is the judge: it refuses a module that still needs a newer symbol.
if(NOT SPEECHLM_GLIBC)
  return()
endif()
if(NOT CMAKE_SYSTEM_NAME STREQUAL "Linux")
  message(FATAL_ERROR "SPEECHLM_GLIBC=${SPEECHLM_GLIBC} is for Linux; this is ${CMAKE_SYSTEM_NAME}.")
endif()
execute_process(COMMAND ${Python_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/glibc_stubs.py --glibc ${SPEECHLM_GLIBC}
  --cc ${CMAKE_CXX_COMPILER} --out ${CMAKE_BINARY_DIR}/glibc-${SPEECHLM_GLIBC}
  OUTPUT_VARIABLE speechlm_stubs OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
if(NOT speechlm_stubs)
  message(STATUS "speechlm_ext: this glibc is no newer than ${SPEECHLM_GLIBC}; linked as it is")
  return()
endif()
message(STATUS "speechlm_ext: linked for glibc ${SPEECHLM_GLIBC}")
target_sources(_C PRIVATE ${CMAKE_CURRENT_LIST_DIR}/glibc_compat.cpp)
target_link_options(_C PRIVATE -static-libstdc++ -Wl,--gc-sections -Wl,--no-as-needed
  -l:libpthread.so.0 -l:libdl.so.2 -l:librt.so.1 -Wl,--as-needed)
target_link_libraries(_C PRIVATE ${speechlm_stubs})
