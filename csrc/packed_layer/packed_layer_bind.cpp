// Python bindings of a packed layer's parts: check every tensor, then run the kernel.
#include "common/bind.h"
#include "common/tensor/arguments.h"
#include "common/tensor/tensor_caster.h"
#include "packed_layer/packed_layer.h"

namespace speechlm {
namespace {

namespace py = pybind11;

PackedNorm norm_args(const Expect& expect, const TensorView& x, const TensorView& weight, const TensorView& inverse) {
  PackedNorm args;
  args.x = expect.ptr<float>(x, "x", {-1, -1});
  args.num_rows = x.sizes[0];
  args.width = x.sizes[1];
  args.weight = expect.ptr<float>(weight, "weight", {args.width});
  args.inverse = expect.ptr<float>(inverse, "inverse", {args.num_rows});
  return args;
}

void rms_norm(const TensorView& x, const TensorView& weight, double eps, const TensorView& out,
              const TensorView& inverse, int threads) {
  const Expect expect("packed_rms_norm", Device::kCpu);
  PackedNorm args = norm_args(expect, x, weight, inverse);
  args.eps = static_cast<float>(eps);
  args.out = expect.ptr<float>(out, "out", {args.num_rows, args.width});
  const py::gil_scoped_release no_gil;
  packed_rms_norm_cpu(args, threads);
}

void rms_norm_backward(const TensorView& grad, const TensorView& x, const TensorView& weight, const TensorView& inverse,
                       const TensorView& grad_x, const TensorView& grad_weight, int threads) {
  const Expect expect("packed_rms_norm", Device::kCpu);
  PackedNorm args = norm_args(expect, x, weight, inverse);
  args.grad = expect.ptr<float>(grad, "grad", {args.num_rows, args.width});
  args.grad_x = expect.ptr<float>(grad_x, "grad_x", {args.num_rows, args.width});
  args.grad_weight = expect.ptr<float>(grad_weight, "grad_weight", {args.width});
  const py::gil_scoped_release no_gil;
  packed_rms_norm_backward_cpu(args, threads);
}

void rotary(const TensorView& x, const TensorView& cos, const TensorView& sin, bool is_backward, const TensorView& out,
            int threads) {
  const Expect expect("packed_rotary", Device::kCpu);
  PackedRotary args;
  args.x = expect.ptr<float>(x, "x", {-1, -1, -1});
  args.num_rows = x.sizes[0];
  args.num_heads = x.sizes[1];
  args.head_size = x.sizes[2];
  SX_CHECK(args.head_size % 2 == 0, "packed_rotary: heads must have an even size; got ", x.describe());
  args.cos = expect.ptr<float>(cos, "cos", {args.num_rows, args.head_size});
  args.sin = expect.ptr<float>(sin, "sin", {args.num_rows, args.head_size});
  args.out = expect.ptr<float>(out, "out", {args.num_rows, args.num_heads, args.head_size});
  args.is_backward = is_backward;
  const py::gil_scoped_release no_gil;
  packed_rotary_cpu(args, threads);
}

void swiglu(const TensorView& gate, const TensorView& up, const TensorView& out, int threads) {
  const Expect expect("packed_swiglu", Device::kCpu);
  PackedGate args;
  args.gate = expect.ptr<float>(gate, "gate", {-1, -1});
  args.up = expect.ptr<float>(up, "up", {gate.sizes[0], gate.sizes[1]});
  args.out = expect.ptr<float>(out, "out", {gate.sizes[0], gate.sizes[1]});
  args.num_values = gate.numel();
  const py::gil_scoped_release no_gil;
  packed_swiglu_cpu(args, threads);
}

void swiglu_backward(const TensorView& grad, const TensorView& gate, const TensorView& up, const TensorView& grad_gate,
                     const TensorView& grad_up, int threads) {
  const Expect expect("packed_swiglu", Device::kCpu);
  PackedGate args;
  args.gate = expect.ptr<float>(gate, "gate", {-1, -1});
  const int64_t N = gate.sizes[0], I = gate.sizes[1];
  args.up = expect.ptr<float>(up, "up", {N, I});
  args.grad = expect.ptr<float>(grad, "grad", {N, I});
  args.grad_gate = expect.ptr<float>(grad_gate, "grad_gate", {N, I});
  args.grad_up = expect.ptr<float>(grad_up, "grad_up", {N, I});
  args.num_values = gate.numel();
  const py::gil_scoped_release no_gil;
  packed_swiglu_cpu(args, threads);
}

constexpr const char* kAttention = "packed_attention";

PackedAttention attention_args(const Expect& expect, const TensorView& q, const TensorView& k, const TensorView& v,
                               const TensorView& cu_seqlens, double scale, int64_t window, const TensorView& out,
                               const TensorView& logsumexp) {
  PackedAttention args;
  args.q = expect.ptr<float>(q, "q", {-1, -1, -1});
  args.num_rows = q.sizes[0];
  args.num_heads = q.sizes[1];
  args.head_size = q.sizes[2];
  const int64_t N = args.num_rows, H = args.num_heads, E = args.head_size;
  args.k = expect.ptr<float>(k, "k", {N, -1, E});
  args.num_kv_heads = k.sizes[1];
  args.v = expect.ptr<float>(v, "v", {N, args.num_kv_heads, E});
  SX_CHECK(args.num_kv_heads > 0 && H % args.num_kv_heads == 0, kAttention,
           ": the heads of q must be a multiple of those of k; got ", q.describe(), " and ", k.describe());
  SX_CHECK(E > 0 && E % kAttentionLanes == 0, kAttention, ": heads must have a size that is a multiple of ",
           kAttentionLanes, "; got ", q.describe());
  SX_CHECK(window >= 0, kAttention, ": window must be 0 (none) or more; got ", window);
  args.bounds = expect.ptr<int32_t>(cu_seqlens, "cu_seqlens", {-1});
  SX_CHECK(cu_seqlens.sizes[0] > 0, kAttention, ": cu_seqlens must have at least one value");
  args.num_sequences = cu_seqlens.sizes[0] - 1;
  bool is_ordered = args.bounds[0] == 0 && args.bounds[args.num_sequences] == N;
  for (int64_t s = 0; s < args.num_sequences; ++s) is_ordered = is_ordered && args.bounds[s] <= args.bounds[s + 1];
  SX_CHECK(is_ordered, kAttention, ": cu_seqlens must rise from 0 to the number of rows, ", N);
  args.scale = static_cast<float>(scale);
  args.window = window;
  args.out = expect.ptr<float>(out, "out", {N, H, E});
  args.logsumexp = expect.ptr<float>(logsumexp, "logsumexp", {N, H});
  return args;
}

void attention(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& cu_seqlens,
               double scale, int64_t window, const TensorView& out, const TensorView& logsumexp, int threads) {
  const Expect expect(kAttention, Device::kCpu);
  const PackedAttention args = attention_args(expect, q, k, v, cu_seqlens, scale, window, out, logsumexp);
  const py::gil_scoped_release no_gil;
  packed_attention_cpu(args, threads);
}

void attention_backward(const TensorView& grad, const TensorView& q, const TensorView& k, const TensorView& v,
                        const TensorView& cu_seqlens, double scale, int64_t window, const TensorView& out,
                        const TensorView& logsumexp, const TensorView& grad_q, const TensorView& grad_k,
                        const TensorView& grad_v, int threads) {
  const Expect expect(kAttention, Device::kCpu);
  PackedAttention args = attention_args(expect, q, k, v, cu_seqlens, scale, window, out, logsumexp);
  const int64_t N = args.num_rows, G = args.num_kv_heads, E = args.head_size;
  args.grad = expect.ptr<float>(grad, "grad", {N, args.num_heads, E});
  args.grad_q = expect.ptr<float>(grad_q, "grad_q", {N, args.num_heads, E});
  args.grad_k = expect.ptr<float>(grad_k, "grad_k", {N, G, E});
  args.grad_v = expect.ptr<float>(grad_v, "grad_v", {N, G, E});
  const py::gil_scoped_release no_gil;
  packed_attention_backward_cpu(args, threads);
}

}  // namespace

void bind_packed_layer(py::module_& m) {
  m.def("packed_rms_norm", &rms_norm);
  m.def("packed_rms_norm_backward", &rms_norm_backward);
  m.def("packed_rotary", &rotary);
  m.def("packed_swiglu", &swiglu);
  m.def("packed_swiglu_backward", &swiglu_backward);
  m.def("packed_attention", &attention);
  m.def("packed_attention_backward", &attention_backward);
}

}  // namespace speechlm
