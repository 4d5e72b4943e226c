// CPU binding of spectrum: checks tensors, splits the matrices over threads.
#include <torch/csrc/stable/ops.h>

#include "cpu/kernels.h"
#include "tensor_check.h"

namespace rmtkernels {
namespace {

// Matrices per thread below which waking another one costs more than it brings.
int64_t grain(int64_t n) { return 1 + 1000000 / (1 + n * n * n); }

Tensor spectrum_eigvalsh(Tensor matrices) {
  const MatrixShape shape = check_spectrum_eigvalsh(matrices);
  const int64_t n = shape.n;
  const Tensor dense = torch::stable::contiguous(matrices);
  Tensor values = torch::stable::new_empty(dense, shape.result);
  const void* const in = dense.const_data_ptr();
  void* const out = values.mutable_data_ptr();
  torch::stable::parallel_for(0, shape.count, grain(n), [&](int64_t begin, int64_t end) {
    if (shape.is_double)
      kernels().eigvalsh_f64(static_cast<const double*>(in), static_cast<double*>(out), n, begin, end);
    else
      kernels().eigvalsh_f32(static_cast<const float*>(in), static_cast<float*>(out), n, begin, end);
  });
  return values;
}

void spectrum_descriptors_(Tensor descriptors, Tensor eigenvalues, Tensor gram, Tensor seen, Tensor laws, int64_t dim,
                           bool center, int64_t joint, bool normalize, int64_t noise) {
  const DescriptorArgs args =
      descriptor_args(descriptors, eigenvalues, gram, seen, laws, dim, center, joint, normalize, noise);
  const int64_t problems = joint == kPerLayer ? args.layers * args.batch : args.batch;
  torch::stable::parallel_for(0, problems, grain(args.window),
                              [&](int64_t begin, int64_t end) { kernels().descriptors(args, begin, end); });
}

}  // namespace
}  // namespace rmtkernels

STABLE_TORCH_LIBRARY_IMPL(rmtkernels, CPU, m) {
  m.impl("spectrum_eigvalsh", TORCH_BOX(&rmtkernels::spectrum_eigvalsh));
  m.impl("spectrum_descriptors_", TORCH_BOX(&rmtkernels::spectrum_descriptors_));
}
