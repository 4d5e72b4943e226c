// CUDA binding of lowrank_linear: checks tensors, hands pointers to the launcher on torch's current stream.
#include "cuda/lowrank_linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/binding.h"
#include "tensor_check.h"

namespace rmtkernels {
namespace {

// Sizes of one call.
struct Shape {
  int64_t rows, d_in, k, d_out;
};

ElementType element_type(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  if (type == ScalarType::Float) return ElementType::kFloat32;
  if (type == ScalarType::BFloat16) return ElementType::kBFloat16;
  STD_TORCH_CHECK(type == ScalarType::Half, "lowrank_linear: ", name, " must be float32, bfloat16 or float16");
  return ElementType::kFloat16;
}

Shape check_shapes(const Tensor& x, const Tensor& down, const Tensor& up, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.dim() >= 1 && down.dim() == 2 && up.dim() == 2,
                  "lowrank_linear: x must be (..., d_in), down (k, d_in), up (d_out, k)");
  const int64_t d_in = x.size(-1), k = down.size(0), d_out = up.size(0);
  STD_TORCH_CHECK(down.size(1) == d_in && up.size(1) == k, "lowrank_linear: down must be (k, ", d_in,
                  ") and up (d_out, k), got k = ", k);
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == d_out), "lowrank_linear: bias must be (", d_out, ",)");
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return {rows, d_in, k, d_out};
}

void check_types(ElementType type, ElementType weight_type, const Tensor& up, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK((type == ElementType::kFloat16) == (weight_type == ElementType::kFloat16),
                  "lowrank_linear: float16 goes with float16 only");
  STD_TORCH_CHECK(element_type(up, "up") == weight_type && (!bias || element_type(*bias, "bias") == weight_type),
                  "lowrank_linear: up and bias must have down's dtype");
}

void check_devices(const Tensor& x, const Tensor& down, const Tensor& up, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.is_cuda(), "lowrank_linear: x must be on a CUDA device");
  const int32_t device = x.get_device_index();
  check_on_device(down, device, "lowrank_linear", "down");
  check_on_device(up, device, "lowrank_linear", "up");
  if (bias) check_on_device(*bias, device, "lowrank_linear", "bias");
  check_has_data(x, "lowrank_linear: x");
  check_has_data(down, "lowrank_linear: down");
  check_has_data(up, "lowrank_linear: up");
  if (bias) check_has_data(*bias, "lowrank_linear: bias");
}

// From torch's caching allocator, on its current stream: a graph that is being captured gives it memory of its own, and
// nobody else gets the memory before what is queued here is done.
Tensor allocate(const Tensor& like, const std::vector<int64_t>& sizes, std::optional<ScalarType> type = std::nullopt) {
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, type);
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

Tensor lowrank_linear(const Tensor& x, const Tensor& down, const Tensor& up, const std::optional<Tensor>& bias) {
  const Shape s = check_shapes(x, down, up, bias);
  const ElementType type = element_type(x, "x"), weight_type = element_type(down, "down");
  check_types(type, weight_type, up, bias);
  check_devices(x, down, up, bias);

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes.push_back(x.size(i));
  sizes.push_back(s.d_out);
  Tensor out = allocate(x, sizes);
  if (s.rows * s.d_out == 0) return out;

  const Tensor hidden = allocate(x, {s.rows, s.k}, ScalarType::Float);
  const Tensor dense_x = dense(x), dense_down = dense(down), dense_up = dense(up);
  std::optional<Tensor> dense_bias;
  if (bias) dense_bias = dense(*bias);
  LowrankLinear layer{};
  layer.x = dense_x.const_data_ptr();
  layer.down = dense_down.const_data_ptr();
  layer.up = dense_up.const_data_ptr();
  layer.bias = dense_bias ? dense_bias->const_data_ptr() : nullptr;
  layer.out = out.mutable_data_ptr();
  layer.hidden = static_cast<float*>(hidden.mutable_data_ptr());
  layer.rows = s.rows;
  layer.d_in = s.d_in;
  layer.k = s.k;
  layer.d_out = s.d_out;
  layer.type = type;
  layer.weight_type = weight_type;
  check_launch(rmtkernels_cuda_lowrank_linear(&layer, current_stream(x.get_device_index())), "lowrank_linear");
  return out;
}

}  // namespace
}  // namespace rmtkernels

STABLE_TORCH_LIBRARY_IMPL(rmtkernels, CUDA, m) { m.impl("lowrank_linear", TORCH_BOX(&rmtkernels::lowrank_linear)); }
