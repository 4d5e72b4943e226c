// Runs the lanczos kernels on cases whose answer is known without another factorisation, without Python: what the
// sanitizer builds execute. Every buffer is a heap block of the exact size. Exits with 1 if a result is wrong.
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "cuda/lanczos.h"

namespace {

struct Scenario {
  const char* name;
  int64_t count, size, dim;
  int copies;  // rows at the end that are copies of the first: random rows must take their place
};

template <class T>
class Case {
 public:
  explicit Case(const Scenario& s) : s_(s), rows_(s.count * s.dim), basis_(s.size * s.dim), noise_(s.count * s.dim) {
    std::normal_distribution<double> normal;
    // The basis: some of the unit vectors, so that it is orthonormal to the last bit.
    for (int64_t i = 0; i < s.size; ++i) basis_[i * s.dim + i] = 1;
    for (T& x : rows_) x = T(normal(random_));
    for (T& x : noise_) x = T(normal(random_) / std::sqrt(double(s.dim)));
    for (int i = 0; i < s.copies; ++i)
      for (int64_t j = 0; j < s.dim; ++j) rows_[(s.count - 1 - i) * s.dim + j] = rows_[j];
  }

  bool run() {
    const int64_t needed = rmtkernels::rmtkernels_cuda_lanczos_workspace(s_.count, s_.size, s_.dim);
    std::unique_ptr<T[]> unit(new T[room_ * s_.dim]);
    std::unique_ptr<double[]> triangle(new double[s_.count * s_.count]()), products(new double[s_.count * s_.size]);
    std::unique_ptr<double[]> workspace(new double[needed]);
    const double negligible = sizeof(T) == 4 ? 1e-5 : 1e-14;
    rmtkernels::LanczosRows l{};
    l.rows = rows_.data();
    l.basis = basis_.data();
    l.noise = noise_.data();
    l.negligible = &negligible;
    l.unit = unit.get();
    l.triangle = triangle.get();
    l.products = products.get();
    l.workspace = workspace.get();
    l.count = s_.count;
    l.size = s_.size;
    l.dim = s_.dim;
    l.shift = 3 % s_.dim;
    l.is_double = sizeof(T) == sizeof(double);
    if (rmtkernels::rmtkernels_cuda_lanczos_orthonormalize(&l, nullptr) != 0) return fail("the launch failed");
    return check(unit.get(), triangle.get(), products.get());
  }

 private:
  bool fail(const char* what) const {
    std::printf("%s, %d bytes: %s\n", s_.name, int(sizeof(T)), what);
    return false;
  }

  bool check(const T* unit, const double* triangle, const double* products) const {
    const double rounding = sizeof(T) == 4 ? 1e-6 : 1e-13;
    for (int64_t r = 0; r < s_.count; ++r)
      for (int64_t i = 0; i < s_.size; ++i)
        if (products[r * s_.size + i] != rows_[r * s_.dim + i]) return fail("wrong products");
    for (int64_t r = 0; r < room_; ++r) {
      for (int64_t i = 0; i < s_.size; ++i)
        if (!(std::fabs(double(unit[r * s_.dim + i])) <= rounding)) return fail("not orthogonal to the basis");
      for (int64_t q = 0; q <= r; ++q) {
        double product = 0;
        for (int64_t j = 0; j < s_.dim; ++j) product += double(unit[r * s_.dim + j]) * unit[q * s_.dim + j];
        if (!(std::fabs(product - (q == r)) <= rounding)) return fail("not orthonormal");
      }
    }
    for (int64_t r = 0; r < s_.count; ++r) {
      for (int64_t j = s_.size; j < s_.dim; ++j) {
        double sum = 0;
        for (int64_t q = 0; q < room_; ++q) sum += triangle[q * s_.count + r] * unit[q * s_.dim + j];
        if (!(std::fabs(sum - rows_[r * s_.dim + j]) <= 20 * rounding))
          return fail("the triangle does not give the rows");
      }
    }
    return true;
  }

  const Scenario s_;
  const int64_t room_ = s_.dim - s_.size < s_.count ? s_.dim - s_.size : s_.count;
  std::mt19937 random_{7};
  std::vector<T> rows_, basis_, noise_;
};

}  // namespace

int main() {
  const Scenario scenarios[] = {
      // name, count, size, dim, copies
      {"no basis", 3, 0, 70, 0},
      {"an odd width", 8, 9, 131, 0},
      {"rows that depend on others", 8, 5, 68, 2},
      {"two groups", 10, 4, 66, 1},
      {"little room", 8, 11, 13, 0},
      {"one column", 1, 0, 1, 0},
      {"more chunks than parts", 2, 3, 329, 0},
  };
  bool right = true;
  for (const Scenario& s : scenarios) right = Case<float>(s).run() && Case<double>(s).run() && right;
  std::puts(right ? "ok" : "FAILED");
  return right ? 0 : 1;
}
