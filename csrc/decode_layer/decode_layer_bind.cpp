// Python bindings of a decode layer's ops: check every tensor, then run the kernel of the tensors' device.
#include <algorithm>

#include "common/bind.h"
#include "common/tensor/arguments.h"
#include "common/tensor/tensor_caster.h"
#include "decode_layer/decode_layer.h"

namespace speechlm {
namespace {

namespace py = pybind11;

using Optional = std::optional<TensorView>;

// The same tensor for the checks of contiguous ones, once it is known that all dimensions from `inner` on are.
TensorView without_strides(const char* op, const char* name, TensorView view, int64_t inner) {
  int64_t expected = 1;
  for (int64_t d = view.rank() - 1; d >= 0; --d) {
    const bool is_free = d < inner || view.sizes[d] == 1 || view.numel() == 0;
    SX_CHECK(is_free || view.strides[d] == expected, op, ": ", name, " must be contiguous in dimensions ", inner,
             " and later; got ", view.describe(), " with other strides");
    view.strides[d] = expected;
    expected *= view.sizes[d];
  }
  return view;
}

void decode_linear(const TensorView& x, const TensorView& weight, const Optional& bias, const TensorView& out,
                   int threads) {
  constexpr const char* kOp = "decode_linear";
  const Expect expect(kOp, Device::kCpu);
  expect(x, "x", kFloats, {-1, -1});
  const int64_t M = x.sizes[0], K = x.sizes[1];
  expect(without_strides(kOp, "weight", weight, 1), "weight", {x.dtype}, {-1, K});
  const int64_t N = weight.sizes[0];
  if (bias) expect(*bias, "bias", {x.dtype}, {N});
  expect(out, "out", {x.dtype}, {M, N});
  with_float(x.dtype, [&](auto value) {
    using T = decltype(value);
    LinearArgs<T> args;
    args.num_rows = M;
    args.width = K;
    args.num_outputs = N;
    args.weight_stride = weight.strides[0];
    args.x = x.ptr<T>();
    args.weight = weight.ptr<T>();
    args.bias = bias ? bias->ptr<T>() : nullptr;
    args.out = out.ptr<T>();
    const py::gil_scoped_release no_gil;
    decode_linear_cpu(args, threads);
  });
}

void add_rms_norm(const TensorView& x, const Optional& residual, const TensorView& weight, double eps, bool rounds_last,
                  const TensorView& normed, const Optional& summed, int threads, uintptr_t stream) {
  constexpr const char* kOp = "add_rms_norm";
  const Expect expect(kOp, "x", x);
  expect(x, "x", kFloats, {-1, -1});
  const int64_t M = x.sizes[0], D = x.sizes[1];
  expect(weight, "weight", {x.dtype}, {D});
  expect(normed, "normed", {x.dtype}, {M, D});
  if (residual) {
    expect(*residual, "residual", {x.dtype}, {M, D});
    SX_CHECK(summed.has_value(), kOp, ": a residual needs summed");
    expect(*summed, "summed", {x.dtype}, {M, D});
  }
  with_float(x.dtype, [&](auto value) {
    using T = decltype(value);
    NormArgs<T> args;
    args.num_rows = M;
    args.width = D;
    args.eps = eps;
    args.rounds_last = rounds_last;
    args.x = x.ptr<T>();
    args.residual = residual ? residual->ptr<T>() : nullptr;
    args.weight = weight.ptr<T>();
    args.normed = normed.ptr<T>();
    args.summed = residual ? summed->ptr<T>() : nullptr;
    const py::gil_scoped_release no_gil;
    if (!expect.on_cuda()) {
      add_rms_norm_cpu(args, threads);
    } else if constexpr (kHasCuda) {
      add_rms_norm_cuda(args, x.device_index, reinterpret_cast<void*>(stream));
    }
  });
}

// Checks keys [B, R, G, E] and values [B, R, G, F], whose slots and rows may have any stride.
template <typename T>
CacheView<T> cache_view(const char* op, const Expect& expect, const TensorView& keys, const TensorView& values,
                        DType dtype) {
  expect(without_strides(op, "keys", keys, 2), "keys", {dtype}, {-1, -1, -1, -1});
  const int64_t B = keys.sizes[0], R = keys.sizes[1], G = keys.sizes[2];
  expect(without_strides(op, "values", values, 2), "values", {dtype}, {B, R, G, -1});
  CacheView<T> cache;
  cache.num_slots = B;
  cache.num_rows = R;
  cache.num_heads = G;
  cache.key_size = keys.sizes[3];
  cache.value_size = values.sizes[3];
  cache.key_slot_stride = keys.strides[0];
  cache.key_row_stride = keys.strides[1];
  cache.value_slot_stride = values.strides[0];
  cache.value_row_stride = values.strides[1];
  cache.keys = keys.ptr<T>();
  cache.values = values.ptr<T>();
  return cache;
}

void rope_and_store(const TensorView& qkv, const Optional& cos, const Optional& sin, const TensorView& position,
                    const TensorView& slot, const TensorView& keys, const TensorView& values, int64_t num_heads,
                    const Optional& q_norm, const Optional& k_norm, double norm_eps, bool norm_over_all,
                    const TensorView& query, int threads, uintptr_t stream) {
  constexpr const char* kOp = "rope_and_store";
  const Expect expect(kOp, "qkv", qkv);
  expect(qkv, "qkv", kFloats, {-1, -1});
  const int64_t M = qkv.sizes[0];
  SX_CHECK(num_heads >= 0, kOp, ": num_heads must be 0 or more; got ", num_heads);
  SX_CHECK(cos.has_value() == sin.has_value(), kOp, ": cos and sin must be given both or not at all");
  with_float(qkv.dtype, [&](auto value) {
    using T = decltype(value);
    const auto run = [&](auto table) {
      using C = decltype(table);
      RotaryArgs<T, C> args;
      args.cache = cache_view<T>(kOp, expect, keys, values, qkv.dtype);
      const int64_t E = args.cache.key_size, G = args.cache.num_heads;
      args.num_rows = M;
      args.num_heads = num_heads;
      args.num_positions = args.cache.num_rows;
      args.eps = norm_eps;
      args.norm_over_all = norm_over_all;
      expect(qkv, "qkv", {qkv.dtype}, {M, args.qkv_width()});
      if (cos) {
        SX_CHECK(E % 2 == 0, kOp, ": a rotation needs an even head size; keys are ", keys.describe());
        args.cos = expect.ptr<C>(*cos, "cos", {-1, E});
        args.num_positions = cos->sizes[0];
        args.sin = expect.ptr<C>(*sin, "sin", {args.num_positions, E});
      }
      args.qkv = qkv.ptr<T>();
      args.position = expect.ptr<int64_t>(position, "position", {M});
      args.slot = expect.ptr<int64_t>(slot, "slot", {M});
      args.q_norm = expect.ptr<T>(q_norm, "q_norm", {norm_over_all ? num_heads * E : E});
      args.k_norm = expect.ptr<T>(k_norm, "k_norm", {norm_over_all ? G * E : E});
      args.query = expect.ptr<T>(query, "query", {M, num_heads, E});
      const py::gil_scoped_release no_gil;
      if (!expect.on_cuda()) {
        rope_and_store_cpu(args, threads);
      } else if constexpr (kHasCuda) {
        rope_and_store_cuda(args, qkv.device_index, reinterpret_cast<void*>(stream));
      }
    };
    if constexpr (sizeof(T) == 2) {
      if (cos && cos->dtype == DType::kFloat32) return run(float{});
    }
    run(T{});
  });
}

int64_t attention_partials(const TensorView& query, const TensorView& keys, const TensorView& values,
                           std::optional<int64_t> window) {
  SX_CHECK(query.rank() == 3 && keys.rank() == 4 && values.rank() == 4,
           "decode_attention: query must have 3 dimensions, keys and values 4; got ", query.describe(), ", ",
           keys.describe(), ", ", values.describe());
  return decode_attention_partials(query.sizes[0], query.sizes[1], cuda_splits(keys.sizes[1], window.value_or(0)),
                                   values.sizes[3]);
}

void decode_attention(const TensorView& query, const TensorView& keys, const TensorView& values,
                      const TensorView& lengths, const TensorView& slot, double scale, std::optional<int64_t> window,
                      std::optional<double> softcap, const Optional& sinks, const TensorView& out,
                      const Optional& partials, int threads, uintptr_t stream) {
  constexpr const char* kOp = "decode_attention";
  const Expect expect(kOp, "query", query);
  expect(query, "query", kFloats, {-1, -1, -1});
  const int64_t M = query.sizes[0], H = query.sizes[1];
  SX_CHECK(!window || *window >= 1, kOp, ": window must be 1 or more, or None; got ", *window);
  SX_CHECK(!softcap || *softcap > 0, kOp, ": softcap must be above 0, or None; got ", *softcap);
  with_float(query.dtype, [&](auto value) {
    using T = decltype(value);
    using Acc = Accumulator<T>;
    AttentionArgs<T> args;
    args.cache = cache_view<const T>(kOp, expect, keys, values, query.dtype);
    const int64_t G = args.cache.num_heads, F = args.cache.value_size;
    SX_CHECK(G > 0 ? H % G == 0 : H == 0, kOp, ": query must have a multiple of ", G, " heads, which keys has; got ",
             query.describe());
    expect(query, "query", {query.dtype}, {M, H, args.cache.key_size});
    args.num_rows = M;
    args.num_heads = H;
    args.scale = scale;
    args.window = window.value_or(0);
    args.softcap = softcap.value_or(0);
    args.query = query.ptr<T>();
    args.lengths = expect.ptr<int64_t>(lengths, "lengths", {M});
    args.slot = expect.ptr<int64_t>(slot, "slot", {M});
    args.sinks = expect.ptr<Acc>(sinks, "sinks", {H});
    expect(out, "out", {query.dtype}, {M, H * F});
    args.out = out.ptr<T>();
    Acc* space = nullptr;
    if (expect.on_cuda()) {
      SX_CHECK(partials.has_value(), kOp, ": partials must be given on CUDA");
      space = expect.ptr<Acc>(*partials, "partials", {attention_partials(query, keys, values, window)});
    }
    const py::gil_scoped_release no_gil;
    if (!expect.on_cuda()) {
      decode_attention_cpu(args, threads);
    } else if constexpr (kHasCuda) {
      decode_attention_cuda(args, space, query.device_index, reinterpret_cast<void*>(stream));
    }
  });
}

void silu_mul(const TensorView& gate_up, const TensorView& out, int threads, uintptr_t stream) {
  constexpr const char* kOp = "silu_mul";
  const Expect expect(kOp, "gate_up", gate_up);
  expect(gate_up, "gate_up", kFloats, {-1, -1});
  const int64_t M = gate_up.sizes[0], width = gate_up.sizes[1];
  SX_CHECK(width % 2 == 0, kOp, ": gate_up must have an even number of columns; got ", gate_up.describe());
  expect(out, "out", {gate_up.dtype}, {M, width / 2});
  with_float(gate_up.dtype, [&](auto value) {
    using T = decltype(value);
    GateArgs<T> args;
    args.num_rows = M;
    args.width = width / 2;
    args.gate_up = gate_up.ptr<T>();
    args.out = out.ptr<T>();
    const py::gil_scoped_release no_gil;
    if (!expect.on_cuda()) {
      silu_mul_cpu(args, threads);
    } else if constexpr (kHasCuda) {
      silu_mul_cuda(args, gate_up.device_index, reinterpret_cast<void*>(stream));
    }
  });
}

}  // namespace

void bind_decode_layer(py::module_& m) {
  m.def("decode_linear", &decode_linear, py::arg("x"), py::arg("weight"), py::arg("bias").none(true), py::arg("out"),
        py::arg("threads"));
  m.def("add_rms_norm", &add_rms_norm, py::arg("x"), py::arg("residual").none(true), py::arg("weight"), py::arg("eps"),
        py::arg("rounds_last"), py::arg("normed"), py::arg("summed").none(true), py::arg("threads"), py::arg("stream"));
  m.def("rope_and_store", &rope_and_store, py::arg("qkv"), py::arg("cos").none(true), py::arg("sin").none(true),
        py::arg("position"), py::arg("slot"), py::arg("keys"), py::arg("values"), py::arg("num_heads"),
        py::arg("q_norm").none(true), py::arg("k_norm").none(true), py::arg("norm_eps"), py::arg("norm_over_all"),
        py::arg("query"), py::arg("threads"), py::arg("stream"));
  m.def("decode_attention_partials", &attention_partials, py::arg("query"), py::arg("keys"), py::arg("values"),
        py::arg("window").none(true));
  m.def("decode_attention", &decode_attention, py::arg("query"), py::arg("keys"), py::arg("values"), py::arg("lengths"),
        py::arg("slot"), py::arg("scale"), py::arg("window").none(true), py::arg("softcap").none(true),
        py::arg("sinks").none(true), py::arg("out"), py::arg("partials").none(true), py::arg("threads"),
        py::arg("stream"));
  m.def("silu_mul", &silu_mul, py::arg("gate_up"), py::arg("out"), py::arg("threads"), py::arg("stream"));
}

}  // namespace speechlm
