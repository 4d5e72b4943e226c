// CPU binding of lanczos: checks tensors, packs eight vectors at a time, splits rows over threads.
#include <torch/csrc/stable/ops.h>

#include "cpu/kernels.h"
#include "tensor_check.h"

namespace rmtkernels {
namespace {

constexpr int64_t kLanes = 8, kGrain = 128;
// Rows of X that share a sum, and sums at most: the split must not depend on the number of threads.
constexpr int64_t kChunk = 1008, kMaxChunks = 16;

using Run = void (*)(const MultiplyArgs&, int64_t, int64_t);

MultiplyArgs check_multiply(const Tensor& matrix, const Tensor& block) {
  STD_TORCH_CHECK(
      matrix.dim() == 2 && (matrix.stride(1) == 1 || matrix.size(1) == 1) && matrix.size(0) >= 1 && matrix.size(1) >= 1,
      "lanczos_multiply: the matrix must be (rows, cols), rows dense");
  const ScalarType type = matrix.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "lanczos_multiply: float32 or float64");
  STD_TORCH_CHECK(block.dim() == 2 && block.is_contiguous() && block.size(1) == matrix.size(1) &&
                      block.scalar_type() == type && block.is_cpu(),
                  "lanczos_multiply: the block must be contiguous (vectors, ", matrix.size(1),
                  ") of the matrix's dtype");
  check_has_data(matrix, "lanczos_multiply: the matrix");
  check_has_data(block, "lanczos_multiply: the block");
  MultiplyArgs args = {};
  args.matrix = matrix.const_data_ptr();
  args.stride = matrix.stride(0);
  args.rows = matrix.size(0);
  args.cols = matrix.size(1);
  return args;
}

// Eight rows of the block, from `first` on, side by side.
template <class T>
void pack(T* packed, const T* block, int64_t first, int64_t lanes, int64_t cols) {
  for (int64_t j = 0; j < cols; ++j)
    for (int64_t lane = 0; lane < kLanes; ++lane)
      packed[j * kLanes + lane] = lane < lanes ? block[(first + lane) * cols + j] : T(0);
}

template <class T>
void multiply(MultiplyArgs args, const Tensor& block, Tensor& out, Run run) {
  std::vector<T> packed(args.cols * kLanes);
  args.block = packed.data();
  for (int64_t first = 0; first < block.size(0); first += kLanes) {
    args.lanes = int(block.size(0) - first < kLanes ? block.size(0) - first : kLanes);
    pack(packed.data(), static_cast<const T*>(block.const_data_ptr()), first, args.lanes, args.cols);
    args.out = static_cast<T*>(out.mutable_data_ptr()) + first * args.rows;
    torch::stable::parallel_for(0, args.rows, kGrain, [&](int64_t begin, int64_t end) { run(args, begin, end); });
  }
}

template <class T>
void multiply_gram(MultiplyArgs args, const Tensor& block, Tensor& out, Run run) {
  const int64_t share = (args.rows + kMaxChunks - 1) / kMaxChunks;
  args.chunk = share > kChunk ? (share + kChunk - 1) / kChunk * kChunk : kChunk;
  const int64_t chunks = (args.rows + args.chunk - 1) / args.chunk;
  std::vector<T> packed(args.cols * kLanes), scratch(chunks * gram_scratch(args.cols));
  std::vector<double> sums(chunks * args.cols * kLanes);
  args.block = packed.data();
  args.scratch = scratch.data();
  args.sums = sums.data();
  T* const to = static_cast<T*>(out.mutable_data_ptr());
  for (int64_t first = 0; first < block.size(0); first += kLanes) {
    args.lanes = int(block.size(0) - first < kLanes ? block.size(0) - first : kLanes);
    pack(packed.data(), static_cast<const T*>(block.const_data_ptr()), first, args.lanes, args.cols);
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) { run(args, begin, end); });
    for (int64_t j = 0; j < args.cols; ++j)
      for (int64_t lane = 0; lane < args.lanes; ++lane) {
        double sum = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += sums[(chunk * args.cols + j) * kLanes + lane];
        to[(first + lane) * args.cols + j] = T(sum);
      }
  }
}

Tensor lanczos_multiply(Tensor matrix, Tensor block) {
  const MultiplyArgs args = check_multiply(matrix, block);
  Tensor out = torch::stable::new_empty(block, {block.size(0), args.rows});
  if (matrix.scalar_type() == ScalarType::Float)
    multiply<float>(args, block, out, kernels().multiply_f32);
  else
    multiply<double>(args, block, out, kernels().multiply_f64);
  return out;
}

Tensor lanczos_multiply_gram(Tensor samples, std::optional<Tensor> mean, Tensor block) {
  MultiplyArgs args = check_multiply(samples, block);
  if (mean) {
    STD_TORCH_CHECK(mean->dim() == 2 && mean->is_contiguous() && mean->size(0) == 2 && mean->size(1) == args.cols &&
                        mean->scalar_type() == samples.scalar_type() && mean->is_cpu(),
                    "lanczos_multiply_gram: the mean must be contiguous (2, ", args.cols, ") of the samples' dtype");
    check_has_data(*mean, "lanczos_multiply_gram: the mean");
    args.mean = mean->const_data_ptr();
  }
  Tensor out = torch::stable::new_empty(block, {block.size(0), args.cols});
  if (samples.scalar_type() == ScalarType::Float)
    multiply_gram<float>(args, block, out, kernels().multiply_gram_f32);
  else
    multiply_gram<double>(args, block, out, kernels().multiply_gram_f64);
  return out;
}

}  // namespace
}  // namespace rmtkernels

STABLE_TORCH_LIBRARY_IMPL(rmtkernels, CPU, m) {
  m.impl("lanczos_multiply", TORCH_BOX(&rmtkernels::lanczos_multiply));
  m.impl("lanczos_multiply_gram", TORCH_BOX(&rmtkernels::lanczos_multiply_gram));
}
