// Python bindings of multistream_sample: check every tensor, then run the kernel of their device. The kernels check the
// values in device memory.
#include <algorithm>

#include "common/bind.h"
#include "common/tensor/arguments.h"
#include "common/tensor/tensor_caster.h"
#include "multistream_sample/multistream_sample.h"

namespace speechlm {
namespace {

namespace py = pybind11;

constexpr const char* kOp = "multistream_sample";

// The tensors of a state in the order of the op's schema, and the outputs.
struct SampleTensors {
  TensorView column_ids, sampling, choice, limits, request, guidance, progress, forced, history, history_logprob;
  std::optional<TensorView> allowed;
};

struct SampleOutputs {
  TensorView tokens, logprob, is_content, failed, done;
};

struct SampleRules {
  std::vector<int64_t> bounds, delays, pad_ids;
  int64_t eos_id, eos_column, tail;
  int64_t first_stream, end_stream;  // end_stream -1: all
};

void copy_rules(const SampleRules& rules, SampleState& a) {
  a.num_streams = static_cast<int64_t>(rules.delays.size());
  SX_CHECK(a.num_streams >= 1 && a.num_streams <= kMaxSampleStreams, kOp, ": 1 to ", kMaxSampleStreams,
           " streams; got ", a.num_streams);
  const auto S = static_cast<size_t>(a.num_streams);
  SX_CHECK(rules.bounds.size() == S + 1 && rules.pad_ids.size() == S, kOp, ": delays has ", S, " streams, bounds ",
           rules.bounds.size() - 1, ", pad_ids ", rules.pad_ids.size());
  for (size_t s = 0; s < S; ++s) {
    const int64_t width = rules.bounds[s + 1] - rules.bounds[s];
    SX_CHECK(rules.bounds[0] == 0 && width >= 0, kOp, ": bounds must ascend from 0; got ", rules.bounds[s], " and ",
             rules.bounds[s + 1], " around stream ", s);
    SX_CHECK(width <= kMaxSampleColumns, kOp, ": a stream has at most ", kMaxSampleColumns, " columns; stream ", s,
             " has ", width);
    SX_CHECK(rules.delays[s] >= 0 && rules.delays[s] < int64_t{1} << 31, kOp, ": delay ", rules.delays[s],
             " of stream ", s);
  }
  SX_CHECK(rules.eos_column >= 0 && rules.eos_column < rules.bounds[1], kOp, ": eos_column ", rules.eos_column,
           " is none of stream 0's ", rules.bounds[1], " columns");
  SX_CHECK(rules.tail >= 0 && rules.tail < int64_t{1} << 31, kOp, ": tail ", rules.tail);
  std::copy(rules.bounds.begin(), rules.bounds.end(), a.bounds);
  std::copy(rules.delays.begin(), rules.delays.end(), a.delays);
  std::copy(rules.pad_ids.begin(), rules.pad_ids.end(), a.pad_ids);
  a.eos_id = rules.eos_id;
  a.eos_column = rules.eos_column;
  a.tail = rules.tail;
  a.first_stream = rules.first_stream;
  a.end_stream = rules.end_stream < 0 ? a.num_streams : rules.end_stream;
  SX_CHECK(a.first_stream >= 0 && a.first_stream < a.end_stream && a.end_stream <= a.num_streams, kOp,
           ": streams must be (first, last) with 0 <= first < last <= ", a.num_streams, "; got (", a.first_stream, ", ",
           a.end_stream, ")");
}

SampleState checked_state(const TensorView& logits, const SampleTensors& t, const SampleOutputs& out,
                          const SampleRules& rules) {
  SampleState a;
  copy_rules(rules, a);
  const Expect expect(kOp, "logits", logits);
  const int64_t S = a.num_streams, C = rules.bounds.back();
  SX_CHECK(logits.sizes[1] == C, kOp, ": logits must have ", C, " columns; got ", logits.describe());
  expect(t.progress, "progress", {DType::kInt64}, {-1, 7});
  const int64_t B = t.progress.sizes[0];
  expect(t.limits, "limits", {DType::kInt64}, {B, -1, 4});
  const int64_t G = t.limits.sizes[1];
  SX_CHECK(G >= 1, kOp, ": limits must have at least one segment; got ", t.limits.describe());
  expect(t.sampling, "sampling", {DType::kFloat32}, {B, G, S, 4});
  expect(t.choice, "choice", {DType::kInt32}, {B, G, S, 4});
  expect(t.request, "request", {DType::kInt64}, {B, 4});
  a.num_requests = B;
  a.num_segments = G;
  a.num_columns = C;
  a.column_ids = expect.ptr<int64_t>(t.column_ids, "column_ids", {C});
  a.settings = t.sampling.ptr<SampleSettings>();
  a.choice = t.choice.ptr<SampleChoice>();
  a.limits = t.limits.ptr<SampleLimits>();
  a.request = t.request.ptr<SampleRequest>();
  a.progress = t.progress.ptr<SampleProgress>();
  a.guidance = expect.ptr<float>(t.guidance, "guidance", {B});
  a.forced = expect.ptr<int64_t>(t.forced, "forced", {B, -1, S});
  a.num_forced = t.forced.sizes[1];
  a.history = expect.ptr<int64_t>(t.history, "history", {B, -1, S});
  a.num_history = t.history.sizes[1];
  a.history_logprob = expect.ptr<float>(t.history_logprob, "history_logprob", {B, a.num_history, S});
  if (t.allowed) {
    a.allowed = expect.ptr<uint8_t>(*t.allowed, "allowed", {t.allowed->rank() == 2 ? -1 : B, C});
    const int64_t rows = t.allowed->sizes[0];
    SX_CHECK(rows == 1 || rows == B, kOp, ": allowed must have 1 or ", B, " rows; got ", t.allowed->describe());
    a.allowed_stride = rows == 1 ? 0 : C;
  }
  a.tokens = expect.ptr<int64_t>(out.tokens, "partial.tokens", {B, S});
  a.logprob = expect.ptr<float>(out.logprob, "partial.logprob", {B, S});
  a.is_content = expect.ptr<uint8_t>(out.is_content, "partial.is_content", {B, S});
  a.failed = expect.ptr<uint8_t>(out.failed, "partial.failed", {B});
  a.done = expect.ptr<uint8_t>(out.done, "partial.done", {B});
  return a;
}

template <typename T>
void run(const TensorView& logits, const SampleState& state, int threads, uintptr_t stream) {
  const SampleArgs<T> args{state, logits.ptr<T>(), logits.sizes[0], logits.strides[0]};
  const py::gil_scoped_release no_gil;
  if constexpr (kHasCuda) {
    if (logits.device == Device::kCuda) {
      return multistream_sample_cuda(args, logits.device_index, reinterpret_cast<void*>(stream));
    }
  }
  multistream_sample_cpu(args, threads);
}

void multistream_sample(const TensorView& logits, const TensorView& column_ids, const TensorView& sampling,
                        const TensorView& choice, const TensorView& limits, const TensorView& request,
                        const TensorView& guidance, const TensorView& progress, const TensorView& forced,
                        const TensorView& history, const TensorView& history_logprob,
                        const std::optional<TensorView>& allowed, std::vector<int64_t> bounds,
                        std::vector<int64_t> delays, std::vector<int64_t> pad_ids, int64_t eos_id, int64_t eos_column,
                        int64_t tail, const TensorView& tokens, const TensorView& logprob, const TensorView& is_content,
                        const TensorView& failed, const TensorView& done, int threads, uintptr_t stream,
                        int64_t first_stream, int64_t end_stream) {
  SX_CHECK(logits.not_a_tensor.empty() && logits.rank() == 2, kOp, ": logits must be [R, C]; got ", logits.describe());
  SX_CHECK(logits.device != Device::kOther, kOp, ": logits must be on cpu or cuda; got ", logits.describe());
  SX_CHECK(logits.strides[1] == 1 || logits.sizes[1] <= 1, kOp,
           ": the columns of logits must lie side by side; got stride ", logits.strides[1]);
  SX_CHECK(logits.strides[0] >= 0, kOp, ": logits must have no negative stride");
  const SampleState state = checked_state(
      logits,
      {column_ids, sampling, choice, limits, request, guidance, progress, forced, history, history_logprob, allowed},
      {tokens, logprob, is_content, failed, done},
      {std::move(bounds), std::move(delays), std::move(pad_ids), eos_id, eos_column, tail, first_stream, end_stream});
  switch (logits.dtype) {
    case DType::kFloat32: return run<float>(logits, state, threads, stream);
    case DType::kBFloat16: return run<BFloat16>(logits, state, threads, stream);
    case DType::kFloat16: return run<Float16>(logits, state, threads, stream);
    default: SX_CHECK(false, kOp, ": logits must be float32, bfloat16 or float16; got ", logits.describe());
  }
}

}  // namespace

void bind_multistream_sample(py::module_& m) {
  m.def("multistream_sample", &multistream_sample, py::arg("logits"), py::arg("column_ids"), py::arg("sampling"),
        py::arg("choice"), py::arg("limits"), py::arg("request"), py::arg("guidance"), py::arg("progress"),
        py::arg("forced"), py::arg("history"), py::arg("history_logprob"), py::arg("allowed").none(true),
        py::arg("bounds"), py::arg("delays"), py::arg("pad_ids"), py::arg("eos_id"), py::arg("eos_column"),
        py::arg("tail"), py::arg("tokens"), py::arg("logprob"), py::arg("is_content"), py::arg("failed"),
        py::arg("done"), py::arg("threads"), py::arg("stream"), py::arg("first_stream") = 0,
        py::arg("end_stream") = -1);
}

}  // namespace speechlm
