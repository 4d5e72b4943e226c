// CUDA binding of lanczos: checks tensors, hands pointers to the launcher on torch's current stream.
#include "cuda/lanczos.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cuda/binding.h"
#include "tensor_check.h"

namespace rmtkernels {
namespace {

constexpr const char* kOp = "lanczos_orthonormalize";

void check_rows(const Tensor& t, int64_t dim, ScalarType type, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.is_contiguous() && t.size(1) == dim && t.scalar_type() == type, kOp, ": ", name,
                  " must be contiguous (vectors, ", dim, ") of the rows' dtype");
  check_has_data(t, name);
}

void check_orthonormalize(const Tensor& rows, const Tensor& basis, const Tensor& noise, const Tensor& negligible,
                          int64_t shift) {
  const ScalarType type = rows.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, kOp, ": float32 or float64");
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(1) >= 1, kOp, ": rows must be (vectors, d)");
  const int64_t dim = rows.size(1);
  check_rows(rows, dim, type, "rows");
  check_rows(basis, dim, type, "basis");
  check_rows(noise, dim, type, "noise");
  STD_TORCH_CHECK(basis.size(0) <= dim, kOp, ": a basis of ", basis.size(0), " vectors in ", dim, " dimensions");
  STD_TORCH_CHECK(noise.size(0) >= rows.size(0), kOp, ": fewer random rows than rows");
  STD_TORCH_CHECK(negligible.numel() == 1 && negligible.scalar_type() == ScalarType::Double, kOp,
                  ": negligible must be one float64 number");
  STD_TORCH_CHECK(shift >= 0 && shift < dim, kOp, ": shift must be 0 to ", dim - 1, ", got ", shift);
  STD_TORCH_CHECK(rows.is_cuda(), kOp, ": rows must be on a CUDA device");
  const int32_t device = rows.get_device_index();
  check_on_device(basis, device, kOp, "basis");
  check_on_device(noise, device, kOp, "noise");
  check_on_device(negligible, device, kOp, "negligible");
}

Tensor numbers(const Tensor& like, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, ScalarType::Double);
}

std::tuple<Tensor, Tensor, Tensor> lanczos_orthonormalize(const Tensor& rows, const Tensor& basis, const Tensor& noise,
                                                          const Tensor& negligible, int64_t shift) {
  check_orthonormalize(rows, basis, noise, negligible, shift);
  const int32_t device = rows.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  LanczosRows l{};
  l.count = rows.size(0);
  l.size = basis.size(0);
  l.dim = rows.size(1);
  l.shift = shift;
  l.is_double = rows.scalar_type() == ScalarType::Double;
  const int64_t room = l.dim - l.size;
  Tensor unit = torch::stable::new_empty(rows, {l.count < room ? l.count : room, l.dim});
  Tensor triangle = torch::stable::new_zeros(rows, {l.count, l.count}, ScalarType::Double);
  Tensor products = numbers(rows, {l.count, l.size});
  const Tensor workspace = numbers(rows, {rmtkernels_cuda_lanczos_workspace(l.count, l.size, l.dim)});
  l.rows = rows.const_data_ptr();
  l.basis = basis.const_data_ptr();
  l.noise = noise.const_data_ptr();
  l.negligible = static_cast<const double*>(negligible.const_data_ptr());
  l.unit = unit.mutable_data_ptr();
  l.triangle = static_cast<double*>(triangle.mutable_data_ptr());
  l.products = static_cast<double*>(products.mutable_data_ptr());
  l.workspace = static_cast<double*>(workspace.mutable_data_ptr());
  check_launch(rmtkernels_cuda_lanczos_orthonormalize(&l, current_stream(device)), kOp);
  return {unit, triangle, products};
}

}  // namespace
}  // namespace rmtkernels

STABLE_TORCH_LIBRARY_IMPL(rmtkernels, CUDA, m) {
  m.impl("lanczos_orthonormalize", TORCH_BOX(&rmtkernels::lanczos_orthonormalize));
}
