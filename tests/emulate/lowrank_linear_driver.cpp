// Runs the lowrank_linear kernels against a double precision reference of its own, without Python: what the sanitizer
// builds execute. Every buffer is a heap block of the exact size. Exits with 1 if a result is wrong.
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <random>
#include <type_traits>

#include "cuda/lowrank_linear.h"

namespace {

using rmtkernels::bfloat16;
using rmtkernels::ElementType;
using rmtkernels::float16;
using rmtkernels::to_float;

struct Scenario {
  const char* name;
  int64_t rows, d_in, k, d_out;
  int shift;  // of every buffer, in elements; of the activations, half of it
  bool bias;
};

template <class T>
constexpr ElementType kType = std::is_same_v<T, float>      ? ElementType::kFloat32
                              : std::is_same_v<T, bfloat16> ? ElementType::kBFloat16
                                                            : ElementType::kFloat16;
template <class T>
constexpr double kRounding = std::is_same_v<T, float>      ? 0
                             : std::is_same_v<T, bfloat16> ? 1 / 256.
                                                           : 1 / 2048.;

// Numbers in a heap block of the exact size, the first `shift` of which nobody uses.
template <class T>
class Numbers {
 public:
  Numbers(int64_t count, int shift, std::mt19937* random) : count_(count), shift_(shift), data_(new T[count + shift]) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count + shift; ++i)
      rmtkernels::round_to(random ? normal(*random) : std::numeric_limits<float>::quiet_NaN(), &data_[i]);
  }
  T* data() const { return data_.get() + shift_; }
  double operator[](int64_t i) const { return to_float(data()[i]); }

 private:
  int64_t count_;
  int shift_;
  std::unique_ptr<T[]> data_;
};

template <class A, class W>
class Case {
 public:
  explicit Case(const Scenario& s)
      : s_(s),
        x_(s.rows * s.d_in, s.shift / 2, &random_),
        down_(s.k * s.d_in, s.shift, &random_),
        up_(s.d_out * s.k, s.shift, &random_),
        bias_(s.d_out, s.shift, &random_),
        out_(s.rows * s.d_out, s.shift, nullptr),
        hidden_(s.rows * s.k, s.shift / 2, nullptr) {}

  bool run() const {
    rmtkernels::LowrankLinear layer{};
    layer.x = x_.data();
    layer.down = down_.data();
    layer.up = up_.data();
    layer.bias = s_.bias ? bias_.data() : nullptr;
    layer.out = out_.data();
    layer.hidden = hidden_.data();
    layer.rows = s_.rows;
    layer.d_in = s_.d_in;
    layer.k = s_.k;
    layer.d_out = s_.d_out;
    layer.type = kType<A>;
    layer.weight_type = kType<W>;
    if (rmtkernels_cuda_lowrank_linear(&layer, nullptr) != 0) return fail("the launch failed");
    for (int64_t r = 0; r < s_.rows; ++r)
      for (int64_t j = 0; j < s_.d_out; ++j)
        if (!is_right(r, j)) return fail("wrong result");
    return true;
  }

 private:
  bool fail(const char* what) const {
    std::printf("%s, types %d %d: %s\n", s_.name, int(kType<A>), int(kType<W>), what);
    return false;
  }

  bool is_right(int64_t r, int64_t j) const {
    double exact = s_.bias ? bias_[j] : 0, size = std::fabs(exact);
    for (int64_t c = 0; c < s_.k; ++c) {
      double hidden = 0, hidden_size = 0;
      for (int64_t i = 0; i < s_.d_in; ++i) {
        const double product = x_[r * s_.d_in + i] * down_[c * s_.d_in + i];
        hidden += product;
        hidden_size += std::fabs(product);
      }
      exact += hidden * up_[j * s_.k + c];
      size += hidden_size * std::fabs(up_[j * s_.k + c]);
    }
    return std::fabs(out_[r * s_.d_out + j] - exact) <= 1e-6 * size + kRounding<A> * std::fabs(exact);
  }

  const Scenario s_;
  std::mt19937 random_{7};
  Numbers<A> x_;
  Numbers<W> down_, up_, bias_;
  Numbers<A> out_;
  Numbers<float> hidden_;
};

}  // namespace

int main() {
  const Scenario scenarios[] = {
      // name, rows, d_in, k, d_out, shift, bias
      {"one row of packs", 1, 64, 16, 70, 0, true},         {"odd widths", 3, 41, 9, 35, 0, true},
      {"weights not aligned", 2, 48, 8, 5, 1, false},       {"nothing aligned", 2, 48, 8, 5, 2, false},
      {"a warp to a sum", 5, 136, 3, 7, 0, true},           {"a block to a sum", 9, 520, 2, 3, 0, false},
      {"more rows than a tile has", 17, 24, 8, 3, 0, true}, {"no rank", 2, 5, 0, 4, 0, true},
  };
  bool right = true;
  for (const Scenario& s : scenarios)
    right = Case<float, float>(s).run() && Case<float, bfloat16>(s).run() && Case<bfloat16, float>(s).run() &&
            Case<bfloat16, bfloat16>(s).run() && Case<float16, float16>(s).run() && right;
  std::puts(right ? "ok" : "FAILED");
  return right ? 0 : 1;
}
