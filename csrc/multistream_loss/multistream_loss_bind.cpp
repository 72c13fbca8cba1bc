// Python bindings of multistream_loss: check every tensor, then run the row kernel of their device.
#include <type_traits>

#include "common/bind.h"
#include "common/tensor/arguments.h"
#include "common/tensor/tensor_caster.h"
#include "multistream_loss/multistream_loss.h"

namespace speechlm {
namespace {

namespace py = pybind11;

constexpr const char* kOp = "multistream_loss";

struct Scopes {
  std::vector<LossStream> streams;
  std::vector<LossSlice> slices;
  int64_t num_sums = 0;
  int64_t num_sums_rows = 0;
  int64_t num_bias = 0;
};

// One entry per stream: (index, has a row of bias, wants column sums, [(id, begin, count), …]). Rows of bias and of
// column sums belong to the streams that have one, in their order.
using StreamTuple = std::tuple<int64_t, bool, bool, std::vector<std::tuple<int64_t, int64_t, int64_t>>>;

Scopes scopes_of(const std::vector<StreamTuple>& given, int64_t num_targets, int64_t num_columns) {
  Scopes out;
  SX_CHECK(!given.empty() && static_cast<int64_t>(given.size()) <= kMaxLossStreams, kOp, ": a chunk serves 1 to ",
           kMaxLossStreams, " streams; got ", given.size());
  for (const auto& [index, has_bias, wants_sums, slices] : given) {
    SX_CHECK(index >= 0 && index < num_targets, kOp, ": stream ", index, " of ", num_targets);
    int64_t end = 0;
    LossStream stream{index, static_cast<int64_t>(out.slices.size()), static_cast<int64_t>(slices.size()), 0, -1, -1,
                      0};
    for (const auto& [id, begin, count] : slices) {
      SX_CHECK(begin >= 0 && count >= 1 && begin <= num_columns - count, kOp, ": columns ", begin, " to ",
               begin + count, " of ", num_columns);
      SX_CHECK(begin >= end, kOp, ": the slices of stream ", index, " must ascend and not overlap; columns ", begin,
               " to ", begin + count, " come after those up to ", end);
      end = begin + count;
      out.slices.push_back({id, begin, count});
      stream.width += count;
    }
    SX_CHECK(stream.width > 0, kOp, ": the scope of stream ", index, " is empty");
    if (has_bias) stream.bias = out.num_bias++;
    if (wants_sums) {
      stream.sums_row = out.num_sums_rows++;
      stream.sums = out.num_sums;
      out.num_sums += stream.width;
    }
    out.streams.push_back(stream);
  }
  return out;
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
  args.num_bias = scopes.num_bias;
  args.num_sums = scopes.num_sums;
  args.num_sums_rows = scopes.num_sums_rows;
  return args;
}

// 0 on the CPU.
int64_t workspace_bytes(const TensorView& logits, int64_t num_targets, const std::vector<StreamTuple>& streams,
                        bool want_grad) {
  const Expect expect(kOp, "logits", logits);
  expect(logits, "logits", kFloats, {-1, -1});
  if constexpr (kHasCuda) {
    if (!expect.on_cuda()) return 0;
    const Scopes scopes = scopes_of(streams, num_targets, logits.sizes[1]);
    return with_float(logits.dtype, [&](auto value) {
      return multistream_loss_workspace(sized_args<decltype(value)>(logits, scopes, want_grad));
    });
  }
  return 0;
}

void check_rows(const int64_t* rows, int64_t num_rows, int64_t num_tokens) {
  for (int64_t r = 0; r < num_rows; ++r) {
    SX_CHECK(rows[r] >= 0 && rows[r] < num_tokens, kOp, ": rows[", r, "] is ", rows[r], "; targets has ", num_tokens,
             " rows");
  }
}

void multistream_loss_rows(const TensorView& logits, const TensorView& rows, const TensorView& targets,
                           const TensorView& live, const TensorView& coef, const std::optional<TensorView>& coef_nll,
                           const std::optional<TensorView>& bias, const std::vector<StreamTuple>& streams,
                           double z_loss, double label_smoothing, double softcap, bool want_grad,
                           const std::optional<TensorView>& token_nll, const std::optional<TensorView>& token_entropy,
                           const TensorView& stream_loss, const TensorView& stream_correct,
                           const TensorView& stream_count, const std::optional<TensorView>& column_sums, int threads,
                           const std::optional<TensorView>& workspace, uintptr_t stream) {
  const Expect expect(kOp, "logits", logits);
  expect(logits, "logits", expect.on_cuda() ? kFloats : kWideFloats, {-1, -1});
  expect(targets, "targets", {DType::kInt64}, {-1, -1});
  const int64_t R = logits.sizes[0], C = logits.sizes[1], N = targets.sizes[0], S = targets.sizes[1];
  const Scopes scopes = scopes_of(streams, S, C);
  SX_CHECK(bias.has_value() == (scopes.num_bias > 0), kOp, ": bias must be given if streams have a row of it; ",
           scopes.num_bias, " have one");
  with_float(logits.dtype, [&](auto value) {
    using T = decltype(value);
    using Acc = Accumulator<T>;
    LossRowsArgs<T> args = sized_args<T>(logits, scopes, want_grad);
    args.num_targets = S;
    args.num_tokens = N;
    args.options = {z_loss, label_smoothing, softcap};
    args.logits = logits.ptr<T>();
    args.rows = expect.ptr<int64_t>(rows, "rows", {R});
    args.targets = targets.ptr<int64_t>();
    args.live = expect.ptr<uint8_t>(live, "live", {N, S});
    args.coef = expect.ptr<Acc>(coef, "coef", {N, S});
    args.coef_nll = expect.ptr<Acc>(coef_nll, "coef_nll", {N, S});
    args.bias = expect.ptr<Acc>(bias, "bias", {scopes.num_bias, C});
    args.token_nll = expect.ptr<Acc>(token_nll, "token_nll", {N, S});
    args.token_entropy = expect.ptr<Acc>(token_entropy, "token_entropy", {N, S});
    args.stream_loss = expect.ptr<double>(stream_loss, "stream_loss", {S});
    args.stream_correct = expect.ptr<int64_t>(stream_correct, "stream_correct", {S});
    args.stream_count = expect.ptr<int64_t>(stream_count, "stream_count", {S});
    args.column_sums = expect.ptr<Acc>(column_sums, "column_sums", {scopes.num_sums_rows, C});
    if constexpr (kHasCuda) {
      if (expect.on_cuda()) {  // the kernel itself checks the rows
        SX_CHECK(workspace.has_value(), kOp, ": workspace must be given on CUDA");
        void* const space = expect.workspace(*workspace, multistream_loss_workspace(args));
        const py::gil_scoped_release no_gil;
        return multistream_loss_rows_cuda(args, space, logits.device_index, reinterpret_cast<void*>(stream));
      }
    }
    if constexpr (std::is_same_v<T, Acc>) {
      check_rows(args.rows, R, N);
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
        py::arg("stream_correct"), py::arg("stream_count"), py::arg("column_sums").none(true), py::arg("threads"),
        py::arg("workspace").none(true) = py::none(), py::arg("stream") = 0);
  m.def("multistream_loss_workspace", &workspace_bytes, py::arg("logits"), py::arg("num_targets"), py::arg("streams"),
        py::arg("want_grad"));
}

}  // namespace speechlm
