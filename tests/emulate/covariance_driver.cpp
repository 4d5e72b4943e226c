// Runs the covariance kernels against a double precision reference of its own, without Python: what the sanitizer
// builds execute. Every buffer is a heap block of the exact size. Exits with 1 if a result is wrong.
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#include "cuda/covariance.h"
#include "rmtkernels/covariance.h"
#include "rmtkernels/scalar.h"

namespace {

using rmtkernels::bfloat16;
using rmtkernels::float16;
using rmtkernels::SampleType;

struct Scenario {
  const char* name;
  int64_t rows, dim;
  double offset;   // of the mean, in deviations
  bool aligned;    // rows begin on multiples of 16 bytes
  bool weighted;   // some of the weights are 0, and a row is masked
  int64_t poison;  // a row that is not finite, or -1
};

void put(double x, double* to) { *to = x; }
template <class X>
void put(double x, X* to) {
  rmtkernels::round_to(float(x), to);
}
double get(double x) { return x; }
template <class X>
double get(X x) {
  return rmtkernels::to_float(x);
}

template <class X>
constexpr SampleType kType = std::is_same_v<X, float>      ? SampleType::kFloat32
                             : std::is_same_v<X, bfloat16> ? SampleType::kBFloat16
                             : std::is_same_v<X, float16>  ? SampleType::kFloat16
                                                           : SampleType::kFloat64;

template <class X, class T>
class Case {
 public:
  explicit Case(const Scenario& s)
      : s_(s),
        stride_(s.aligned ? (s.dim + 15) / 16 * 16 : s.dim + 1),
        count_((s.rows - 1) * stride_ + s.dim),
        memory_(new char[16 + size_t(count_) * sizeof(X)]),
        mean_(new double[s.dim]),
        scatter_(new T[s.dim * s.dim]),
        totals_(new double[rmtkernels::kCovarianceTotals]()) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    batch_ = reinterpret_cast<X*>(memory_.get() + 16 - address % 16);  // new's address is a multiple: both end together
    for (int64_t j = 0; j < s.dim; ++j) mean_[j] = std::numeric_limits<double>::quiet_NaN();
    for (int64_t e = 0; e < s.dim * s.dim; ++e) scatter_[e] = std::numeric_limits<T>::quiet_NaN();
  }

  bool run() {
    for (double decay : {0.5, 0.75}) {
      draw();
      if (!update(decay)) return fail("the launch failed");
      remember(decay);
    }
    return is_right() || fail("wrong result");
  }

 private:
  bool fail(const char* what) const {
    std::printf("%s, type %d, state of %d bytes: %s\n", s_.name, int(kType<X>), int(sizeof(T)), what);
    return false;
  }

  void draw() {
    std::normal_distribution<double> normal;
    for (int64_t e = 0; e < count_; ++e) put(normal(random_) + s_.offset, &batch_[e]);
    if (s_.poison >= 0) put(std::numeric_limits<double>::quiet_NaN(), &batch_[s_.poison * stride_ + s_.dim / 2]);
    weights_.reset(s_.weighted ? new float[s_.rows] : nullptr);
    mask_.reset(s_.weighted ? new bool[s_.rows] : nullptr);
    for (int64_t i = 0; s_.weighted && i < s_.rows; ++i) {
      weights_[i] = float(random_() % 4) / 2;
      mask_[i] = i != 1;
    }
  }

  bool update(double decay) {
    const int64_t bytes = rmtkernels::rmtkernels_cuda_covariance_workspace(s_.rows, s_.dim, sizeof(T) == 8);
    const std::unique_ptr<double[]> workspace(new double[size_t(bytes) / 8]);
    for (int64_t i = 0; i < bytes / 8; ++i) workspace[i] = std::numeric_limits<double>::quiet_NaN();
    rmtkernels::CovarianceUpdate u{};
    u.mean = mean_.get();
    u.scatter = scatter_.get();
    u.totals = totals_.get();
    u.batch = batch_;
    u.weights = weights_.get();
    u.mask = mask_.get();
    u.workspace = workspace.get();
    u.rows = s_.rows;
    u.dim = s_.dim;
    u.row_stride = stride_;
    u.weight_stride = u.mask_stride = 1;
    u.decay = decay;
    u.type = kType<X>;
    u.scatter_is_double = sizeof(T) == 8;
    return rmtkernels_cuda_covariance_update(&u, nullptr) == 0;
  }

  // All rows so far and what they weigh now.
  void remember(double decay) {
    for (double& w : weight_) w *= decay;
    for (int64_t i = 0; i < s_.rows; ++i) {
      const double weight = !s_.weighted ? 1 : mask_[i] ? double(weights_[i]) : 0;
      if (weight == 0 || i == s_.poison) continue;
      weight_.push_back(weight);
      for (int64_t j = 0; j < s_.dim; ++j) row_.push_back(get(batch_[i * stride_ + j]));
    }
  }

  bool is_right() const {
    const size_t dim = size_t(s_.dim);
    std::vector<double> mean(dim), exact(dim * dim);
    double total = 0;
    for (size_t r = 0; r < weight_.size(); ++r) {
      total += weight_[r];
      for (size_t j = 0; j < dim; ++j) mean[j] += weight_[r] * row_[r * dim + j];
    }
    for (double& m : mean) m /= total;
    for (size_t r = 0; r < weight_.size(); ++r)
      for (size_t i = 0; i < dim; ++i)
        for (size_t j = 0; j <= i; ++j)
          exact[i * dim + j] += weight_[r] * (row_[r * dim + i] - mean[i]) * (row_[r * dim + j] - mean[j]);
    bool right = std::fabs(totals_[rmtkernels::kTotalWeight] - total) <= 1e-12 * total;
    const double limit = sizeof(T) == 8 ? 1e-13 * (1 + s_.offset) : 1e-6;
    for (size_t i = 0; i < dim; ++i) {
      right = right && std::fabs(mean_[i] - mean[i]) <= 1e-13 * (1 + std::fabs(s_.offset));
      for (size_t j = 0; j < dim; ++j) {
        const double found = double(scatter_[i * dim + j]), size = std::sqrt(exact[i * dim + i] * exact[j * dim + j]);
        right = right && (j > i ? std::isnan(found) : std::fabs(found - exact[i * dim + j]) <= limit * size);
      }
    }
    return right;
  }

  const Scenario s_;
  const int64_t stride_, count_;  // from row to row, and in all
  std::mt19937 random_{7};
  std::unique_ptr<char[]> memory_;
  X* batch_;
  std::unique_ptr<float[]> weights_;
  std::unique_ptr<bool[]> mask_;
  std::unique_ptr<double[]> mean_;
  std::unique_ptr<T[]> scatter_;
  std::unique_ptr<double[]> totals_;
  std::vector<double> weight_, row_;
};

}  // namespace

int main() {
  // name, rows, dim, offset, aligned, weighted, poison. A split has 96 rows at most in these builds, a chunk 64.
  const Scenario few[] = {{"two tiles", 37, 133, 100, false, true, 3}, {"packs", 70, 16, 3, true, false, -1}};
  const Scenario many[] = {{"one column", 3, 1, 0, false, false, 0},
                           {"splits", 200, 24, 1e6, true, true, 199},
                           {"splits of tiles", 130, 131, 0, true, false, -1},
                           {"odd", 135, 67, 10, false, true, -1}};
  bool right = true;
  for (const Scenario& s : few)
    right = Case<bfloat16, float>(s).run() && Case<float16, float>(s).run() && Case<double, float>(s).run() && right;
  right = Case<bfloat16, float>({"splits on tensor cores", 140, 20, 2, true, true, -1}).run() && right;
  for (const Scenario& s : many) right = Case<float, float>(s).run() && Case<float, double>(s).run() && right;
  right = Case<bfloat16, double>(many[3]).run() && Case<double, double>(many[1]).run() && right;
  std::puts(right ? "ok" : "FAILED");
  return right ? 0 : 1;
}
