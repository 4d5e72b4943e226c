// Runs the spectrum kernels without Python: what the sanitizer builds execute. Expected eigenvalues come from Jacobi
// rotations, descriptors from the shared code on one thread. Every buffer is a heap block of the exact size. The
// argument is the largest matrix. Exits with 1 if a result is wrong.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "cuda/spectrum.h"

namespace {

using Matrix = std::vector<double>;

// Cyclic Jacobi. Eigenvalues, ascending.
std::vector<double> eigenvalues(Matrix a, int n) {
  for (int sweep = 0; sweep < 30; ++sweep)
    for (int p = 0; p < n; ++p)
      for (int q = p + 1; q < n; ++q) {
        if (a[p * n + q] == 0) continue;
        const double angle = 0.5 * std::atan2(2 * a[p * n + q], a[q * n + q] - a[p * n + p]);
        const double c = std::cos(angle), s = std::sin(angle);
        for (int k = 0; k < n; ++k) {
          const double x = a[k * n + p], y = a[k * n + q];
          a[k * n + p] = c * x - s * y, a[k * n + q] = s * x + c * y;
        }
        for (int k = 0; k < n; ++k) {
          const double x = a[p * n + k], y = a[q * n + k];
          a[p * n + k] = c * x - s * y, a[q * n + k] = s * x + c * y;
        }
      }
  std::vector<double> values(n);
  for (int i = 0; i < n; ++i) values[i] = a[i * n + i];
  std::sort(values.begin(), values.end());
  return values;
}

bool fail(const char* what, int n, double got, double want) {
  std::printf("%s of %d rows: %.9g, not %.9g\n", what, n, got, want);
  return false;
}

// Products of `rows` random rows of width `dim`, the first of them `loud` times longer.
std::vector<float> random_gram(int rows, int dim, double loud, std::mt19937& random) {
  std::vector<double> x(size_t(rows) * dim);
  for (size_t i = 0; i < x.size(); ++i)
    x[i] = std::normal_distribution<double>()(random) * (i < size_t(dim) ? loud : 1);
  std::vector<float> gram(size_t(rows) * rows);
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < rows; ++j) {
      double dot = 0;
      for (int k = 0; k < dim; ++k) dot += x[i * dim + k] * x[j * dim + k];
      gram[i * rows + j] = float(dot);
    }
  return gram;
}

template <class T>
bool check_eigvalsh(int n, double loud) {
  constexpr int kCount = 3;
  std::mt19937 random(n);
  std::unique_ptr<T[]> matrices(new T[kCount * n * n]), values(new T[kCount * n]);
  for (int b = 0; b < kCount; ++b) {
    const std::vector<float> gram = random_gram(n, n + 1 - b, loud, random);
    // The loud row is the last: the matrix has to be sorted. The second matrix has blocks of two: nothing to reflect.
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < n; ++j)
        matrices[(b * n + i) * n + j] = b == 1 && i / 2 != j / 2 ? T(0) : T(gram[(n - 1 - i) * n + (n - 1 - j)]);
  }
  if (rmtkernels::rmtkernels_cuda_spectrum_eigvalsh(matrices.get(), values.get(), sizeof(T) == 8, n, kCount, nullptr) !=
      0)
    return fail("launch", n, 1, 0);
  for (int b = 0; b < kCount; ++b) {
    const T* matrix = matrices.get() + b * n * n;
    const std::vector<double> want = eigenvalues(Matrix(matrix, matrix + n * n), n);
    const double largest = std::max(std::fabs(want.front()), std::fabs(want.back()));
    for (int i = 0; i < n; ++i) {
      const double got = values[b * n + i], bound = 1e-14 * largest + (sizeof(T) == 4 ? 1e-7 * std::fabs(want[i]) : 0);
      if (!(std::fabs(got - want[i]) <= bound)) return fail("eigenvalue", n, got, want[i]);
    }
  }
  return true;
}

// Two layers, three sequences: full, filling up, empty. No joining and no scaling; what else there is, Python tests.
class Descriptors {
 public:
  Descriptors(int window, bool center, int joint, bool normalize) : window_(window), random_(window) {
    args_.layers = kLayers, args_.batch = kBatch, args_.window = window, args_.dim = kDim;
    args_.joint = joint, args_.noise = rmtkernels::kNoiseMedian, args_.center = center, args_.normalize = normalize;
    gram_.reset(new float[kLayers * kBatch * window * window]);
    for (int i = 0; i < kLayers * kBatch; ++i) {
      const std::vector<float> one = random_gram(window, kDim, 3, random_);
      std::copy(one.begin(), one.end(), gram_.get() + i * one.size());
    }
    seen_.reset(new int64_t[kBatch]{window + 1, (window + 1) / 2, 0});
    make_laws();
    out_.reset(new float[kLayers * kBatch * rmtkernels::kDescriptors]);
    eigenvalues_.reset(new float[kLayers * kBatch * window]);
    args_.gram = gram_.get(), args_.seen = seen_.get(), args_.laws = laws_.get();
    args_.descriptors = out_.get(), args_.eigenvalues = eigenvalues_.get(), args_.seen_stride = 1;
    args_.descriptors_stride[0] = kBatch * rmtkernels::kDescriptors,
    args_.descriptors_stride[1] = rmtkernels::kDescriptors;
    args_.eigenvalues_stride[0] = kBatch * window, args_.eigenvalues_stride[1] = window;
  }

  bool run() {
    if (rmtkernels::rmtkernels_cuda_spectrum_descriptors(&args_, nullptr) != 0) return fail("launch", window_, 1, 0);
    if (args_.joint != rmtkernels::kPerLayer || args_.normalize) return finite();
    for (int layer = 0; layer < kLayers; ++layer)
      for (int b = 0; b < kBatch; ++b)
        if (!window_is_right(layer * kBatch + b, int(std::min<int64_t>(seen_[b], window_)))) return false;
    return true;
  }

 private:
  static constexpr int kLayers = 2, kBatch = 3, kDim = 7;

  // Of the right size and smooth, but no law: numbers to look up.
  void make_laws() {
    const int64_t size = rmtkernels::law_table_size(window_);
    laws_.reset(new double[size]);
    for (int64_t i = 0; i < size; ++i) laws_[i] = 1 + 0.5 * std::sin(0.01 * double(i));
  }

  bool finite() const {
    for (int i = 0; i < (args_.joint ? 1 : kLayers) * kBatch * rmtkernels::kDescriptors; ++i)
      if (!std::isfinite(out_[i])) return fail("descriptor", window_, out_[i], 0);
    return true;
  }

  bool window_is_right(int problem, int rows) const {
    const int n = rmtkernels::degrees_of_freedom(rows, args_.center);
    const float* gram = gram_.get() + problem * window_ * window_;
    Matrix a(rows * rows);
    std::vector<double> mean(rows);
    double total = 0;
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < rows; ++j) mean[i] += gram[i * window_ + j] / double(rows), total += gram[i * window_ + j];
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < rows; ++j)
        a[i * rows + j] = gram[i * window_ + j] + (args_.center ? total / rows / rows - mean[i] - mean[j] : 0.0);
    std::vector<double> lambda = eigenvalues(a, rows);
    std::sort(lambda.begin(), lambda.end(), std::greater<double>());
    lambda.resize(n);
    for (double& x : lambda) x = x < 0 ? 0 : x / kDim;
    const float* got = eigenvalues_.get() + problem * window_;
    for (int i = 0; i < window_; ++i) {
      const double want = i < n ? lambda[i] : 0;
      if (!(std::fabs(got[i] - want) <= 1e-7 * want + 1e-13 * (n > 0 ? lambda[0] : 0)))
        return fail("lambda", rows, got[i], want);
    }
    return descriptors_are_right(problem, rows, lambda, total);
  }

  bool descriptors_are_right(int problem, int rows, const std::vector<double>& lambda, double total) const {
    const float *gram = gram_.get() + problem * window_ * window_,
                *out = out_.get() + problem * rmtkernels::kDescriptors;
    double energy = 0, trace = 0;
    for (int i = 0; i < rows; ++i) energy += gram[i * window_ + i];
    for (double x : lambda) trace += x;
    const rmtkernels::WindowFacts facts{std::log(trace > 0 ? trace : rmtkernels::kSmallestTrace),
                                        rows > 0 ? total / (rows * energy) : 0.0, out[rmtkernels::kOverlap]};
    const int n = int(lambda.size());
    float want[rmtkernels::kDescriptors];
    rmtkernels::spectral_descriptors(lambda.data(), n, kDim, window_, args_.noise, args_.laws, facts, want);
    for (int i = 0; i < rmtkernels::kDescriptors; ++i)
      if (!(std::fabs(out[i] - want[i]) <= 1e-5 * (1 + std::fabs(want[i]))))
        return fail("descriptor", rows, out[i], want[i]);
    return true;
  }

  const int window_;
  std::mt19937 random_;
  rmtkernels::DescriptorArgs args_{};
  std::unique_ptr<float[]> gram_, out_, eigenvalues_;
  std::unique_ptr<int64_t[]> seen_;
  std::unique_ptr<double[]> laws_;
};

}  // namespace

int main(int argc, char** argv) {
  const int largest = argc > 1 ? std::atoi(argv[1]) : 9;
  bool right = true;
  for (int n : {1, 2, 5, largest}) {
    right = check_eigvalsh<double>(n, 1) && right;
    right = check_eigvalsh<float>(n, 1e3) && right;
    right = Descriptors(n, true, rmtkernels::kPerLayer, false).run() && right;
  }
  right = Descriptors(largest, false, rmtkernels::kPerLayer, false).run() && right;
  right = Descriptors(largest, true, rmtkernels::kJointTrace, true).run() && right;
  std::puts(right ? "ok" : "FAILED");
  return right ? 0 : 1;
}
