// CPU binding of spectrum: checks tensors, splits the matrices over threads.
#include <torch/csrc/stable/ops.h>

#include "cpu/kernels.h"
#include "tensor_check.h"

namespace rmtkernels {
namespace {

// Matrices per thread below which waking another one costs more than it brings.
int64_t grain(int64_t n) { return 1 + 1000000 / (1 + n * n * n); }

Tensor spectrum_eigvalsh(Tensor matrices) {
  const int64_t rank = matrices.dim();
  STD_TORCH_CHECK(rank >= 2 && matrices.size(-1) == matrices.size(-2),
                  "spectrum_eigvalsh: matrices must be (..., N, N)");
  const int64_t n = matrices.size(-1);
  STD_TORCH_CHECK(n >= 1 && n <= kMaxWindow, "spectrum_eigvalsh: N must be 1 to ", kMaxWindow, ", got ", n);
  const bool is_double = matrices.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(is_double || matrices.scalar_type() == ScalarType::Float, "spectrum_eigvalsh: float32 or float64");
  const Tensor dense = torch::stable::contiguous(matrices);
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < rank; ++i) shape.push_back(matrices.size(i));
  Tensor values = torch::stable::new_empty(dense, shape);
  const void* const in = dense.const_data_ptr();
  void* const out = values.mutable_data_ptr();
  torch::stable::parallel_for(0, dense.numel() / (n * n), grain(n), [&](int64_t begin, int64_t end) {
    if (is_double)
      kernels().eigvalsh_f64(static_cast<const double*>(in), static_cast<double*>(out), n, begin, end);
    else
      kernels().eigvalsh_f32(static_cast<const float*>(in), static_cast<float*>(out), n, begin, end);
  });
  return values;
}

void spectrum_descriptors_(Tensor descriptors, Tensor eigenvalues, Tensor gram, Tensor seen, Tensor laws, int64_t dim,
                           bool center, int64_t joint, bool normalize, int64_t noise) {
  const SpectrumShape shape = check_spectrum_descriptors(descriptors, eigenvalues, gram, seen, laws, dim, joint, noise);
  DescriptorArgs args;
  args.gram = static_cast<const float*>(gram.const_data_ptr());
  args.seen = static_cast<const int64_t*>(seen.const_data_ptr());
  args.laws = static_cast<const double*>(laws.const_data_ptr());
  args.descriptors = static_cast<float*>(descriptors.mutable_data_ptr());
  args.eigenvalues = static_cast<float*>(eigenvalues.mutable_data_ptr());
  args.seen_stride = seen.stride(0);
  for (int i = 0; i < 2; ++i)
    args.descriptors_stride[i] = descriptors.stride(i), args.eigenvalues_stride[i] = eigenvalues.stride(i);
  args.layers = shape.layers;
  args.batch = shape.batch;
  args.window = shape.window;
  args.dim = dim;
  args.joint = int(joint);
  args.noise = int(noise);
  args.center = center;
  args.normalize = normalize;
  const int64_t problems = joint == kPerLayer ? shape.layers * shape.batch : shape.batch;
  torch::stable::parallel_for(0, problems, grain(shape.window),
                              [&](int64_t begin, int64_t end) { kernels().descriptors(args, begin, end); });
}

}  // namespace
}  // namespace rmtkernels

STABLE_TORCH_LIBRARY_IMPL(rmtkernels, CPU, m) {
  m.impl("spectrum_eigvalsh", TORCH_BOX(&rmtkernels::spectrum_eigvalsh));
  m.impl("spectrum_descriptors_", TORCH_BOX(&rmtkernels::spectrum_descriptors_));
}
