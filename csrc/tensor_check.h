// Checks shared by the CPU and CUDA bindings: what a raw operator verifies before it touches memory. The public Python
// functions check first, with typed errors; these guard calls through torch.ops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "rmtkernels/sliding_window.h"
#include "rmtkernels/spectrum.h"

namespace rmtkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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
  }
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == (flat ? 1 : 2) && mask->size(0) == B &&
                        (flat ? 1 : mask->size(1)) == T && mask->is_cpu() == ring.is_cpu(),
                    "window_push_: mask must be bool (B,) or (B, T) on the ring's device");
  }
  return {L, B, N, D, T};
}

// Shapes of one descriptor call: `layers` x `batch` Gram matrices of `window` slots.
struct SpectrumShape {
  int64_t layers, batch, window;
};

inline SpectrumShape check_spectrum_descriptors(const Tensor& descriptors, const Tensor& eigenvalues,
                                                const Tensor& gram, const Tensor& seen, const Tensor& mp_median,
                                                int64_t dim, int64_t joint) {
  STD_TORCH_CHECK(gram.dim() == 4 && gram.is_contiguous() && gram.scalar_type() == ScalarType::Float &&
                      gram.size(2) == gram.size(3),
                  "spectrum_descriptors_: gram must be contiguous float32 (L, B, N, N)");
  const int64_t L = gram.size(0), B = gram.size(1), N = gram.size(2);
  STD_TORCH_CHECK(N >= 1 && N <= kMaxWindow, "spectrum_descriptors_: window must be 1 to ", kMaxWindow, ", got ", N);
  STD_TORCH_CHECK(dim >= 1 && joint >= kPerLayer && joint <= kJointTrace,
                  "spectrum_descriptors_: dim must be positive, joint 0, 1 or 2");
  STD_TORCH_CHECK(seen.dim() == 1 && seen.scalar_type() == ScalarType::Long && seen.size(0) == B,
                  "spectrum_descriptors_: seen must be int64 (B,)");
  STD_TORCH_CHECK(mp_median.dim() == 1 && mp_median.is_contiguous() && mp_median.scalar_type() == ScalarType::Double &&
                      mp_median.size(0) == N + 1,
                  "spectrum_descriptors_: mp_median must be contiguous float64 (N + 1,)");
  const int64_t spectra = joint == kPerLayer ? L : 1;
  const auto check_out = [&](const Tensor& out, int64_t last, const char* name) {
    STD_TORCH_CHECK(out.dim() == 3 && out.scalar_type() == ScalarType::Float && out.size(0) == spectra &&
                        out.size(1) == B && out.size(2) == last && out.stride(2) == 1,
                    "spectrum_descriptors_: ", name, " must be float32 (", spectra, ", ", B, ", ", last,
                    ") with unit last stride");
  };
  check_out(descriptors, kDescriptors, "descriptors");
  check_out(eigenvalues, N, "eigenvalues");
  return {L, B, N};
}

}  // namespace rmtkernels
