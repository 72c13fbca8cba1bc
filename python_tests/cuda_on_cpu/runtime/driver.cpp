// The driver of kernel/driver.h, and what csrc's generated build_info.cpp says of a build.
#include "cuda_on_cpu/kernel/driver.h"

#include "common/build_info.h"

namespace cuda_on_cpu {

Machine& machine() {
  static Machine one;
  return one;
}

std::vector<CUdevice>& context_stack() {
  thread_local std::vector<CUdevice> contexts;
  return contexts;
}

void note_launch() { machine().launched_on.push_back(context_stack().empty() ? -1 : context_stack().back()); }

namespace {

FakeContext g_contexts[kDevices] = {{0}, {1}};

bool is_device(CUdevice device) { return device >= 0 && device < kDevices; }

}  // namespace
}  // namespace cuda_on_cpu

using namespace cuda_on_cpu;

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  if (!is_device(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
  if (context_stack().empty()) return CUDA_ERROR_INVALID_CONTEXT;
  *device = context_stack().back();
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  ++machine().references[device];
  *context = &g_contexts[device];
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease(CUdevice device) {
  if (!is_device(device) || machine().references[device] == 0) return CUDA_ERROR_INVALID_CONTEXT;
  --machine().references[device];
  return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent(CUcontext context) {
  if (context == nullptr || machine().references[context->device] == 0) return CUDA_ERROR_INVALID_CONTEXT;
  context_stack().push_back(context->device);
  return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent(CUcontext* context) {
  if (context_stack().empty()) return CUDA_ERROR_INVALID_CONTEXT;
  *context = &g_contexts[context_stack().back()];
  context_stack().pop_back();
  return CUDA_SUCCESS;
}

void* cuda_driver_function(const char* name) {
#define SX_FUNCTION(function) \
  if (std::strcmp(name, #function) == 0) return reinterpret_cast<void*>(&function);
  SX_FUNCTION(cuDeviceGet)
  SX_FUNCTION(cuCtxGetDevice)
  SX_FUNCTION(cuDevicePrimaryCtxRetain)
  SX_FUNCTION(cuDevicePrimaryCtxRelease)
  SX_FUNCTION(cuCtxPushCurrent)
  SX_FUNCTION(cuCtxPopCurrent)
#undef SX_FUNCTION
  return nullptr;
}

namespace speechlm {

BuildInfo build_info() {
  BuildInfo info;
  info.cuda_version = "13.0";
  info.cuda_archs = "80-real;90a-real;100-real;100-virtual";
  return info;
}

}  // namespace speechlm
