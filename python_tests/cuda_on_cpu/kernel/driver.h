// The part of the CUDA driver that host code of the kernels calls, on two devices without hardware: for each device
// whether it has a context, and for each thread its stack of contexts. A second runtime in the process, torch's, would
// see the same.
#pragma once

#include <cstring>
#include <vector>

using CUdevice = int;
using CUcontext = struct FakeContext*;
enum CUresult {
  CUDA_SUCCESS = 0,
  CUDA_ERROR_INVALID_VALUE = 1,
  CUDA_ERROR_INVALID_DEVICE = 101,
  CUDA_ERROR_INVALID_CONTEXT = 201
};

struct FakeContext {
  CUdevice device;
};

namespace cuda_on_cpu {

constexpr int kDevices = 2;

struct Machine {
  int references[kDevices] = {};      // to each device's context; it exists while there are any
  std::vector<CUdevice> launched_on;  // the device of each launch; -1 where no context was current
  CUdevice tensors_on = 0;            // the device of every tensor
  int next_error = 0;                 // that the next cudaGetLastError gives
  int driver_version = 13000, runtime_version = 13000;
  int capability[2] = {9, 0};
  int shared_bytes = 227 * 1024;  // for one block
  bool is_capturing = false;      // every stream
};
Machine& machine();

// The calling thread's contexts, the current one last.
std::vector<CUdevice>& context_stack();

// Records the device of a launch.
void note_launch();

}  // namespace cuda_on_cpu

CUresult cuDeviceGet(CUdevice* device, int ordinal);
CUresult cuCtxGetDevice(CUdevice* device);
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device);
CUresult cuDevicePrimaryCtxRelease(CUdevice device);
CUresult cuCtxPushCurrent(CUcontext context);
CUresult cuCtxPopCurrent(CUcontext* context);
// The address of a function above by its name; null for another name.
void* cuda_driver_function(const char* name);
