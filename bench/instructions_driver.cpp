// One CPU kernel, once, on fixed numbers: what bench/instructions.py has valgrind count. The name of the kernel is the
// only argument; only what measured() runs is counted.
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "rmtkernels/scalar.h"

namespace rmtkernels {
namespace RMT_ISA {
void load_row(float*, const void*, DType, int64_t, int64_t);
double row_norm(const float*, int64_t);
void dot_rows(double*, const float*, const void*, DType, int64_t, int64_t);
void eigvalsh_f32(const float*, float*, int64_t, int64_t, int64_t);
void descriptors(const DescriptorArgs&, int64_t, int64_t);
double squared_norm(const void*, DType, int64_t);
void add_rows(double*, const RowList&, int64_t, int64_t);
int64_t panel_width(bool);
void pack_rows(void*, bool, int64_t, const RowList&, const double*, int64_t, int64_t, int64_t);
void add_scatter(void*, const void*, bool, int64_t, int64_t, const PanelBlock&);
void load_activations(float*, const void*, DType, bool, int64_t, int64_t);
void row_products(const RowProducts&, int64_t, int64_t);
void multiply_f32(const MultiplyArgs&, int64_t, int64_t);
void multiply_gram_f32(const MultiplyArgs&, int64_t, int64_t);
}  // namespace RMT_ISA
}  // namespace rmtkernels

using namespace rmtkernels;
namespace isa = rmtkernels::RMT_ISA;

// What valgrind toggles at, also where the compiler clones it. The empty statement keeps the call from becoming a jump,
// which would end it at once.
extern "C" __attribute__((noinline)) void measured(const std::function<void()>& kernel) {
  kernel();
  asm volatile("");
}

namespace {

double sink = 0;  // what would otherwise be thrown away

// Raw bits of the generator: the standard's distributions may differ between libraries, the generator may not.
template <class T>
std::vector<T> numbers(int64_t count) {
  std::mt19937 generator(1);
  std::vector<T> values(static_cast<size_t>(count));
  for (T& value : values) {
    const float number = float(generator() >> 8) / float(1 << 23) - 1.0f;
    if constexpr (sizeof(T) == 2) {
      uint32_t bits;
      std::memcpy(&bits, &number, sizeof(bits));
      value = {uint16_t(bits >> 16)};
    } else {
      value = T(number);
    }
  }
  return values;
}

// Gram matrices of `count` windows of n rows, each four times as wide.
std::vector<float> gram_matrices(int64_t count, int64_t n) {
  const int64_t dim = 4 * n;
  const auto rows = numbers<float>(count * n * dim);
  std::vector<float> gram(size_t(count * n * n));
  for (int64_t m = 0; m < count; ++m)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j)
        for (int64_t k = 0; k < dim; ++k)
          gram[size_t((m * n + i) * n + j)] +=
              rows[size_t((m * n + i) * dim + k)] * rows[size_t((m * n + j) * dim + k)];
  return gram;
}

template <class T>
void push(DType type, int64_t layers, int64_t window, int64_t dim) {
  const auto ring = numbers<T>(window * dim);
  std::vector<float> x(static_cast<size_t>(dim));
  std::vector<double> dots(static_cast<size_t>(window));
  measured([&] {
    for (int64_t layer = 0; layer < layers; ++layer) {
      isa::load_row(x.data(), ring.data(), type, 1, dim);
      sink += isa::row_norm(x.data(), dim);
      isa::dot_rows(dots.data(), x.data(), ring.data(), type, window, dim);
    }
  });
  sink += dots[0];
}

void eigvalsh(int64_t count, int64_t n) {
  const auto gram = gram_matrices(count, n);
  std::vector<float> values(size_t(count * n));
  measured([&] { isa::eigvalsh_f32(gram.data(), values.data(), n, 0, count); });
  sink += double(values[0]);
}

void descriptors(int64_t layers, int64_t n) {
  const auto gram = gram_matrices(layers, n);
  const int64_t seen = n;
  // Ones instead of the laws: the arithmetic is the same.
  const std::vector<double> laws(size_t(kTracyWidomPoints + (n + 1) * (kLawCells + n)), 1.0);
  std::vector<float> found(size_t(layers * kDescriptors)), values(size_t(layers * n));
  DescriptorArgs args = {};
  args.gram = gram.data(), args.seen = &seen, args.laws = laws.data();
  args.descriptors = found.data(), args.eigenvalues = values.data();
  args.seen_stride = 1;
  args.descriptors_stride[0] = args.descriptors_stride[1] = kDescriptors;
  args.eigenvalues_stride[0] = args.eigenvalues_stride[1] = n;
  args.layers = layers, args.batch = 1, args.window = n, args.dim = 4 * n;
  args.joint = kPerLayer, args.noise = kNoiseMedian, args.center = true, args.normalize = true;
  measured([&] { isa::descriptors(args, 0, layers); });
  sink += double(found[0]);
}

void covariance(int64_t rows, int64_t dim) {
  const auto batch = numbers<float>(rows * dim);
  std::vector<int64_t> index(static_cast<size_t>(rows));
  for (int64_t i = 0; i < rows; ++i) index[size_t(i)] = i;
  const std::vector<double> weight(size_t(rows), 1.0);
  std::vector<double> sums(static_cast<size_t>(dim));
  const int64_t width = isa::panel_width(false), panels = (dim + width - 1) / width;
  const int64_t blocks = (rows + kScatterDepth - 1) / kScatterDepth;
  std::vector<float> packed(size_t(blocks * kScatterDepth * panels * width)), scatter(size_t(dim * dim));
  const RowList list = {batch.data(), DType::kFloat32, dim, index.data(), weight.data(), rows};
  measured([&] {
    for (int64_t i = 0; i < rows; ++i) sink += isa::squared_norm(batch.data() + i * dim, DType::kFloat32, dim);
    isa::add_rows(sums.data(), list, 0, dim);
    isa::pack_rows(packed.data(), false, 0, list, sums.data(), dim, 0, panels);
    isa::add_scatter(scatter.data(), packed.data(), false, rows, dim, {0, panels, 0, panels});
  });
  sink += double(scatter[0]);
}

void multiply(int64_t rows, int64_t cols, bool gram) {
  const auto matrix = numbers<float>(rows * cols), block = numbers<float>(8 * cols);
  std::vector<float> out(size_t(8 * rows)), scratch(size_t(gram_scratch(cols)));
  std::vector<double> sums(size_t(8 * cols));
  MultiplyArgs args = {};
  args.matrix = matrix.data(), args.block = block.data(), args.out = out.data();
  args.scratch = scratch.data(), args.sums = sums.data();
  args.stride = cols, args.rows = rows, args.cols = cols, args.chunk = rows, args.lanes = 8;
  measured([&] { gram ? isa::multiply_gram_f32(args, 0, 1) : isa::multiply_f32(args, 0, rows); });
  sink += double(out[0]) + sums[0];
}

template <class Weight>
void lowrank(DType type, int64_t dim, int64_t k) {
  const auto x = numbers<float>(dim);
  const auto down = numbers<Weight>(k * dim), up = numbers<Weight>(dim * k);
  std::vector<float> loaded(static_cast<size_t>(dim)), middle(static_cast<size_t>(k)), out(static_cast<size_t>(dim));
  measured([&] {
    isa::load_activations(loaded.data(), x.data(), DType::kFloat32, type == DType::kBFloat16, 1, dim);
    isa::row_products({loaded.data(), down.data(), nullptr, middle.data(), type, DType::kFloat32, 1, dim, k}, 0, k);
    isa::row_products({middle.data(), up.data(), nullptr, out.data(), type, DType::kFloat32, 1, k, dim}, 0, dim);
  });
  sink += double(out[0]);
}

const std::map<std::string, std::function<void()>> kKernels = {
    {"sliding_window.push_float32", [] { push<float>(DType::kFloat32, 10, 32, 576); }},
    {"sliding_window.push_bfloat16", [] { push<bfloat16>(DType::kBFloat16, 1, 32, 4096); }},
    {"spectrum.eigvalsh", [] { eigvalsh(8, 64); }},
    {"spectrum.descriptors", [] { descriptors(10, 32); }},
    {"covariance.update", [] { covariance(256, 256); }},
    {"lanczos.multiply", [] { multiply(512, 512, false); }},
    {"lanczos.multiply_gram", [] { multiply(252, 512, true); }},
    {"lowrank_linear.float32", [] { lowrank<float>(DType::kFloat32, 384, 64); }},
    {"lowrank_linear.bfloat16", [] { lowrank<bfloat16>(DType::kBFloat16, 384, 64); }},
};

}  // namespace

int main(int argc, char** argv) {
  const auto found = argc == 2 ? kKernels.find(argv[1]) : kKernels.end();
  if (found == kKernels.end()) {
    for (const auto& [name, run] : kKernels) std::puts(name.c_str());
    return argc != 1;
  }
  found->second();
  return sink == 0.125;  // never: keeps the sums alive
}
