// A failed CUDA call as an exception whose message says what to do.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "common/build_info.h"
#include "common/check.h"

namespace speechlm {

// "12.4" for 12040.
inline std::string version_text(int version) { return concat(version / 1000, ".", version % 1000 / 10); }

// The smallest driver that runs programs of a CUDA major version (NVIDIA, "CUDA Compatibility", table 1; the same table
// is in speechlm_ext/doctor/driver.py). 0: not in the table.
inline int oldest_driver(int cuda_major) { return cuda_major == 12 ? 525 : cuda_major == 13 ? 580 : 0; }

// Faults of a running kernel. They are reported by whatever call comes next, so the kernel may be another library's.
inline bool is_kernel_fault(cudaError_t status) {
  switch (status) {
    case cudaErrorECCUncorrectable:
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure: return true;
    default: return false;
  }
}

// What to do where this build cannot run on this machine; "" for other errors.
inline std::string setup_remedy(cudaError_t status) {
  constexpr auto kInstall = "SPEECHLM_CUDA=ON pip install --force-reinstall --no-deps .` in the source folder";
  if (status == cudaErrorInsufficientDriver) {
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    const int oldest = oldest_driver(runtime / 1000);
    const std::string needs = oldest > 0 ? concat(" and needs an NVIDIA driver of ", oldest, " or later") : "";
    const std::string has = driver > 0 ? concat("the driver here supports CUDA up to ", version_text(driver))
                                       : std::string("no driver was found here");
    return concat("this build has CUDA ", version_text(runtime), needs, ", but ", has,
                  ". Update the driver, or build with an nvcc of the driver's CUDA version: `CUDACXX=/path/to/nvcc ",
                  kInstall);
  }
  if (status == cudaErrorSystemDriverMismatch) {
    return "the driver's kernel module and its libraries are of different versions, as after an update without a "
           "reboot: reboot, or load the module anew";
  }
  if (status == cudaErrorCompatNotSupportedOnDevice) {
    return "this GPU does not support CUDA's forward-compatibility libraries: take the cuda-compat folder out of "
           "LD_LIBRARY_PATH, or update the driver";
  }
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction ||
      status == cudaErrorUnsupportedPtxVersion) {
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    return concat("the kernels are compiled for ", build_info().cuda_archs, ", and this GPU is sm_", major, minor,
                  ". Build for it: `SPEECHLM_CUDA_ARCHS=", major, minor, " ", kInstall);
  }
  return "";
}

// Throws std::invalid_argument where the machine and the build do not go together, else std::runtime_error.
inline void cuda_check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clear it, or the next launch would report this one again
  const std::string text = concat("speechlm_ext: ", what, ": ", cudaGetErrorString(status));
  const std::string remedy = setup_remedy(status);
  if (!remedy.empty()) throw std::invalid_argument(concat(text, ": ", remedy, "; `speechlm doctor` tells more"));
  if (is_kernel_fault(status)) {
    throw std::runtime_error(
        concat(text, " (maybe from earlier work on this device; rerun with CUDA_LAUNCH_BLOCKING=1)"));
  }
  throw std::runtime_error(text);
}

}  // namespace speechlm
