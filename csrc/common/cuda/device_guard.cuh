// Makes a device current for the launches of a scope.
//
// This module and torch each have a CUDA runtime of their own. What they share is the driver and, in each thread, its
// stack of contexts: every runtime works on the context on top, whoever put it there. So the guard asks the driver, and
// pushes and pops. cudaGetDevice and cudaSetDevice instead would, in a thread that has no device yet, make device 0
// current at the end and put a context of some hundred MB on it.
#pragma once

#include <cuda.h>

#include "common/cuda/error.cuh"

namespace speechlm {

// The driver's functions for contexts, found through the runtime: this module does not link the driver, so that it
// loads where there is none.
struct ContextApi {
  CUresult (*get_device)(CUdevice*, int);
  CUresult (*current_device)(CUdevice*);
  CUresult (*retain_primary)(CUcontext*, CUdevice);
  CUresult (*release_primary)(CUdevice);
  CUresult (*push)(CUcontext);
  CUresult (*pop)(CUcontext*);
};

template <typename Function>
void find_in_driver(const char* name, Function*& function) {
  constexpr unsigned kVersion = 12000;  // the functions' form as of CUDA 12.0
  void* found = nullptr;
  cudaDriverEntryPointQueryResult state = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  cuda_check(cudaGetDriverEntryPointByVersion(name, &found, kVersion, cudaEnableDefault, &state), name);
#else
  (void)kVersion;
  cuda_check(cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &state), name);
#endif
  if (state != cudaDriverEntryPointSuccess || found == nullptr) cuda_check(cudaErrorInsufficientDriver, name);
  function = reinterpret_cast<Function*>(found);
}

inline const ContextApi& context_api() {
  static const ContextApi api = [] {
    ContextApi found;
    find_in_driver("cuDeviceGet", found.get_device);
    find_in_driver("cuCtxGetDevice", found.current_device);
    find_in_driver("cuDevicePrimaryCtxRetain", found.retain_primary);
    find_in_driver("cuDevicePrimaryCtxRelease", found.release_primary);
    find_in_driver("cuCtxPushCurrent", found.push);
    find_in_driver("cuCtxPopCurrent", found.pop);
    return found;
  }();
  return api;
}

// No call of it synchronizes or touches a stream, so a stream may be capturing.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : api_(context_api()) {
    CUdevice current = 0;
    check(api_.get_device(&device_, device), "cuDeviceGet");
    if (api_.current_device(&current) == CUDA_SUCCESS && current == device_) return;
    CUcontext context = nullptr;
    check(api_.retain_primary(&context, device_), "cuDevicePrimaryCtxRetain");  // torch's tensors keep it alive
    const CUresult pushed = api_.push(context);
    if (pushed != CUDA_SUCCESS) api_.release_primary(device_);
    check(pushed, "cuCtxPushCurrent");
    is_pushed_ = true;
  }
  ~DeviceGuard() {
    if (!is_pushed_) return;
    CUcontext context = nullptr;
    api_.pop(&context);
    api_.release_primary(device_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  // The driver's numbers of errors are the runtime's.
  static void check(CUresult status, const char* what) { cuda_check(static_cast<cudaError_t>(status), what); }

  const ContextApi& api_;
  CUdevice device_ = 0;
  bool is_pushed_ = false;
};

}  // namespace speechlm
