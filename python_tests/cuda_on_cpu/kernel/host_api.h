// The part of the CUDA runtime that host code of the kernels calls.
#pragma once

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "cuda_on_cpu/kernel/driver.h"
#include "cuda_on_cpu/kernel/events.h"
#include "cuda_on_cpu/kernel/memory.h"

#define CUDART_VERSION 13000

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorECCUncorrectable = 214,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchTimeout = 702,
  cudaErrorAssert = 710,
  cudaErrorHardwareStackError = 714,
  cudaErrorIllegalInstruction = 715,
  cudaErrorMisalignedAddress = 716,
  cudaErrorInvalidAddressSpace = 717,
  cudaErrorInvalidPc = 718,
  cudaErrorLaunchFailure = 719,
  cudaErrorSystemDriverMismatch = 803,
  cudaErrorCompatNotSupportedOnDevice = 804
};
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0, cudaDriverEntryPointSymbolNotFound = 1 };
constexpr unsigned long long cudaEnableDefault = 0;
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};

inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "an error"; }
inline cudaError_t cudaGetLastError() {
  return static_cast<cudaError_t>(std::exchange(cuda_on_cpu::machine().next_error, 0));
}
inline cudaError_t cudaDriverGetVersion(int* v) { return *v = cuda_on_cpu::machine().driver_version, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* v) { return *v = cuda_on_cpu::machine().runtime_version, cudaSuccess; }
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* found) {
  *function = cuda_driver_function(name);
  *found = *function == nullptr ? cudaDriverEntryPointSymbolNotFound : cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
// Of a runtime that keeps a device of its own for each thread, 0 to begin with, and knows no other runtime's.
inline int& cuda_runtime_device() {
  thread_local int device = 0;
  return device;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = cuda_runtime_device(), cudaSuccess; }
// Makes the device's context, and puts it in the place of the current one.
inline cudaError_t cudaSetDevice(int device) {
  CUcontext context = nullptr;
  if (cuDevicePrimaryCtxRetain(&context, device) != CUDA_SUCCESS) return cudaErrorInvalidValue;
  std::vector<CUdevice>& stack = cuda_on_cpu::context_stack();
  if (!stack.empty()) stack.pop_back();
  stack.push_back(device);
  cuda_runtime_device() = device;
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cuda_on_cpu::count_event("cudaStreamSynchronize"), cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cuda_on_cpu::count_event("cudaDeviceSynchronize"), cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const cuda_on_cpu::Machine& machine = cuda_on_cpu::machine();
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 4; break;
    case cudaDevAttrComputeCapabilityMajor: *value = machine.capability[0]; break;
    case cudaDevAttrComputeCapabilityMinor: *value = machine.capability[1]; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = machine.shared_bytes; break;
  }
  return cudaSuccess;
}
// Streams and events have a name alone: all work is done when it is enqueued, and the schedule tells of their order.
using cudaEvent_t = void*;
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };
constexpr unsigned cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2;
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return *stream = std::malloc(1), cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return *event = std::malloc(1), cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  const bool is = cuda_on_cpu::machine().is_capturing;
  return *status = is ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone, cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cuda_on_cpu::note_stream("record", "", stream, event), cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  return cuda_on_cpu::note_stream("wait", "", stream, event), cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > cuda_on_cpu::machine().shared_bytes) return cudaErrorInvalidValue;
  cuda_on_cpu::allow_dynamic_shared(reinterpret_cast<const void*>(kernel), static_cast<size_t>(bytes));
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t = nullptr) {
  cuda_on_cpu::count_event("cudaMemsetAsync");
  return std::memset(p, value, bytes), cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t = nullptr) {
  cuda_on_cpu::count_event("cudaMemcpyAsync");
  return std::memcpy(to, from, bytes), cudaSuccess;
}
// Fresh memory is poisoned: unwritten values read as NaN, or as -1.
template <typename T>
cudaError_t cudaMalloc(T** p, size_t bytes) {
  *p = static_cast<T*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
  if (*p == nullptr) return cudaErrorMemoryAllocation;
  std::memset(static_cast<void*>(*p), 0xFF, bytes);
  cuda_on_cpu::allow_memory(*p, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* p) { return std::free(p), cudaSuccess; }
