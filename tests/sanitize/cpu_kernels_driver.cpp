// Runs the CPU kernels of sliding_window, covariance, lanczos and lowrank_linear on odd sizes, two threads at a time,
// without Python: what the sanitizer builds execute. Every buffer is a heap block of the exact size. Exits with 1 if a
// result is wrong.
#include <cmath>
#include <cstdio>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "cpu/kernels.h"
#include "rmtkernels/scalar.h"

namespace rmtkernels {
namespace RMT_ISA {
void load_row(float*, const void*, DType, int64_t, int64_t);
double row_norm(const float*, int64_t);
void dot_rows(double*, const float*, const void*, DType, int64_t, int64_t);
double squared_norm(const void*, DType, int64_t);
void add_rows(double*, const RowList&, int64_t, int64_t);
int64_t panel_width(bool);
void pack_rows(void*, bool, int64_t, const RowList&, const double*, int64_t, int64_t, int64_t);
void add_scatter(void*, const void*, bool, int64_t, int64_t, const PanelBlock&);
void scale_lower(void*, bool, int64_t, double, int64_t, int64_t);
void load_activations(float*, const void*, DType, bool, int64_t, int64_t);
void row_products(const RowProducts&, int64_t, int64_t);
void multiply_f32(const MultiplyArgs&, int64_t, int64_t);
void multiply_f64(const MultiplyArgs&, int64_t, int64_t);
void multiply_gram_f32(const MultiplyArgs&, int64_t, int64_t);
void multiply_gram_f64(const MultiplyArgs&, int64_t, int64_t);
}  // namespace RMT_ISA
}  // namespace rmtkernels

namespace {

using namespace rmtkernels;
namespace isa = rmtkernels::RMT_ISA;

int failures = 0;
std::mt19937 generator(1);

void check(bool right, const char* what, int64_t a, int64_t b) {
  if (right) return;
  std::printf("%s is wrong for %lld, %lld\n", what, static_cast<long long>(a), static_cast<long long>(b));
  ++failures;
}

// 0 .. count - 1 in two parts, cut at a multiple of `grain`, at once.
void in_two_threads(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  const int64_t middle = count / 2 / grain * grain;
  std::thread other([&] { body(0, middle); });
  body(middle, count);
  other.join();
}

// Whole numbers, which every sum below holds exactly in float32: no tolerance is needed.
template <class T>
T whole(int value) {
  return T(value);
}
template <>
bfloat16 whole<bfloat16>(int value) {
  const float wide = float(value);
  uint32_t bits;
  std::memcpy(&bits, &wide, sizeof(bits));
  return {uint16_t(bits >> 16)};
}
template <class T>
std::unique_ptr<T[]> numbers(int64_t count) {
  std::unique_ptr<T[]> values(new T[size_t(count)]);
  for (int64_t i = 0; i < count; ++i) values[size_t(i)] = whole<T>(int(generator() % 7) - 3);
  return values;
}
template <class T>
double as_double(T x) {
  return double(to_float(x));
}
double as_double(double x) { return x; }

template <class T>
constexpr DType kType = sizeof(T) == 8   ? DType::kFloat64
                        : sizeof(T) == 4 ? DType::kFloat32
                                         : DType::kBFloat16;

template <class T>
void lanczos(int64_t rows, int64_t cols, int lanes, bool centred) {
  const int64_t stride = cols + 3, chunk = 24, chunks = (rows + chunk - 1) / chunk;
  const auto matrix = numbers<T>((rows - 1) * stride + cols), block = numbers<T>(8 * cols), mean = numbers<T>(2 * cols);
  const auto out = numbers<T>(lanes * rows), scratch = numbers<T>(chunks * gram_scratch(cols));
  const auto sums = numbers<double>(chunks * cols * 8);
  MultiplyArgs args = {};
  args.matrix = matrix.get(), args.block = block.get(), args.out = out.get(), args.scratch = scratch.get();
  args.mean = centred ? mean.get() : nullptr, args.sums = sums.get();
  args.stride = stride, args.rows = rows, args.cols = cols, args.chunk = chunk, args.lanes = lanes;
  const bool single = sizeof(T) == 4;
  in_two_threads(
      rows, 1, [&](int64_t begin, int64_t end) { (single ? isa::multiply_f32 : isa::multiply_f64)(args, begin, end); });
  in_two_threads(chunks, 1, [&](int64_t begin, int64_t end) {
    (single ? isa::multiply_gram_f32 : isa::multiply_gram_f64)(args, begin, end);
  });
  std::vector<double> gram(size_t(cols * 8));
  for (int64_t i = 0; i < rows; ++i)
    for (int lane = 0; lane < 8; ++lane) {
      double raw = 0, product = 0;
      const auto entry = [&](int64_t j) {
        return double(matrix[i * stride + j]) - (centred ? double(mean[j]) + double(mean[cols + j]) : 0.0);
      };
      for (int64_t j = 0; j < cols; ++j) {
        raw += double(matrix[i * stride + j]) * double(block[8 * j + lane]);
        product += entry(j) * double(block[8 * j + lane]);
      }
      for (int64_t j = 0; j < cols; ++j) gram[size_t(8 * j + lane)] += entry(j) * product;
      if (lane < lanes) check(double(out[lane * rows + i]) == raw, "multiply", rows, cols);
    }
  for (int64_t k = 0; k < cols * 8; ++k) {
    double sum = 0;
    for (int64_t c = 0; c < chunks; ++c) sum += sums[c * cols * 8 + k];
    check(sum == gram[size_t(k)], "multiply_gram", rows, cols);
  }
}

template <class Weight>
void lowrank(int64_t rows, int64_t dim, int64_t out_dim, bool biased) {
  const bool pairs = kType<Weight> == DType::kBFloat16;
  const auto x = numbers<bfloat16>(rows * dim);
  const auto weights = numbers<Weight>(out_dim * dim), bias = numbers<Weight>(out_dim);
  const auto loaded = numbers<float>(rows * dim), out = numbers<float>(rows * out_dim);
  isa::load_activations(loaded.get(), x.get(), DType::kBFloat16, pairs, rows, dim);
  RowProducts args = {loaded.get(), weights.get(), biased ? bias.get() : nullptr,
                      out.get(),    kType<Weight>, DType::kFloat32,
                      rows,         dim,           out_dim};
  in_two_threads(out_dim, 1, [&](int64_t begin, int64_t end) { isa::row_products(args, begin, end); });
  const auto half = numbers<bfloat16>(rows * out_dim);
  args.out = half.get(), args.out_type = DType::kBFloat16;
  in_two_threads(out_dim, 1, [&](int64_t begin, int64_t end) { isa::row_products(args, begin, end); });
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < out_dim; ++j) {
      double sum = biased ? as_double(bias[j]) : 0;
      for (int64_t i = 0; i < dim; ++i) sum += as_double(x[r * dim + i]) * as_double(weights[j * dim + i]);
      check(double(out[r * out_dim + j]) == sum, "row_products", dim, out_dim);
      check(std::fabs(as_double(half[r * out_dim + j]) - sum) <= std::fabs(sum) / 256, "row_products", dim, out_dim);
    }
}

// Whole numbers give exact products; numbers that round pin the order of additions: a row's norm and its product with
// itself are the same bits.
template <class T>
void window(int64_t count, int64_t dim, int64_t stride) {
  const auto rows = numbers<T>(count * dim), row = numbers<T>((dim - 1) * stride + 1);
  const auto x = numbers<float>(dim);
  const auto dots = numbers<double>(count);
  isa::load_row(x.get(), row.get(), kType<T>, stride, dim);
  in_two_threads(count, 1, [&](int64_t begin, int64_t end) {
    isa::dot_rows(dots.get() + begin, x.get(), rows.get() + begin * dim, kType<T>, end - begin, dim);
  });
  for (int64_t j = 0; j < count; ++j) {
    double sum = 0;
    for (int64_t i = 0; i < dim; ++i) sum += as_double(row[i * stride]) * as_double(rows[j * dim + i]);
    check(dots[j] == sum, "dot_rows", count, dim);
  }
  for (int64_t i = 0; i < dim; ++i) x[i] = std::sqrt(float(1 + generator() % 1000));
  double self;
  isa::dot_rows(&self, x.get(), x.get(), DType::kFloat32, 1, dim);
  check(isa::row_norm(x.get(), dim) == self, "row_norm", count, dim);
}

template <class T, class Row>
void covariance(int64_t rows, int64_t dim) {
  const bool is_double = sizeof(T) == 8;
  const int64_t stride = dim + 1, width = isa::panel_width(is_double), panels = (dim + width - 1) / width;
  const int64_t blocks = (rows + kScatterDepth - 1) / kScatterDepth;
  const auto batch = numbers<Row>((rows - 1) * stride + dim);
  const auto mean = numbers<double>(dim), sums = numbers<double>(dim), before = numbers<double>(dim);
  std::copy(sums.get(), sums.get() + dim, before.get());
  const auto packed = numbers<T>(blocks * kScatterDepth * panels * width), scatter = numbers<T>(dim * dim);
  const auto index = numbers<int64_t>(rows);
  const auto weight = numbers<double>(rows);
  for (int64_t i = 0; i < rows; ++i) index[i] = rows - 1 - i, weight[i] = double((i % 2 + 1) * (i % 2 + 1));
  const RowList list = {batch.get(), kType<Row>, stride, index.get(), weight.get(), rows};
  in_two_threads(dim, 1, [&](int64_t begin, int64_t end) { isa::add_rows(sums.get(), list, begin, end); });
  in_two_threads(panels, 1, [&](int64_t begin, int64_t end) {
    isa::pack_rows(packed.get(), is_double, 0, list, mean.get(), dim, begin, end);
  });
  in_two_threads(dim, 1,
                 [&](int64_t begin, int64_t end) { isa::scale_lower(scatter.get(), is_double, dim, 0.0, begin, end); });
  in_two_threads(panels, 1, [&](int64_t begin, int64_t end) {
    isa::add_scatter(scatter.get(), packed.get(), is_double, rows, dim, {begin, end, 0, panels});
  });
  const auto entry = [&](int64_t i, int64_t j) { return as_double(batch[index[i] * stride + j]); };
  for (int64_t a = 0; a < dim; ++a) {
    double sum = before[a], norm = 0;
    for (int64_t i = 0; i < rows; ++i) sum += weight[i] * entry(i, a);
    check(sums[a] == sum, "add_rows", rows, dim);
    for (int64_t j = 0; j < dim; ++j) norm += entry(0, j) * entry(0, j);
    check(isa::squared_norm(batch.get() + index[0] * stride, kType<Row>, dim) == norm, "squared_norm", rows, dim);
    for (int64_t b = 0; b <= a; ++b) {
      double want = 0;
      for (int64_t i = 0; i < rows; ++i) want += weight[i] * (entry(i, a) - mean[a]) * (entry(i, b) - mean[b]);
      check(double(scatter[a * dim + b]) == want, "add_scatter", rows, dim);
    }
  }
}

}  // namespace

int main() {
  for (const int64_t rows : {1, 11, 12, 13, 49})
    for (const int64_t cols : {1, 17, 252, 260})
      for (const int lanes : {1, 8}) {
        lanczos<float>(rows, cols, lanes, lanes == 8);
        lanczos<double>(rows, cols, lanes, lanes == 1);
      }
  for (const int64_t count : {1, 7, 8, 9, 33})
    for (const int64_t dim : {1, 8, 15, 16, 31, 255, 264, 1024, 1303})
      for (const int64_t stride : {1, 3}) {
        window<float>(count, dim, stride);
        window<bfloat16>(count, dim, stride);
      }
  for (const int64_t rows : {1, 2, 3, 4, 7})
    for (const int64_t dim : {0, 1, 8, 15, 16, 31, 40})
      for (const int64_t out_dim : {1, 7, 8, 9, 23}) {
        lowrank<float>(rows, dim, out_dim, dim % 2 == 0);
        lowrank<bfloat16>(rows, dim, out_dim, dim % 2 == 1);
      }
  for (const int64_t rows : {1, 5, 128, 131})
    for (const int64_t dim : {1, 4, 7, 24, 25, 51}) {
      covariance<float, float>(rows, dim);
      covariance<float, bfloat16>(rows, dim);
      covariance<double, double>(rows, dim);
      covariance<double, float>(rows, dim);
    }
  if (failures == 0) std::puts("ok");
  return failures != 0;
}
