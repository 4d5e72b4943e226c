// Checks shared by the CPU and CUDA bindings: what a raw operator verifies before it touches memory. The public Python
// functions check first, with typed errors; these guard calls through torch.ops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "rmtkernels/covariance.h"
#include "rmtkernels/sliding_window.h"
#include "rmtkernels/spectrum.h"

namespace rmtkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A tensor whose storage was freed (as sharded training does) still has a shape.
inline void check_has_data(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.numel() == 0 || t.const_data_ptr() != nullptr, name, " has a shape but no memory");
}

// Two sequences or layers of an output must not share memory: threads write them at once.
inline bool rows_are_apart(const Tensor& t) {
  const int64_t outer = t.size(0) > 1 ? t.stride(0) : INT64_MAX, inner = t.size(1) > 1 ? t.stride(1) : INT64_MAX;
  const int64_t small = outer < inner ? outer : inner, large = outer < inner ? inner : outer;
  const int64_t count = outer < inner ? t.size(0) : t.size(1);
  return small >= t.size(2) && (large == INT64_MAX || large / count >= small);
}

constexpr int64_t kMaxSize = int64_t(1) << 40;  // products of a few sizes up to it still fit 64 bits

// Shapes of one push: `steps` rows for each of `layers` x `batch` streams of `window` slots, `dim` wide.
struct PushShape {
  int64_t layers, batch, window, dim, steps;
};

inline PushShape check_window_push(const Tensor& ring, const Tensor& gram, const Tensor& seen,
                                   const std::vector<Tensor>& rows, const std::optional<Tensor>& mask) {
  STD_TORCH_CHECK(ring.dim() == 4 && ring.is_contiguous(), "window_push_: ring must be contiguous (L, B, N, D)");
  const int64_t L = ring.size(0), B = ring.size(1), N = ring.size(2), D = ring.size(3);
  const ScalarType type = ring.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "window_push_: ring must be float32, bfloat16 or float16");
  STD_TORCH_CHECK(N >= 1 && N <= kMaxWindow, "window_push_: window must be 1 to ", kMaxWindow, ", got ", N);
  STD_TORCH_CHECK(gram.dim() == 4 && gram.is_contiguous() && gram.scalar_type() == ScalarType::Float &&
                      gram.size(0) == L && gram.size(1) == B && gram.size(2) == N && gram.size(3) == N,
                  "window_push_: gram must be contiguous float32 (L, B, N, N)");
  STD_TORCH_CHECK(seen.dim() == 2 && seen.is_contiguous() && seen.scalar_type() == ScalarType::Long &&
                      seen.size(0) == B && seen.size(1) == kSeenColumns,
                  "window_push_: seen must be contiguous int64 (B, ", int(kSeenColumns), ")");
  STD_TORCH_CHECK(int64_t(rows.size()) == L, "window_push_: got rows of ", rows.size(), " layers, the ring has ", L);
  const bool flat = L == 0 || rows[0].dim() == 2;
  const int64_t T = L > 0 && rows[0].dim() == 3 ? rows[0].size(1) : 1;
  for (const Tensor& row : rows) {
    STD_TORCH_CHECK(
        row.dim() == (flat ? 2 : 3) && row.size(0) == B && row.size(-1) == D && (flat ? 1 : row.size(1)) == T,
        "window_push_: all rows must be (B, D) or all (B, T, D), with B = ", B, ", D = ", D);
    STD_TORCH_CHECK(row.scalar_type() == type, "window_push_: rows must have the ring's dtype");
    STD_TORCH_CHECK(row.get_device_index() == ring.get_device_index() && row.is_cpu() == ring.is_cpu(),
                    "window_push_: rows and ring must be on one device");
    check_has_data(row, "window_push_: a row");
  }
  STD_TORCH_CHECK(T <= kMaxSize / (B > 0 ? B : 1), "window_push_: ", T, " rows for ", B, " sequences are too many");
  check_has_data(ring, "window_push_: ring");
  check_has_data(gram, "window_push_: gram");
  check_has_data(seen, "window_push_: seen");
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == (flat ? 1 : 2) && mask->size(0) == B &&
                        (flat ? 1 : mask->size(1)) == T && mask->is_cpu() == ring.is_cpu(),
                    "window_push_: mask must be bool (B,) or (B, T) on the ring's device");
    check_has_data(*mask, "window_push_: mask");
  }
  return {L, B, N, D, T};
}

// Shapes of one call of window_gram: `windows` windows of each of `batch` sequences.
struct WindowGramShape {
  int64_t batch, steps, dim, windows;
};

inline WindowGramShape check_window_gram(const Tensor& hidden, int64_t window, int64_t stride,
                                         const std::optional<Tensor>& mask) {
  STD_TORCH_CHECK(hidden.dim() == 3, "window_gram: hidden must be (B, T, D)");
  const ScalarType type = hidden.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "window_gram: hidden must be float32, bfloat16 or float16");
  STD_TORCH_CHECK(window >= 1 && window <= kMaxWindow && stride >= 1, "window_gram: window must be 1 to ", kMaxWindow,
                  ", stride at least 1");
  const int64_t B = hidden.size(0), T = hidden.size(1), D = hidden.size(2);
  const int64_t rows = T <= kMaxSize / (B > 0 ? B : 1) ? B * T : -1;
  STD_TORCH_CHECK(rows >= 0 && D <= 4096 * (kMaxSize / (rows > 0 ? rows : 1)), "window_gram: ", B, " sequences of ", T,
                  " rows of ", D, " elements are too many");
  check_has_data(hidden, "window_gram: hidden");
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && mask->size(0) == B &&
                        mask->size(1) == T && mask->is_cpu() == hidden.is_cpu(),
                    "window_gram: mask must be bool (B, T) on the device of hidden");
    check_has_data(*mask, "window_gram: mask");
  }
  return {B, T, D, T / stride};
}

// What spectrum_eigvalsh is given: `count` matrices of n rows. The result's shape is theirs less one n.
struct MatrixShape {
  int64_t n, count;
  bool is_double;
  std::vector<int64_t> result;
};

inline MatrixShape check_spectrum_eigvalsh(const Tensor& matrices) {
  const int64_t rank = matrices.dim();
  STD_TORCH_CHECK(rank >= 2 && matrices.size(-1) == matrices.size(-2),
                  "spectrum_eigvalsh: matrices must be (..., N, N)");
  const int64_t n = matrices.size(-1);
  STD_TORCH_CHECK(n >= 1 && n <= kMaxWindow, "spectrum_eigvalsh: N must be 1 to ", kMaxWindow, ", got ", n);
  const bool is_double = matrices.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(is_double || matrices.scalar_type() == ScalarType::Float, "spectrum_eigvalsh: float32 or float64");
  check_has_data(matrices, "spectrum_eigvalsh: matrices");
  MatrixShape shape{n, matrices.numel() / (n * n), is_double, {}};
  for (int64_t i = 0; i + 1 < rank; ++i) shape.result.push_back(matrices.size(i));
  return shape;
}

// Shapes of one descriptor call: `layers` x `batch` Gram matrices of `window` slots.
struct SpectrumShape {
  int64_t layers, batch, window;
};

inline SpectrumShape check_spectrum_descriptors(const Tensor& descriptors, const Tensor& eigenvalues,
                                                const Tensor& gram, const Tensor& seen, const Tensor& laws, int64_t dim,
                                                int64_t joint, int64_t noise) {
  STD_TORCH_CHECK(gram.dim() == 4 && gram.is_contiguous() && gram.scalar_type() == ScalarType::Float &&
                      gram.size(2) == gram.size(3),
                  "spectrum_descriptors_: gram must be contiguous float32 (L, B, N, N)");
  const int64_t L = gram.size(0), B = gram.size(1), N = gram.size(2);
  STD_TORCH_CHECK(N >= 1 && N <= kMaxWindow, "spectrum_descriptors_: window must be 1 to ", kMaxWindow, ", got ", N);
  STD_TORCH_CHECK(dim >= 1 && dim <= kMaxSize && joint >= kPerLayer && joint <= kJointTrace && noise >= kNoiseMedian &&
                      noise <= kNoiseTrace,
                  "spectrum_descriptors_: dim must be 1 to 2^40, joint 0, 1 or 2, noise 0 or 1");
  STD_TORCH_CHECK(L <= (int64_t(1) << 20) && (joint == kPerLayer || L > 0),
                  "spectrum_descriptors_: a joint spectrum needs a layer");
  STD_TORCH_CHECK(seen.dim() == 1 && seen.scalar_type() == ScalarType::Long && seen.size(0) == B,
                  "spectrum_descriptors_: seen must be int64 (B,)");
  STD_TORCH_CHECK(laws.dim() == 1 && laws.is_contiguous() && laws.scalar_type() == ScalarType::Double &&
                      laws.size(0) == law_table_size(N),
                  "spectrum_descriptors_: laws must be contiguous float64 (", law_table_size(N), ",)");
  const int64_t spectra = joint == kPerLayer ? L : 1;
  const auto check_out = [&](const Tensor& out, int64_t last, const char* name) {
    STD_TORCH_CHECK(out.dim() == 3 && out.scalar_type() == ScalarType::Float && out.size(0) == spectra &&
                        out.size(1) == B && out.size(2) == last && out.stride(2) == 1 && rows_are_apart(out),
                    "spectrum_descriptors_: ", name, " must be float32 (", spectra, ", ", B, ", ", last,
                    ") with unit last stride and no two rows in one place");
    check_has_data(out, name);
  };
  check_out(descriptors, kDescriptors, "descriptors");
  check_out(eigenvalues, N, "eigenvalues");
  check_has_data(gram, "spectrum_descriptors_: gram");
  check_has_data(seen, "spectrum_descriptors_: seen");
  return {L, B, N};
}

// The kernels' arguments for a call that check_spectrum_descriptors finds valid.
inline DescriptorArgs descriptor_args(const Tensor& descriptors, const Tensor& eigenvalues, const Tensor& gram,
                                      const Tensor& seen, const Tensor& laws, int64_t dim, bool center, int64_t joint,
                                      bool normalize, int64_t noise) {
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
  return args;
}

// Shapes of one covariance update: `rows` rows of `dim` columns.
struct CovarianceShape {
  int64_t rows, dim;
  bool is_double;
};

inline CovarianceShape check_covariance_update(const Tensor& mean, const Tensor& scatter, const Tensor& totals,
                                               const Tensor& batch, const std::optional<Tensor>& weights,
                                               const std::optional<Tensor>& mask, double decay) {
  STD_TORCH_CHECK(mean.dim() == 1 && mean.is_contiguous() && mean.scalar_type() == ScalarType::Double,
                  "covariance_update_: mean must be contiguous float64 (D,)");
  const int64_t D = mean.size(0);
  const bool is_double = scatter.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(scatter.dim() == 2 && scatter.is_contiguous() && scatter.size(0) == D && scatter.size(1) == D &&
                      (is_double || scatter.scalar_type() == ScalarType::Float),
                  "covariance_update_: scatter must be contiguous float32 or float64 (D, D)");
  STD_TORCH_CHECK(totals.dim() == 1 && totals.is_contiguous() && totals.scalar_type() == ScalarType::Double &&
                      totals.size(0) == kCovarianceTotals,
                  "covariance_update_: totals must be contiguous float64 (", int(kCovarianceTotals), ",)");
  STD_TORCH_CHECK(batch.dim() == 2 && batch.size(1) == D, "covariance_update_: batch must be (n, ", D, ")");
  const int64_t n = batch.size(0);
  STD_TORCH_CHECK(n <= kMaxSize, "covariance_update_: ", n, " rows are too many for one call");
  STD_TORCH_CHECK(decay > 0 && decay <= 1, "covariance_update_: decay must be in (0, 1], got ", decay);
  STD_TORCH_CHECK(
      !weights || (weights->dim() == 1 && weights->size(0) == n && weights->is_cpu() == mean.is_cpu() &&
                   (weights->scalar_type() == ScalarType::Double || weights->scalar_type() == ScalarType::Float)),
      "covariance_update_: weights must be float32 or float64 (n,) on the state's device");
  STD_TORCH_CHECK(!mask || (mask->dim() == 1 && mask->size(0) == n && mask->is_cpu() == mean.is_cpu() &&
                            mask->scalar_type() == ScalarType::Bool),
                  "covariance_update_: mask must be bool (n,) on the state's device");
  STD_TORCH_CHECK(
      scatter.is_cpu() == mean.is_cpu() && totals.is_cpu() == mean.is_cpu() && batch.is_cpu() == mean.is_cpu(),
      "covariance_update_: state and batch must be on one device");
  check_has_data(mean, "covariance_update_: mean");
  check_has_data(scatter, "covariance_update_: scatter");
  check_has_data(totals, "covariance_update_: totals");
  check_has_data(batch, "covariance_update_: batch");
  if (weights) check_has_data(*weights, "covariance_update_: weights");
  if (mask) check_has_data(*mask, "covariance_update_: mask");
  return {n, D, is_double};
}

}  // namespace rmtkernels
