// A second stream for a call whose steps may overlap. It begins with what the caller's stream has to do before it, and
// the caller's stream goes on only after it: so tensors that only the call uses may be freed as if there were one
// stream.
#pragma once

#include <map>
#include <mutex>
#include <vector>

#include "common/cuda/cuda.cuh"

namespace speechlm {

class SideStream {
 public:
  static constexpr int kEvents = 4;

  // The device must be current. While `main` captures a graph there is no second stream: one that has been in a capture
  // stays part of it until its end, and calls of other threads could not use it.
  SideStream(int device, cudaStream_t main, bool is_wanted) : device_(device), main_(main) {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    cuda_check(cudaStreamIsCapturing(main, &capture), "cudaStreamIsCapturing");
    if (!is_wanted || capture != cudaStreamCaptureStatusNone) return;
    lane_ = take();
    is_used_ = true;
  }
  ~SideStream() {
    if (!is_used_) return;
    try {  // after an error too, or memory would be freed under the kernels of the side stream
      join();
    } catch (const std::exception&) {
    }
    const std::lock_guard<std::mutex> lock(mutex());
    idle()[device_].push_back(lane_);
  }
  SideStream(const SideStream&) = delete;
  SideStream& operator=(const SideStream&) = delete;

  // The second stream, or the caller's where there is none.
  cudaStream_t side() const { return is_used_ ? lane_.stream : main_; }

  // Everything enqueued on `side` from here on waits for what is on `main` now, and the other way round. `event` is a
  // number below kEvents; a wait for it refers to the latest signal.
  void signal_main(int event) const { record(event, main_); }
  void signal_side(int event) const { record(event, side()); }
  void side_waits(int event) const { wait(side(), event); }
  void main_waits(int event) const { wait(main_, event); }

  // The caller's stream waits for the second one.
  void join() const {
    signal_side(kEvents);
    main_waits(kEvents);
  }

 private:
  struct Lane {
    cudaStream_t stream;
    cudaEvent_t events[kEvents + 1];
  };

  // Lanes are kept for the life of the process: there are as many as there were calls at a time.
  Lane take() const {
    {
      const std::lock_guard<std::mutex> lock(mutex());
      std::vector<Lane>& lanes = idle()[device_];
      if (!lanes.empty()) {
        const Lane lane = lanes.back();
        lanes.pop_back();
        return lane;
      }
    }
    Lane lane;
    cuda_check(cudaStreamCreateWithFlags(&lane.stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    for (cudaEvent_t& event : lane.events) {
      cuda_check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
    }
    return lane;
  }

  static std::mutex& mutex() {
    static std::mutex one;
    return one;
  }
  static std::map<int, std::vector<Lane>>& idle() {
    static auto* all = new std::map<int, std::vector<Lane>>;  // never destroyed: the driver may be gone before it
    return *all;
  }

  void record(int event, cudaStream_t stream) const {
    if (is_used_) cuda_check(cudaEventRecord(lane_.events[event], stream), "cudaEventRecord");
  }
  void wait(cudaStream_t stream, int event) const {
    if (is_used_) cuda_check(cudaStreamWaitEvent(stream, lane_.events[event], 0), "cudaStreamWaitEvent");
  }

  int device_;
  cudaStream_t main_;
  Lane lane_{};
  bool is_used_ = false;
};

}  // namespace speechlm
