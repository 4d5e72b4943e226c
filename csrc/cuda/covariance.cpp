// CUDA binding of covariance: checks tensors, hands pointers to the launcher on torch's current stream.
#include "cuda/covariance.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/binding.h"
#include "tensor_check.h"

namespace rmtkernels {
namespace {

SampleType sample_type(const Tensor& batch) {
  switch (batch.scalar_type()) {
    case ScalarType::Float:
      return SampleType::kFloat32;
    case ScalarType::BFloat16:
      return SampleType::kBFloat16;
    case ScalarType::Half:
      return SampleType::kFloat16;
    case ScalarType::Double:
      return SampleType::kFloat64;
    default:
      STD_TORCH_CHECK(false, "covariance_update_: batch must be float64, float32, bfloat16 or float16");
  }
}

void check_devices(const Tensor& mean, const Tensor& scatter, const Tensor& totals, const Tensor& batch,
                   const std::optional<Tensor>& weights, const std::optional<Tensor>& mask) {
  STD_TORCH_CHECK(mean.is_cuda(), "covariance_update_: mean must be on a CUDA device");
  const int32_t device = mean.get_device_index();
  check_on_device(scatter, device, "covariance_update_", "scatter");
  check_on_device(totals, device, "covariance_update_", "totals");
  check_on_device(batch, device, "covariance_update_", "batch");
  if (weights) check_on_device(*weights, device, "covariance_update_", "weights");
  if (mask) check_on_device(*mask, device, "covariance_update_", "mask");
}

void covariance_update_(const Tensor& mean, const Tensor& scatter, const Tensor& totals, const Tensor& batch,
                        const std::optional<Tensor>& weights, const std::optional<Tensor>& mask, double decay) {
  const CovarianceShape shape = check_covariance_update(mean, scatter, totals, batch, weights, mask, decay);
  CovarianceUpdate update{};
  update.type = sample_type(batch);
  check_devices(mean, scatter, totals, batch, weights, mask);
  if (shape.rows == 0) return;

  const int32_t device = mean.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor rows = shape.dim <= 1 || batch.stride(1) == 1 ? batch : torch::stable::contiguous(batch);
  // From torch's caching allocator, on its current stream: a graph that is being captured gives it memory of its own,
  // and nobody else gets the memory before what is queued here is done.
  const int64_t bytes = rmtkernels_cuda_covariance_workspace(shape.rows, shape.dim, shape.is_double);
  const Tensor workspace = torch::stable::new_empty(mean, {bytes}, ScalarType::Byte);
  update.mean = static_cast<double*>(mean.mutable_data_ptr());
  update.scatter = scatter.mutable_data_ptr();
  update.totals = static_cast<double*>(totals.mutable_data_ptr());
  update.batch = rows.const_data_ptr();
  update.workspace = workspace.mutable_data_ptr();
  update.rows = shape.rows;
  update.dim = shape.dim;
  update.row_stride = rows.stride(0);
  update.decay = decay;
  update.scatter_is_double = shape.is_double;
  if (weights) {
    update.weights = weights->const_data_ptr();
    update.weight_stride = weights->stride(0);
    update.weights_are_double = weights->scalar_type() == ScalarType::Double;
  }
  if (mask) {
    update.mask = static_cast<const bool*>(mask->const_data_ptr());
    update.mask_stride = mask->stride(0);
  }
  check_launch(rmtkernels_cuda_covariance_update(&update, current_stream(device)), "covariance_update_");
}

}  // namespace
}  // namespace rmtkernels

STABLE_TORCH_LIBRARY_IMPL(rmtkernels, CUDA, m) {
  m.impl("covariance_update_", TORCH_BOX(&rmtkernels::covariance_update_));
}
