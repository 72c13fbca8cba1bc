// Python's door to multistream_loss: checks of every tensor, then the row kernel. No arithmetic here.
#include <optional>

#include "bind.h"
#include "common/tensor_caster.h"
#include "multistream_loss/multistream_loss.h"

namespace speechlm {
namespace {

namespace py = pybind11;

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
    LossStream stream{index, static_cast<int64_t>(out.slices.size()), static_cast<int64_t>(slices.size()), 0, -1};
    for (const auto& [id, begin, count] : slices) {
      SX_CHECK(begin >= 0 && count >= 1 && begin <= num_columns - count, "multistream_loss: columns ", begin, " to ",
               begin + count, " of ", num_columns);
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

template <typename T>
void run(const TensorView& logits, const TensorView& rows, const TensorView& targets, const TensorView& live,
         const TensorView& coef, const std::optional<TensorView>& coef_nll, const std::optional<TensorView>& bias,
         const Scopes& scopes, const LossOptions& options, bool want_grad, const std::optional<TensorView>& token_nll,
         const std::optional<TensorView>& token_entropy, const TensorView& stream_loss,
         const TensorView& stream_correct, const std::optional<TensorView>& column_sums, int threads) {
  LossRowsArgs<T> args;
  args.num_rows = logits.sizes[0];
  args.num_columns = logits.sizes[1];
  args.num_targets = targets.sizes[1];
  args.num_streams = static_cast<int64_t>(scopes.streams.size());
  args.options = options;
  args.want_grad = want_grad;
  args.streams = scopes.streams.data();
  args.slices = scopes.slices.data();
  args.logits = logits.ptr<T>();
  args.rows = rows.ptr<int64_t>();
  args.targets = targets.ptr<int64_t>();
  args.live = live.ptr<uint8_t>();
  args.coef = coef.ptr<T>();
  args.coef_nll = coef_nll ? coef_nll->ptr<T>() : nullptr;
  args.bias = bias ? bias->ptr<T>() : nullptr;
  args.token_nll = token_nll ? token_nll->ptr<T>() : nullptr;
  args.token_entropy = token_entropy ? token_entropy->ptr<T>() : nullptr;
  args.stream_loss = stream_loss.ptr<double>();
  args.stream_correct = stream_correct.ptr<int64_t>();
  args.num_sums = scopes.num_sums;
  args.column_sums = column_sums ? column_sums->ptr<T>() : nullptr;
  const py::gil_scoped_release no_gil;
  multistream_loss_rows_cpu(args, threads);
}

void multistream_loss_rows(const TensorView& logits, const TensorView& rows, const TensorView& targets,
                           const TensorView& live, const TensorView& coef, const std::optional<TensorView>& coef_nll,
                           const std::optional<TensorView>& bias, const std::vector<StreamTuple>& streams,
                           double z_loss, double label_smoothing, double softcap, bool want_grad,
                           const std::optional<TensorView>& token_nll, const std::optional<TensorView>& token_entropy,
                           const TensorView& stream_loss, const TensorView& stream_correct,
                           const std::optional<TensorView>& column_sums, int threads) {
  constexpr Device on = Device::kCpu;
  logits.expect("multistream_loss: logits", {DType::kFloat32, DType::kFloat64}, on, {-1, -1});
  const DType dtype = logits.dtype;
  rows.expect("multistream_loss: rows", {DType::kInt64}, on, {logits.sizes[0]});
  targets.expect("multistream_loss: targets", {DType::kInt64}, on, {-1, -1});
  const int64_t N = targets.sizes[0], S = targets.sizes[1];
  live.expect("multistream_loss: live", {DType::kBool}, on, {N, S});
  coef.expect("multistream_loss: coef", {dtype}, on, {N, S});
  if (coef_nll) coef_nll->expect("multistream_loss: coef_nll", {dtype}, on, {N, S});
  if (token_nll) token_nll->expect("multistream_loss: token_nll", {dtype}, on, {N, S});
  const int64_t* first = rows.ptr<int64_t>();
  for (int64_t r = 0; r < rows.sizes[0]; ++r) {
    SX_CHECK(first[r] >= 0 && first[r] < N, "multistream_loss: rows[", r, "] is ", first[r], "; targets has ", N,
             " rows");
  }
  const Scopes scopes = scopes_of(streams, S, logits.sizes[1]);
  const int64_t k = static_cast<int64_t>(scopes.streams.size());
  if (bias) bias->expect("multistream_loss: bias", {dtype}, on, {k, logits.sizes[1]});
  if (token_entropy) token_entropy->expect("multistream_loss: token_entropy", {dtype}, on, {N, S});
  stream_loss.expect("multistream_loss: stream_loss", {DType::kFloat64}, on, {k});
  stream_correct.expect("multistream_loss: stream_correct", {DType::kInt64}, on, {k});
  if (column_sums) column_sums->expect("multistream_loss: column_sums", {dtype}, on, {scopes.num_sums});
  const LossOptions options{z_loss, label_smoothing, softcap};
  auto call = dtype == DType::kFloat32 ? &run<float> : &run<double>;
  call(logits, rows, targets, live, coef, coef_nll, bias, scopes, options, want_grad, token_nll, token_entropy,
       stream_loss, stream_correct, column_sums, threads);
}

}  // namespace

void bind_multistream_loss(py::module_& m) {
  m.def("multistream_loss_rows", &multistream_loss_rows, py::arg("logits"), py::arg("rows"), py::arg("targets"),
        py::arg("live"), py::arg("coef"), py::arg("coef_nll").none(true), py::arg("bias").none(true),
        py::arg("streams"), py::arg("z_loss"), py::arg("label_smoothing"), py::arg("softcap"), py::arg("want_grad"),
        py::arg("token_nll").none(true), py::arg("token_entropy").none(true), py::arg("stream_loss"),
        py::arg("stream_correct"), py::arg("column_sums").none(true), py::arg("threads"));
}

}  // namespace speechlm
