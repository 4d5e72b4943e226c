// CPU binding of covariance: checks tensors, decides which rows count, splits columns and tiles over threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/kernels.h"
#include "tensor_check.h"

namespace rmtkernels {
namespace {

constexpr int64_t kChunkRows = 4 * kScatterDepth;  // rows packed at once
constexpr int64_t kBlockPanels = 8;                // a block of panels by panels stays in the second-level cache
constexpr int64_t kStripColumns = 512;

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      STD_TORCH_CHECK(false, "covariance_update_: batch must be float64, float32, bfloat16 or float16");
  }
}
int64_t size_of(DType type) { return type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : 2; }

// Splits 0 .. count - 1 into strips of `width` and hands them to threads; no result may depend on the split.
template <class F>
void for_strips(int64_t count, int64_t width, const F& body) {
  torch::stable::parallel_for(0, (count + width - 1) / width, 1, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) body(strip * width, std::min(count, (strip + 1) * width));
  });
}

double weight_of(const std::optional<Tensor>& weights, const std::optional<Tensor>& mask, int64_t i) {
  if (mask && !static_cast<const bool*>(mask->const_data_ptr())[i * mask->stride(0)]) return 0;
  if (!weights) return 1;
  const int64_t at = i * weights->stride(0);
  return weights->scalar_type() == ScalarType::Double ? static_cast<const double*>(weights->const_data_ptr())[at]
                                                      : static_cast<const float*>(weights->const_data_ptr())[at];
}

// What a batch adds: the rows that count with their weights, and their mean.
struct Sample {
  std::vector<int64_t> index;
  std::vector<double> weight, mean;
  double total = 0, squares = 0, trace = 0;  // sums of weights and squared weights, trace of the scatter matrix
  int64_t rejected = 0;

  RowList rows(const Tensor& batch, size_t begin, size_t end) const {
    return {batch.const_data_ptr(), dtype_of(batch),       batch.stride(0),
            index.data() + begin,   weight.data() + begin, int64_t(end - begin)};
  }
};

// Squared norms of the rows with a weight; 0 for the others, which are not read.
std::vector<double> row_norms(const Tensor& batch, const std::vector<double>& weight) {
  std::vector<double> norms(weight.size());
  const DType type = dtype_of(batch);
  const char* const data = static_cast<const char*>(batch.const_data_ptr());
  const int64_t step = batch.stride(0) * size_of(type), dim = batch.size(1);
  for_strips(int64_t(weight.size()), 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (weight[size_t(i)] > 0) norms[size_t(i)] = kernels().squared_norm(data + i * step, type, dim);
  });
  return norms;
}

Sample sample_of(const Tensor& batch, const std::optional<Tensor>& weights, const std::optional<Tensor>& mask,
                 double largest) {
  Sample s;
  std::vector<double> given(static_cast<size_t>(batch.size(0)));
  for (size_t i = 0; i < given.size(); ++i) {
    given[i] = weight_of(weights, mask, int64_t(i));
    STD_TORCH_CHECK(given[i] >= 0 && given[i] <= std::numeric_limits<double>::max(),
                    "covariance_update_: weights must be finite and not negative, got ", given[i]);
  }
  const std::vector<double> norms = row_norms(batch, given);
  double energy = 0;
  for (size_t i = 0; i < given.size(); ++i) {
    if (given[i] == 0) continue;
    if (!(norms[i] <= largest)) {
      ++s.rejected;
      continue;
    }
    s.index.push_back(int64_t(i));
    s.weight.push_back(given[i]);
    s.total += given[i];
    s.squares += given[i] * given[i];
    energy += given[i] * norms[i];
  }
  s.mean.resize(size_t(batch.size(1)));
  if (s.index.empty()) return s;
  const RowList rows = s.rows(batch, 0, s.index.size());
  for_strips(batch.size(1), kStripColumns,
             [&](int64_t begin, int64_t end) { kernels().add_rows(s.mean.data(), rows, begin, end); });
  double mean_norm = 0;
  for (double& m : s.mean) m /= s.total, mean_norm += m * m;
  const double trace = energy - s.total * mean_norm;
  s.trace = trace < 0 ? 0 : trace;  // NaN, of sums that overflow, is to be refused
  return s;
}

// The state's scatter matrix, and room to pack rows that are to be added to it.
struct Scatter {
  const Kernels& kernel = kernels();  // one for the whole call: the layout of what is packed is its own
  void* data;
  Tensor packed;
  int64_t dim, panels;
  bool is_double;

  Scatter(Tensor& scatter, int64_t rows)
      : data(scatter.mutable_data_ptr()),
        packed(scatter),
        dim(scatter.size(0)),
        is_double(scatter.scalar_type() == ScalarType::Double) {
    const int64_t width = kernel.panel_width(is_double);
    panels = (dim + width - 1) / width;
    // One row more than a chunk: the difference of the means.
    const int64_t blocks = (std::min(rows, kChunkRows) + kScatterDepth) / kScatterDepth;
    packed = torch::stable::new_empty(scatter, {blocks * kScatterDepth * panels * width});
  }

  void scale(double factor) const {
    if (factor == 1) return;
    for_strips(dim, 64,
               [&](int64_t begin, int64_t end) { kernel.scale_lower(data, is_double, dim, factor, begin, end); });
  }

  void pack(int64_t place, const RowList& rows, const double* mean) {
    void* const to = packed.mutable_data_ptr();
    for_strips(panels, 2 * kBlockPanels, [&](int64_t begin, int64_t end) {
      kernel.pack_rows(to, is_double, place, rows, mean, dim, begin, end);
    });
  }

  void add_packed(int64_t depth) const {
    const int64_t blocks = (panels + kBlockPanels - 1) / kBlockPanels;
    const void* const from = packed.const_data_ptr();
    for_strips(blocks * (blocks + 1) / 2, 1, [&](int64_t block, int64_t) {
      int64_t i = 0;
      while ((i + 1) * (i + 2) / 2 <= block) ++i;
      const int64_t j = block - i * (i + 1) / 2;
      kernel.add_scatter(data, from, is_double, depth, dim,
                         {i * kBlockPanels, std::min(panels, (i + 1) * kBlockPanels), j * kBlockPanels,
                          std::min(panels, (j + 1) * kBlockPanels)});
    });
  }
};

// Trace of the scatter matrix that an update leaves: no entry is larger, and if it fits its dtype all of them do.
double trace_after(const Tensor& scatter, const double* mean, const Sample& s, double before, double decay,
                   double between) {
  double trace = 0, gap = 0;
  const int64_t dim = scatter.size(0);
  for (int64_t j = 0; j < dim && before > 0; ++j) {
    const int64_t at = j * (dim + 1);
    trace += scatter.scalar_type() == ScalarType::Double ? static_cast<const double*>(scatter.const_data_ptr())[at]
                                                         : static_cast<const float*>(scatter.const_data_ptr())[at];
    gap += (s.mean[size_t(j)] - mean[j]) * (s.mean[size_t(j)] - mean[j]);
  }
  return decay * trace + between * gap + s.trace;
}

void covariance_update_(Tensor mean, Tensor scatter, Tensor totals, Tensor batch, std::optional<Tensor> weights,
                        std::optional<Tensor> mask, double decay) {
  const CovarianceShape shape = check_covariance_update(mean, scatter, totals, batch, weights, mask, decay);
  dtype_of(batch);
  double* const total = static_cast<double*>(totals.mutable_data_ptr());
  double* const center = static_cast<double*>(mean.mutable_data_ptr());
  const double largest = shape.is_double ? std::numeric_limits<double>::max() : std::numeric_limits<float>::max();
  const Tensor rows = shape.dim <= 1 || batch.stride(1) == 1 ? batch : torch::stable::contiguous(batch);
  const Sample sample = sample_of(rows, weights, mask, largest);
  if (sample.index.empty()) {
    total[kTotalRejected] += double(sample.rejected);
    return;
  }

  const bool fresh = total[kTotalWeight] == 0;
  const double before = decay * total[kTotalWeight], after = before + sample.total;
  const double between = fresh ? 0 : between_weight(before, sample.total);
  STD_TORCH_CHECK(before >= 0 && after <= std::numeric_limits<double>::max() &&
                      trace_after(scatter, center, sample, before, decay, between) <= largest / 2,
                  "covariance_update_: out of range: the sums would overflow, or the state is not finite");
  Scatter sums(scatter, int64_t(sample.index.size()));
  sums.scale(fresh ? 0 : decay);
  for (size_t begin = 0; begin < sample.index.size(); begin += size_t(kChunkRows)) {
    const size_t end = std::min(sample.index.size(), begin + size_t(kChunkRows));
    const int64_t count = int64_t(end - begin);
    sums.pack(0, sample.rows(rows, begin, end), sample.mean.data());
    const bool last = end == sample.index.size() && !fresh;
    if (last) {
      const int64_t only = 0;
      sums.pack(count, {sample.mean.data(), DType::kFloat64, 0, &only, &between, 1}, center);
    }
    sums.add_packed(count + last);
  }
  for (int64_t j = 0; j < shape.dim; ++j)
    center[j] =
        fresh ? sample.mean[size_t(j)] : center[j] + (sample.total / after) * (sample.mean[size_t(j)] - center[j]);
  total[kTotalSquares] = (fresh ? 0 : decay * decay * total[kTotalSquares]) + sample.squares;
  total[kTotalWeight] = after;
  total[kTotalRows] += double(sample.index.size());
  total[kTotalRejected] += double(sample.rejected);
  if (decay < 1 && !fresh) total[kTotalDecays] += 1;
}

}  // namespace
}  // namespace rmtkernels

STABLE_TORCH_LIBRARY_IMPL(rmtkernels, CPU, m) {
  m.impl("covariance_update_", TORCH_BOX(&rmtkernels::covariance_update_));
}
