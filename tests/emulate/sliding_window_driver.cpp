// Runs the sliding_window kernels against a double precision reference of its own, without Python: what the sanitizer
// builds execute. Every buffer is a heap block of the exact size. Exits with 1 if a result is wrong.
#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "cuda/sliding_window.h"
#include "rmtkernels/scalar.h"
#include "rmtkernels/sliding_window.h"

namespace {

using rmtkernels::bfloat16;
using rmtkernels::float16;
using rmtkernels::RowType;
using rmtkernels::to_float;

struct Scenario {
  const char* name;
  int64_t layers, batch, steps, window, dim, dim_stride, shift;  // shift: of the first row, in elements
  bool masked, bad_rows;
};

template <class T>
struct Values;
template <>
struct Values<float> {
  static constexpr RowType kType = RowType::kFloat32;
  static float any(std::mt19937& random) { return std::normal_distribution<float>()(random); }
  static float not_a_number() { return std::numeric_limits<float>::quiet_NaN(); }
};
template <>
struct Values<bfloat16> {
  static constexpr RowType kType = RowType::kBFloat16;
  static bfloat16 any(std::mt19937& random) {  // any sign and mantissa, magnitude 2^-6 to 2
    return {uint16_t((random() & 0x807f) | ((121 + random() % 7) << 7))};
  }
  static bfloat16 not_a_number() { return {0x7fc0}; }
};
template <>
struct Values<float16> {
  static constexpr RowType kType = RowType::kFloat16;
  static float16 any(std::mt19937& random) { return {uint16_t((random() & 0x83ff) | ((9 + random() % 7) << 10))}; }
  static float16 not_a_number() { return {0x7e00}; }
};

template <class T>
class Case {
 public:
  explicit Case(const Scenario& scenario)
      : s_(scenario),
        ring_(new T[s_.layers * s_.batch * s_.window * s_.dim]),
        gram_(s_.layers * s_.batch * s_.window * s_.window, kUntouched),
        seen_(s_.batch * rmtkernels::kSeenColumns, 0),
        expected_seen_(seen_) {
    expected_ring_.assign(s_.layers * s_.batch * s_.window * s_.dim, kUntouched);
    for (int64_t i = 0; i < int64_t(expected_ring_.size()); ++i) ring_[i] = Values<T>::not_a_number();
  }

  bool run() {
    offer_rows();
    rmtkernels::WindowPush push{};
    push.ring = ring_.get();
    push.gram = gram_.data();
    push.seen = seen_.data();
    push.rows = offered_.data();
    push.mask = s_.masked ? mask_.get() : nullptr;
    push.mask_batch_stride = s_.steps;
    push.mask_step_stride = 1;
    push.layers = s_.layers;
    push.batch = s_.batch;
    push.steps = s_.steps;
    push.window = s_.window;
    push.dim = s_.dim;
    push.type = Values<T>::kType;
    if (rmtkernels_cuda_window_push(&push, nullptr) != 0) return fail("the launch failed");
    for (int64_t step = 0; step < s_.steps; ++step)
      for (int64_t b = 0; b < s_.batch; ++b) expect(step, b);
    return seen_ == expected_seen_ ? compare() : fail("wrong counters");
  }

 private:
  static constexpr double kUntouched = std::numeric_limits<double>::quiet_NaN();

  bool fail(const char* what) const {
    std::printf("%s, type %d: %s\n", s_.name, int(Values<T>::kType), what);
    return false;
  }

  // Even layers hold (batch, steps, dim), odd ones (steps, batch, dim), so strides differ from layer to layer.
  void offer_rows() {
    const int64_t elements = s_.shift + (s_.batch * s_.steps * s_.dim - 1) * s_.dim_stride + 1;
    for (int64_t l = 0; l < s_.layers; ++l) {
      rows_.emplace_back(new T[elements]);
      for (int64_t i = 0; i < elements; ++i) rows_[l][i] = Values<T>::any(random_);
      const int64_t row = s_.dim * s_.dim_stride;
      offered_.push_back(
          {rows_[l].get() + s_.shift, l % 2 ? row : s_.steps * row, l % 2 ? s_.batch * row : row, s_.dim_stride});
    }
    if (s_.bad_rows)  // the last element of the last layer, in every third step of every other sequence
      for (int64_t step = 1; step < s_.steps; step += 3)
        for (int64_t b = 0; b < s_.batch; b += 2)
          row_at(s_.layers - 1, step, b)[(s_.dim - 1) * s_.dim_stride] = Values<T>::not_a_number();
    mask_.reset(new bool[s_.batch * s_.steps]);
    for (int64_t i = 0; i < s_.batch * s_.steps; ++i) mask_[i] = i % 4 != 2;
  }

  T* row_at(int64_t l, int64_t step, int64_t b) {
    return rows_[l].get() + s_.shift + b * offered_[l].batch_stride + step * offered_[l].step_stride;
  }

  void expect(int64_t step, int64_t b) {
    int64_t* seen = &expected_seen_[b * rmtkernels::kSeenColumns];
    seen[rmtkernels::kSeenSlot] = -1;
    if (s_.masked && !mask_[b * s_.steps + step]) return;
    if (s_.bad_rows && step % 3 == 1 && b % 2 == 0) {
      ++seen[rmtkernels::kSeenRejected];
      return;
    }
    const int64_t slot = seen[rmtkernels::kSeenRows]++ % s_.window;
    seen[rmtkernels::kSeenSlot] = slot;
    for (int64_t l = 0; l < s_.layers; ++l)
      for (int64_t i = 0; i < s_.dim; ++i)
        expected_ring_[((l * s_.batch + b) * s_.window + slot) * s_.dim + i] =
            to_float(row_at(l, step, b)[i * s_.dim_stride]);
  }

  bool compare() const {
    for (int64_t stream = 0; stream < s_.layers * s_.batch; ++stream) {
      const double* ring = &expected_ring_[stream * s_.window * s_.dim];
      for (int64_t i = 0; i < s_.window * s_.dim; ++i) {
        const double got = to_float(ring_[stream * s_.window * s_.dim + i]);
        if (got != ring[i] && !(std::isnan(got) && std::isnan(ring[i]))) return fail("wrong ring");
      }
      for (int64_t i = 0; i < s_.window; ++i)
        for (int64_t j = 0; j < s_.window; ++j)
          if (!entry_is_right(stream, ring, i, j)) return fail("wrong Gram matrix");
    }
    return true;
  }

  // A slot that was never used leaves NaN in the reference; there the kernel must have left the NaN that was put there.
  bool entry_is_right(int64_t stream, const double* ring, int64_t i, int64_t j) const {
    double dot = 0, norm_i = 0, norm_j = 0;
    for (int64_t k = 0; k < s_.dim; ++k) {
      const double x = ring[i * s_.dim + k], y = ring[j * s_.dim + k];
      dot += x * y;
      norm_i += x * x;
      norm_j += y * y;
    }
    const float got = gram_[(stream * s_.window + i) * s_.window + j];
    return std::isnan(dot) ? std::isnan(got) : std::fabs(got - dot) <= 1e-6 * std::sqrt(norm_i * norm_j);
  }

  const Scenario s_;
  std::mt19937 random_{7};
  std::unique_ptr<T[]> ring_;
  std::vector<float> gram_;
  std::vector<int64_t> seen_, expected_seen_;
  std::vector<double> expected_ring_;
  std::vector<std::unique_ptr<T[]>> rows_;
  std::vector<rmtkernels::OfferedRows> offered_;
  std::unique_ptr<bool[]> mask_;
};

struct Sequences {
  const char* name;
  int64_t batch, steps, dim, window, stride, dim_stride, shift;  // shift: of the first row, in elements
  bool masked, bad_rows, far;                                    // far: 2^31 elements from row to row
};

// Memory that nobody has touched, of which what is used becomes real.
template <class T>
struct Reserved {
  T* data;
  size_t bytes;
  explicit Reserved(int64_t elements) : data(nullptr), bytes(size_t(elements) * sizeof(T)) {
    void* const found =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) std::perror("mmap"), std::exit(1);
    data = static_cast<T*>(found);
  }
  Reserved(const Reserved&) = delete;
  ~Reserved() { munmap(data, bytes); }
};

// window_gram: rows of a sequence lie behind one another, and so do sequences.
template <class T>
class GramCase {
 public:
  explicit GramCase(const Sequences& s)
      : s_(s),
        windows_(s.steps / s.stride),
        step_stride_(s.far ? (int64_t(1) << 31) + 8 : s.dim * s.dim_stride),
        elements_(s.shift + (s.batch * s.steps - 1) * step_stride_ + (s.dim - 1) * s.dim_stride + 1),
        far_rows_(s.far ? elements_ : 1),
        near_rows_(s.far ? nullptr : new T[elements_]),
        rows_(s.far ? far_rows_.data : near_rows_.get()),
        mask_(new bool[s.batch * s.steps]),
        gram_(new float[s.batch * windows_ * s.window * s.window]),
        seen_(new int64_t[s.batch * windows_]) {
    for (int64_t i = 0; i < s.batch * s.steps * s.dim; ++i) *element(0, i / s.dim, i % s.dim) = Values<T>::any(random_);
    for (int64_t i = 0; i < s.batch * s.steps; ++i) mask_[i] = i % 4 != 2;
    for (int64_t step = 1; s.bad_rows && step < s.steps; step += 5)
      *element(s.batch - 1, step, s.dim - 1) = Values<T>::not_a_number();
  }

  bool run() {
    const int64_t bytes = rmtkernels::rmtkernels_cuda_window_gram_workspace(s_.batch, s_.steps, s_.dim, s_.window);
    const std::unique_ptr<float[]> workspace(new float[size_t(bytes) / 4]);
    for (int64_t i = 0; i < bytes / 4; ++i) workspace[i] = std::numeric_limits<float>::quiet_NaN();
    rmtkernels::WindowGram call{};
    call.rows.data = rows_ + s_.shift;
    call.rows.mask = s_.masked ? mask_.get() : nullptr;
    call.rows.batch_stride = s_.steps * step_stride_;
    call.rows.step_stride = step_stride_;
    call.rows.dim_stride = s_.dim_stride;
    call.rows.mask_batch_stride = s_.steps;
    call.rows.mask_step_stride = 1;
    call.rows.batch = s_.batch;
    call.rows.steps = s_.steps;
    call.rows.dim = s_.dim;
    call.rows.window = s_.window;
    call.gram = gram_.get();
    call.seen = seen_.get();
    call.workspace = workspace.get();
    call.stride = s_.stride;
    call.type = Values<T>::kType;
    if (rmtkernels_cuda_window_gram(&call, nullptr) != 0) return fail("the launch failed");
    for (int64_t b = 0; b < s_.batch; ++b)
      if (!sequence_is_right(b)) return fail("wrong windows");
    return true;
  }

 private:
  bool fail(const char* what) const {
    std::printf("%s, type %d: %s\n", s_.name, int(Values<T>::kType), what);
    return false;
  }

  T* element(int64_t b, int64_t t, int64_t i) {
    return rows_ + s_.shift + (b * s_.steps + t) * step_stride_ + i * s_.dim_stride;
  }

  // Follows the ring: slot -> the step whose row is there, -1 for none.
  bool sequence_is_right(int64_t b) {
    std::vector<int64_t> in_slot(s_.window, -1);
    int64_t accepted = 0;
    bool right = true;
    for (int64_t t = 0; t < s_.steps; ++t) {
      const bool bad = s_.bad_rows && t % 5 == 1 && b == s_.batch - 1;
      if (!bad && (!s_.masked || mask_[b * s_.steps + t])) in_slot[accepted++ % s_.window] = t;
      if ((t + 1) % s_.stride != 0) continue;
      const int64_t w = b * windows_ + t / s_.stride;
      right = right && seen_[w] == accepted;
      for (int64_t r = 0; r < s_.window; ++r)
        for (int64_t c = 0; c < s_.window; ++c)
          right = right && entry_is_right(gram_[(w * s_.window + r) * s_.window + c], b, in_slot[r], in_slot[c]);
    }
    return right;
  }

  bool entry_is_right(double got, int64_t b, int64_t t, int64_t u) {
    if (t < 0 || u < 0) return got == 0;
    double dot = 0, norm_t = 0, norm_u = 0;
    for (int64_t i = 0; i < s_.dim; ++i) {
      const double x = to_float(*element(b, t, i)), y = to_float(*element(b, u, i));
      dot += x * y;
      norm_t += x * x;
      norm_u += y * y;
    }
    return std::fabs(got - dot) <= 1e-6 * std::sqrt(norm_t * norm_u);
  }

  const Sequences s_;
  const int64_t windows_, step_stride_, elements_;
  std::mt19937 random_{11};
  Reserved<T> far_rows_;
  std::unique_ptr<T[]> near_rows_;
  T* const rows_;
  std::unique_ptr<bool[]> mask_;
  std::unique_ptr<float[]> gram_;
  std::unique_ptr<int64_t[]> seen_;
};

}  // namespace

int main() {
  std::setvbuf(stdout, nullptr, _IONBF, 0);  // what was found is said, also where the next scenario ends in a crash
  const Scenario scenarios[] = {
      // name, layers, batch, steps, window, dim, dim_stride, shift, masked, bad_rows
      {"packed rows", 2, 2, 5, 3, 264, 1, 0, false, false},
      {"unaligned rows", 1, 2, 3, 2, 40, 1, 1, false, false},
      {"odd rows, masked, bad", 3, 2, 7, 9, 29, 1, 0, true, true},
      {"strided rows", 2, 1, 4, 2, 16, 3, 0, false, true},
      {"one slot", 1, 3, 3, 1, 1, 1, 0, true, false},
  };
  bool right = true;
  for (const Scenario& s : scenarios)
    right = Case<float>(s).run() && Case<bfloat16>(s).run() && Case<float16>(s).run() && right;
  const Sequences sequences[] = {
      // name, batch, steps, dim, window, stride, dim_stride, shift, masked, bad_rows, far
      {"packs", 1, 70, 72, 3, 1, 1, 0, false, false, false},
      {"odd rows, masked, bad", 2, 90, 29, 33, 14, 1, 0, true, true, false},
      {"strided rows of two splits", 1, 3, 523, 2, 1, 2, 1, false, false, false},
      {"the widest window", 1, 135, 9, 128, 45, 1, 1, false, true, false},
      {"rows far apart", 1, 3, 5, 2, 1, 1, 0, false, false, true},
  };
  for (const Sequences& s : sequences)
    right = GramCase<float>(s).run() && GramCase<bfloat16>(s).run() && GramCase<float16>(s).run() && right;
  std::puts(right ? "ok" : "FAILED");
  return right ? 0 : 1;
}
