// The NPU plugin's own fused operators on the stand-in, in plain loops over
// float32: flash_attention_npu, rms_norm_npu and fused_rope, with gradients.
//
// Names, arguments and the order of results are those that PaddleNLP 3.0.0b4
// uses (transformers/llama/fusion_ops.py).  What a board's operators compute was
// never seen; here it is what their names say.  Dropout, masks and varying
// lengths of the attention are refused.
#include <algorithm>
#include <cmath>
#include <memory>
#include <cstdlib>
#include <string>
#include <vector>

#include "numbers.h"
#include "paddle/phi/api/ext/op_meta_info.h"
#include "paddle/phi/core/dense_tensor.h"
#include "paddle/phi/backends/context_pool.h"

// In npu_double_kernels.cc: counts a call.
void CountFused(const char* name);

namespace {

using paddle::Tensor;
using phi::DenseTensor;
using Floats = std::vector<float>;
using Result = std::vector<Tensor>;

Floats Read(const Tensor& tensor) {
  Floats numbers(tensor.numel());
  if (tensor.dtype() == DataType::FLOAT32)
    std::memcpy(numbers.data(), tensor.data(), numbers.size() * sizeof(float));
  else if (Narrow(tensor.dtype()))
    ToFloat(tensor.dtype(), tensor.data(), numbers.data(), numbers.size());
  else
    PD_THROW("npu double: a fused operator of another type");
  return numbers;
}

bool Wrong() {
  static const char* asked = std::getenv("NPU_DOUBLE_FUSED");
  return asked != nullptr && std::string(asked) == "0";
}

// A tensor of the shape of `like`, unless another is given, on its device.
Tensor Write(const Floats& numbers, const Tensor& like, DataType dtype,
             std::vector<int64_t> shape = {}) {
  if (shape.empty()) shape = like.shape();
  auto made = std::make_shared<DenseTensor>();
  made->Resize(common::make_ddim(shape));
  auto* device = phi::DeviceContextPool::Instance().Get(like.place());
  void* to = device->Alloc(made.get(), dtype);
  if (Wrong())
    std::memset(to, 0, numbers.size() * phi::SizeOf(dtype));
  else if (dtype == DataType::FLOAT32)
    std::memcpy(to, numbers.data(), numbers.size() * sizeof(float));
  else
    FromFloat(dtype, numbers.data(), to, numbers.size());
  return Tensor(made);
}
Tensor Write(const Floats& numbers, const Tensor& like) {
  return Write(numbers, like, like.dtype());
}

Result RmsNorm(const Tensor& x, const Tensor& weight, float epsilon) {
  CountFused("rms_norm_npu");
  const Floats in = Read(x), w = Read(weight);
  const size_t width = w.size(), rows = in.size() / width;
  Floats out(in.size()), scales(rows);
  for (size_t r = 0; r < rows; ++r) {
    double sum = 0;
    for (size_t i = 0; i < width; ++i) sum += double(in[r * width + i]) * in[r * width + i];
    scales[r] = 1 / std::sqrt(sum / width + epsilon);
    for (size_t i = 0; i < width; ++i) out[r * width + i] = in[r * width + i] * scales[r] * w[i];
  }
  auto shape = x.shape();
  shape.back() = 1;
  return {Write(out, x), Write(scales, x, DataType::FLOAT32, shape)};
}

Result RmsNormGrad(const Tensor& x, const Tensor& weight, const Tensor& kept, const Tensor& grad) {
  CountFused("rms_norm_npu_grad");
  const Floats in = Read(x), w = Read(weight), scales = Read(kept), g = Read(grad);
  const size_t width = w.size(), rows = in.size() / width;
  Floats x_grad(in.size()), w_grad(width, 0);
  for (size_t r = 0; r < rows; ++r) {
    double mean = 0;
    for (size_t i = r * width, k = 0; k < width; ++i, ++k) {
      mean += double(g[i]) * w[k] * in[i] * scales[r] / width;
      w_grad[k] += g[i] * in[i] * scales[r];
    }
    for (size_t i = r * width, k = 0; k < width; ++i, ++k)
      x_grad[i] = (g[i] * w[k] - in[i] * scales[r] * mean) * scales[r];
  }
  return {Write(x_grad, x), Write(w_grad, weight)};
}

// [B, L, H, E] by tables [1, L, 1, E]; `back` turns a gradient.
Floats Turn(const Tensor& x, const Tensor& cosines, const Tensor& sines, bool back) {
  const Floats in = Read(x), c = Read(cosines), s = Read(sines);
  const auto shape = x.shape();
  const size_t length = shape[1], heads = shape[2], width = shape[3], half = width / 2;
  if (c.size() != length * width || s.size() != c.size())
    PD_THROW("npu double: fused_rope wants tables [1, L, 1, E]");
  Floats out(in.size());
  for (size_t row = 0; row < in.size() / width; ++row) {
    const float* from = in.data() + row * width;
    const size_t at = row / heads % length * width;
    for (size_t i = 0; i < width; ++i) {
      const size_t other = i < half ? i + half : i - half;
      // forward: the first half takes the second one's negative
      const float sign = (i < half) != back ? -1 : 1;
      out[row * width + i] = from[i] * c[at + i] + sign * from[other] * s[at + (back ? other : i)];
    }
  }
  return out;
}
Result Rope(const Tensor& x, const Tensor& cosines, const Tensor& sines) {
  CountFused("fused_rope");
  return {Write(Turn(x, cosines, sines, false), x)};
}
Result RopeGrad(const Tensor& cosines, const Tensor& sines, const Tensor& grad) {
  CountFused("fused_rope_grad");
  return {Write(Turn(grad, cosines, sines, true), grad)};
}

// Attention of one query head; rows of queries are `step` apart, those of keys and values `key_step`.
struct Head {
  size_t length, key_length, width, step, key_step, at, key_at;
  bool causal;
  float scale;

  size_t Seen(size_t row) const { return causal ? key_length - length + row + 1 : key_length; }
  // Weights of a query's keys.
  Floats Weights(const Floats& q, const Floats& k, size_t row) const {
    Floats weights(Seen(row));
    float most = -INFINITY;
    for (size_t j = 0; j < weights.size(); ++j) {
      weights[j] = scale * Dot(q, at + row * step, k, key_at + j * key_step);
      most = std::max(most, weights[j]);
    }
    float sum = 0;
    for (float& weight : weights) sum += weight = std::exp(weight - most);
    for (float& weight : weights) weight /= sum;
    return weights;
  }
  float Dot(const Floats& a, size_t i, const Floats& b, size_t j) const {
    float sum = 0;
    for (size_t n = 0; n < width; ++n) sum += a[i + n] * b[j + n];
    return sum;
  }
  void Add(Floats* to, size_t i, float factor, const Floats& from, size_t j) const {
    for (size_t n = 0; n < width; ++n) (*to)[i + n] += factor * from[j + n];
  }
};

std::vector<Head> Heads(const Tensor& queries, const Tensor& keys, bool causal) {
  const auto q = queries.shape(), k = keys.shape();
  const size_t heads = q[2], key_heads = k[2], width = q[3];
  std::vector<Head> found;
  for (int64_t b = 0; b < q[0]; ++b)
    for (size_t h = 0; h < heads; ++h) {
      const size_t kept = h / (heads / key_heads);
      found.push_back({size_t(q[1]), size_t(k[1]), width, heads * width, key_heads * width,
                       (b * q[1] * heads + h) * width, (b * k[1] * key_heads + kept) * width,
                       causal, 1 / std::sqrt(float(width))});
    }
  return found;
}

Result Attend(const Tensor& queries, const Tensor& keys, const Tensor& values,
              const paddle::optional<Tensor>& seed, const paddle::optional<Tensor>& mask,
              const paddle::optional<Tensor>& lengths, const paddle::optional<Tensor>& key_lengths,
              float dropout, bool causal, bool, bool, bool, bool varying) {
  if (seed || mask || lengths || key_lengths || dropout != 0 || varying)
    PD_THROW("npu double: flash_attention_npu without masks, dropout and lengths only");
  CountFused("flash_attention_npu");
  const Floats q = Read(queries), k = Read(keys), v = Read(values);
  Floats out(q.size(), 0);
  for (const Head& head : Heads(queries, keys, causal))
    for (size_t row = 0; row < head.length; ++row) {
      const Floats weights = head.Weights(q, k, row);
      for (size_t j = 0; j < weights.size(); ++j)
        head.Add(&out, head.at + row * head.step, weights[j], v, head.key_at + j * head.key_step);
    }
  return {Write(out, queries)};
}

Result AttendGrad(const Tensor& queries, const Tensor& keys, const Tensor& values, const Tensor& output,
                  const Tensor& grad, float, bool causal, bool, bool, bool, bool) {
  CountFused("flash_attention_npu_grad");
  const Floats q = Read(queries), k = Read(keys), v = Read(values), out = Read(output), g = Read(grad);
  Floats q_grad(q.size(), 0), k_grad(k.size(), 0), v_grad(v.size(), 0);
  for (const Head& head : Heads(queries, keys, causal))
    for (size_t row = 0; row < head.length; ++row) {
      const size_t at = head.at + row * head.step;
      const Floats weights = head.Weights(q, k, row);
      const float mean = head.Dot(g, at, out, at);
      for (size_t j = 0; j < weights.size(); ++j) {
        const size_t key = head.key_at + j * head.key_step;
        const float slope = weights[j] * (head.Dot(g, at, v, key) - mean) * head.scale;
        head.Add(&q_grad, at, slope, k, key);
        head.Add(&k_grad, key, slope, q, at);
        head.Add(&v_grad, key, weights[j], g, at);
      }
    }
  return {Write(q_grad, queries), Write(k_grad, keys), Write(v_grad, values)};
}

}  // namespace

#define ATTENTION_OPTIONS                                                        \
  {"dropout: float", "causal: bool", "return_softmax: bool", "is_test: bool", \
   "is_triangle_upper_mask: bool", "is_varlen: bool"}

PD_BUILD_OP(rms_norm_npu)
    .Inputs({"x", "weight"})
    .Outputs({"out", "scales"})
    .Attrs({"epsilon: float"})
    .SetKernelFn(PD_KERNEL(RmsNorm));
PD_BUILD_GRAD_OP(rms_norm_npu)
    .Inputs({"x", "weight", "scales", paddle::Grad("out")})
    .Outputs({paddle::Grad("x"), paddle::Grad("weight")})
    .SetKernelFn(PD_KERNEL(RmsNormGrad));

PD_BUILD_OP(fused_rope)
    .Inputs({"x", "cos", "sin"})
    .Outputs({"out"})
    .SetKernelFn(PD_KERNEL(Rope));
PD_BUILD_GRAD_OP(fused_rope)
    .Inputs({"cos", "sin", paddle::Grad("out")})
    .Outputs({paddle::Grad("x")})
    .SetKernelFn(PD_KERNEL(RopeGrad));

PD_BUILD_OP(flash_attention_npu)
    .Inputs({"q", "k", "v", paddle::Optional("seed"), paddle::Optional("mask"),
             paddle::Optional("lengths"), paddle::Optional("key_lengths")})
    .Outputs({"out"})
    .Attrs(ATTENTION_OPTIONS)
    .SetKernelFn(PD_KERNEL(Attend));
PD_BUILD_GRAD_OP(flash_attention_npu)
    .Inputs({"q", "k", "v", "out", paddle::Grad("out")})
    .Outputs({paddle::Grad("q"), paddle::Grad("k"), paddle::Grad("v")})
    .Attrs(ATTENTION_OPTIONS)
    .SetKernelFn(PD_KERNEL(AttendGrad));
