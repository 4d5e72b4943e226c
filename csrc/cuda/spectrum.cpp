// CUDA binding of spectrum: checks tensors, hands pointers to the launchers on torch's current stream.
#include "cuda/spectrum.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/binding.h"
#include "tensor_check.h"

namespace rmtkernels {
namespace {

Tensor spectrum_eigvalsh(const Tensor& matrices) {
  const MatrixShape shape = check_spectrum_eigvalsh(matrices);
  STD_TORCH_CHECK(matrices.is_cuda(), "spectrum_eigvalsh: matrices must be on a CUDA device");
  const int32_t device = matrices.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor dense = torch::stable::contiguous(matrices);
  Tensor values = torch::stable::new_empty(dense, shape.result);
  const int error = rmtkernels_cuda_spectrum_eigvalsh(dense.const_data_ptr(), values.mutable_data_ptr(),
                                                      shape.is_double, shape.n, shape.count, current_stream(device));
  check_launch(error, "spectrum_eigvalsh");
  return values;
}

void spectrum_descriptors_(const Tensor& descriptors, const Tensor& eigenvalues, const Tensor& gram, const Tensor& seen,
                           const Tensor& laws, int64_t dim, bool center, int64_t joint, bool normalize, int64_t noise) {
  const DescriptorArgs args =
      descriptor_args(descriptors, eigenvalues, gram, seen, laws, dim, center, joint, normalize, noise);
  STD_TORCH_CHECK(gram.is_cuda(), "spectrum_descriptors_: gram must be on a CUDA device");
  const int32_t device = gram.get_device_index();
  check_on_device(descriptors, device, "spectrum_descriptors_", "descriptors");
  check_on_device(eigenvalues, device, "spectrum_descriptors_", "eigenvalues");
  check_on_device(seen, device, "spectrum_descriptors_", "seen");
  check_on_device(laws, device, "spectrum_descriptors_", "laws");
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_launch(rmtkernels_cuda_spectrum_descriptors(&args, current_stream(device)), "spectrum_descriptors_");
}

}  // namespace
}  // namespace rmtkernels

STABLE_TORCH_LIBRARY_IMPL(rmtkernels, CUDA, m) {
  m.impl("spectrum_eigvalsh", TORCH_BOX(&rmtkernels::spectrum_eigvalsh));
  m.impl("spectrum_descriptors_", TORCH_BOX(&rmtkernels::spectrum_descriptors_));
}
