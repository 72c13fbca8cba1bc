// Python's door to multistream_loss: checks of every tensor, then the row kernel of their device. No arithmetic here.
#include <optional>
#include <type_traits>

#include "bind.h"
#include "common/cuda/cuda_build.h"
#include "common/tensor/tensor_caster.h"
#include "multistream_loss/multistream_loss.h"

namespace speechlm {
namespace {

namespace py = pybind11;

constexpr const char* kOp = "multistream_loss";
constexpr auto kFloats = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};

struct Scopes {
  std::vector<LossStream> streams;
  std::vector<LossSlice> slices;
  int64_t num_sums = 0;
};

// One entry per stream: (index, wants column sums, [(id, begin, count), …]).
using StreamTuple = std::tuple<int64_t, bool, std::vector<std::tuple<int64_t, int64_t, int64_t>>>;

Scopes scopes_of(const std::vector<StreamTuple>& given, int64_t num_targets, int64_t num_columns) {
  Scopes out;
  SX_CHECK(!given.empty() && static_cast<int64_t>(given.size()) <= kMostLossStreams,
           "multistream_loss: a chunk serves 1 to ", kMostLossStreams, " streams; got ", given.size());
  for (const auto& [index, wants_sums, slices] : given) {
    SX_CHECK(index >= 0 && index < num_targets, "multistream_loss: stream ", index, " of ", num_targets);
    int64_t end = 0;
    LossStream stream{index, static_cast<int64_t>(out.slices.size()), static_cast<int64_t>(slices.size()), 0, -1};
    for (const auto& [id, begin, count] : slices) {
      SX_CHECK(begin >= 0 && count >= 1 && begin <= num_columns - count, "multistream_loss: columns ", begin, " to ",
               begin + count, " of ", num_columns);
      SX_CHECK(begin >= end, "multistream_loss: the slices of stream ", index, " must ascend and not overlap; columns ",
               begin, " to ", begin + count, " come after those up to ", end);
      end = begin + count;
      out.slices.push_back({id, begin, count});
      stream.width += count;
    }
    SX_CHECK(stream.width > 0, "multistream_loss: the scope of stream ", index, " is empty");
    if (wants_sums) {
      stream.sums = out.num_sums;
      out.num_sums += stream.width;
    }
    out.streams.push_back(stream);
  }
  return out;
}

// Calls run(T{}) with the type of the logits.
template <typename Run>
auto with_float(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kFloat64: return run(double{});
    case DType::kBFloat16: return run(BFloat16{});
    case DType::kFloat16: return run(Float16{});
    default: return run(float{});
  }
}

template <typename T>
LossRowsArgs<T> sized_args(const TensorView& logits, const Scopes& scopes, bool want_grad) {
  LossRowsArgs<T> args;
  args.num_rows = logits.sizes[0];
  args.num_columns = logits.sizes[1];
  args.num_streams = static_cast<int64_t>(scopes.streams.size());
  args.want_grad = want_grad;
  args.streams = scopes.streams.data();
  args.slices = scopes.slices.data();
  args.num_sums = scopes.num_sums;
  return args;
}

// 0 on the CPU.
int64_t workspace_bytes(const TensorView& logits, int64_t num_targets, const std::vector<StreamTuple>& streams,
                        bool want_grad) {
  const bool on_cuda = logits.device == Device::kCuda;
  if (on_cuda) require_cuda_build(kOp);
  logits.expect("multistream_loss: logits", kFloats, on_cuda ? Device::kCuda : Device::kCpu, {-1, -1});
  if (!on_cuda) return 0;
#ifdef SPEECHLM_HAVE_CUDA
  const Scopes scopes = scopes_of(streams, num_targets, logits.sizes[1]);
  return with_float(logits.dtype, [&](auto value) {
    return multistream_loss_workspace(sized_args<decltype(value)>(logits, scopes, want_grad));
  });
#else
  (void)num_targets;
  return 0;
#endif
}

void check_rows(const TensorView& rows, int64_t num_tokens) {
  const int64_t* first = rows.ptr<int64_t>();
  for (int64_t r = 0; r < rows.sizes[0]; ++r) {
    SX_CHECK(first[r] >= 0 && first[r] < num_tokens, "multistream_loss: rows[", r, "] is ", first[r], "; targets has ",
             num_tokens, " rows");
  }
}

void multistream_loss_rows(const TensorView& logits, const TensorView& rows, const TensorView& targets,
                           const TensorView& live, const TensorView& coef, const std::optional<TensorView>& coef_nll,
                           const std::optional<TensorView>& bias, const std::vector<StreamTuple>& streams,
                           double z_loss, double label_smoothing, double softcap, bool want_grad,
                           const std::optional<TensorView>& token_nll, const std::optional<TensorView>& token_entropy,
                           const TensorView& stream_loss, const TensorView& stream_correct,
                           const std::optional<TensorView>& column_sums, int threads,
                           const std::optional<TensorView>& workspace, uintptr_t stream) {
  const bool on_cuda = logits.device == Device::kCuda;
  const Device on = on_cuda ? Device::kCuda : Device::kCpu;
  if (on_cuda) {
    require_cuda_build(kOp);
    logits.expect("multistream_loss: logits", kFloats, on, {-1, -1});
  } else {
    logits.expect("multistream_loss: logits", {DType::kFloat32, DType::kFloat64}, on, {-1, -1});
  }
  // Of all else that is not an integer or a sum of losses.
  const DType dtype = logits.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const auto expect = [&](const TensorView& view, const char* name, std::initializer_list<DType> dtypes,
                          std::initializer_list<int64_t> shape) {
    view.expect(name, dtypes, on, shape);
    SX_CHECK(view.device_index == logits.device_index, name, " must be on the device of the logits, ",
             logits.describe(), "; got ", view.describe());
  };
  expect(rows, "multistream_loss: rows", {DType::kInt64}, {logits.sizes[0]});
  expect(targets, "multistream_loss: targets", {DType::kInt64}, {-1, -1});
  const int64_t N = targets.sizes[0], S = targets.sizes[1];
  expect(live, "multistream_loss: live", {DType::kBool}, {N, S});
  expect(coef, "multistream_loss: coef", {dtype}, {N, S});
  if (coef_nll) expect(*coef_nll, "multistream_loss: coef_nll", {dtype}, {N, S});
  if (token_nll) expect(*token_nll, "multistream_loss: token_nll", {dtype}, {N, S});
  if (token_entropy) expect(*token_entropy, "multistream_loss: token_entropy", {dtype}, {N, S});
  if (!on_cuda) check_rows(rows, N);  // the CUDA kernel looks for itself
  const Scopes scopes = scopes_of(streams, S, logits.sizes[1]);
  const int64_t k = static_cast<int64_t>(scopes.streams.size());
  if (bias) expect(*bias, "multistream_loss: bias", {dtype}, {k, logits.sizes[1]});
  expect(stream_loss, "multistream_loss: stream_loss", {DType::kFloat64}, {k});
  expect(stream_correct, "multistream_loss: stream_correct", {DType::kInt64}, {k});
  if (column_sums) expect(*column_sums, "multistream_loss: column_sums", {dtype}, {scopes.num_sums});
  if (on_cuda) {
    SX_CHECK(workspace.has_value(), "multistream_loss: workspace must be given on CUDA");
    expect(*workspace, "multistream_loss: workspace", {DType::kUInt8}, {-1});
  }
  with_float(logits.dtype, [&](auto value) {
    using T = decltype(value);
    using Acc = Accumulator<T>;
    LossRowsArgs<T> args = sized_args<T>(logits, scopes, want_grad);
    args.num_targets = S;
    args.num_tokens = N;
    args.options = {z_loss, label_smoothing, softcap};
    args.logits = logits.ptr<T>();
    args.rows = rows.ptr<int64_t>();
    args.targets = targets.ptr<int64_t>();
    args.live = live.ptr<uint8_t>();
    args.coef = coef.ptr<Acc>();
    args.coef_nll = coef_nll ? coef_nll->ptr<Acc>() : nullptr;
    args.bias = bias ? bias->ptr<Acc>() : nullptr;
    args.token_nll = token_nll ? token_nll->ptr<Acc>() : nullptr;
    args.token_entropy = token_entropy ? token_entropy->ptr<Acc>() : nullptr;
    args.stream_loss = stream_loss.ptr<double>();
    args.stream_correct = stream_correct.ptr<int64_t>();
    args.column_sums = column_sums ? column_sums->ptr<Acc>() : nullptr;
#ifdef SPEECHLM_HAVE_CUDA
    if (on_cuda) {
      const int64_t needed = multistream_loss_workspace(args);
      SX_CHECK(workspace->sizes[0] >= needed, "multistream_loss: workspace must have ", needed, " bytes; got ",
               workspace->describe());
      SX_CHECK(reinterpret_cast<uintptr_t>(workspace->data) % 16 == 0,
               "multistream_loss: workspace must begin at a multiple of 16 bytes");
      const py::gil_scoped_release no_gil;
      multistream_loss_rows_cuda(args, workspace->data, logits.device_index, reinterpret_cast<void*>(stream));
      return;
    }
#else
    (void)stream;
#endif
    if constexpr (std::is_same_v<T, Acc>) {
      const py::gil_scoped_release no_gil;
      multistream_loss_rows_cpu(args, threads);
    }
  });
}

}  // namespace

void bind_multistream_loss(py::module_& m) {
  m.def("multistream_loss_rows", &multistream_loss_rows, py::arg("logits"), py::arg("rows"), py::arg("targets"),
        py::arg("live"), py::arg("coef"), py::arg("coef_nll").none(true), py::arg("bias").none(true),
        py::arg("streams"), py::arg("z_loss"), py::arg("label_smoothing"), py::arg("softcap"), py::arg("want_grad"),
        py::arg("token_nll").none(true), py::arg("token_entropy").none(true), py::arg("stream_loss"),
        py::arg("stream_correct"), py::arg("column_sums").none(true), py::arg("threads"),
        py::arg("workspace").none(true) = py::none(), py::arg("stream") = 0);
  m.def("multistream_loss_workspace", &workspace_bytes, py::arg("logits"), py::arg("num_targets"), py::arg("streams"),
        py::arg("want_grad"));
}

}  // namespace speechlm
