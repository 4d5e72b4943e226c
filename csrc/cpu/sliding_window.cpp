// CPU binding of sliding_window: checks tensors, splits the streams over threads.
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <tuple>

#include "cpu/kernels.h"
#include "tensor_check.h"

namespace rmtkernels {
namespace {

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Float:
      return DType::kFloat32;
    default:
      STD_TORCH_CHECK(false, "activations must be float32, bfloat16 or float16");
  }
}
int64_t size_of(DType type) { return type == DType::kFloat32 ? 4 : 2; }

// Grown once per thread, so that a decode step allocates nothing.
float* scratch_row(int64_t dim) {
  static thread_local std::vector<float> scratch;
  if (int64_t(scratch.size()) < dim) scratch.resize(dim);
  return scratch.data();
}

// The rows of one tensor, (B, D) or (B, T, D), addressed in elements.
struct Rows {
  const char* data;
  DType type;
  int64_t batch_stride, step_stride, stride;

  explicit Rows(const Tensor& t)
      : data(static_cast<const char*>(t.const_data_ptr())),
        type(dtype_of(t)),
        batch_stride(t.stride(0)),
        step_stride(t.dim() == 3 ? t.stride(1) : 0),
        stride(t.stride(-1)) {}
  const void* row(int64_t b, int64_t t) const { return data + (b * batch_stride + t * step_stride) * size_of(type); }
  // The row as dot_rows wants it: where it lies if it can be read there, else in x.
  const float* as_float(float* x, int64_t b, int64_t t, int64_t dim) const {
    if (type == DType::kFloat32 && stride == 1) return static_cast<const float*>(row(b, t));
    kernels().load_row(x, row(b, t), type, stride, dim);
    return x;
  }
};

struct Mask {
  const bool* data = nullptr;
  int64_t batch_stride = 0, step_stride = 0;

  explicit Mask(const std::optional<Tensor>& t) {
    if (!t) return;
    data = static_cast<const bool*>(t->const_data_ptr());
    batch_stride = t->stride(0);
    step_stride = t->dim() == 2 ? t->stride(1) : 0;
  }
  bool keeps(int64_t b, int64_t t) const { return !data || data[b * batch_stride + t * step_stride]; }
};

template <class Word>
void copy_strided(char* to, const void* from, int64_t stride, int64_t dim) {
  for (int64_t i = 0; i < dim; ++i)
    std::memcpy(to + i * sizeof(Word), static_cast<const Word*>(from) + i * stride, sizeof(Word));
}

void store_row(char* to, const void* from, DType type, int64_t stride, int64_t dim) {
  if (dim == 0) return;  // memmove takes no null pointer, not even for nothing
  if (stride == 1) return void(std::memmove(to, from, size_t(dim * size_of(type))));
  if (type == DType::kFloat32) return copy_strided<uint32_t>(to, from, stride, dim);
  copy_strided<uint16_t>(to, from, stride, dim);
}

// First pass: decides for each sequence and step which slot the row takes, -1 for none, and counts.
void assign_slots(const PushShape& shape, const std::vector<Rows>& rows, const Mask& mask, int64_t* seen,
                  int64_t* slots) {
  torch::stable::parallel_for(
      0, shape.batch, 1 + 32768 / (1 + shape.layers * shape.dim * shape.steps), [&](int64_t begin, int64_t end) {
        float* x = scratch_row(shape.dim);
        for (int64_t b = begin; b < end; ++b) {
          int64_t* counters = seen + b * kSeenColumns;
          for (int64_t t = 0; t < shape.steps; ++t) {
            int64_t& slot = slots[b * shape.steps + t];
            slot = -1;
            if (mask.keeps(b, t)) {
              bool finite = true;
              for (const Rows& layer : rows)
                finite = finite && norm_is_finite(kernels().row_norm(layer.as_float(x, b, t, shape.dim), shape.dim));
              if (finite)
                slot = window_slot(counters[kSeenRows]++, shape.window);
              else
                ++counters[kSeenRejected];
            }
            counters[kSeenSlot] = slot;
          }
        }
      });
}

// Second pass, one stream: stores the row of step t and refreshes its row and column of the Gram matrix.
void push_row(char* ring, float* gram, float* x, const Rows& rows, int64_t b, int64_t t, const PushShape& shape,
              int64_t slot, int64_t used) {
  store_row(ring + slot * shape.dim * size_of(rows.type), rows.row(b, t), rows.type, rows.stride, shape.dim);
  double dots[kMaxWindow];
  kernels().dot_rows(dots, rows.as_float(x, b, t, shape.dim), ring, rows.type, used, shape.dim);
  for (int64_t j = 0; j < used; ++j) gram[slot * shape.window + j] = gram[j * shape.window + slot] = float(dots[j]);
}

void window_push_(Tensor ring, Tensor gram, Tensor seen, std::vector<Tensor> rows, std::optional<Tensor> mask) {
  const PushShape shape = check_window_push(ring, gram, seen, rows, mask);
  if (shape.layers * shape.batch * shape.steps == 0) return;
  static thread_local std::vector<Rows> layers;
  static thread_local std::vector<int64_t> slots;
  layers.clear();
  for (const Tensor& t : rows) layers.emplace_back(t);
  if (int64_t(slots.size()) < shape.batch * shape.steps) slots.resize(shape.batch * shape.steps);
  int64_t* counters = static_cast<int64_t*>(seen.mutable_data_ptr());
  for (int64_t b = 0; b < shape.batch; ++b) {  // they decide which slot is written
    const int64_t count = counters[b * kSeenColumns + kSeenRows];
    STD_TORCH_CHECK(count >= 0 && count < INT64_MAX / 2, "window_push_: seen counts ", count, " rows");
  }
  // Workers must see this thread's vectors, not their own.
  const std::vector<Rows>& streams = layers;
  int64_t* const slot_of = slots.data();
  assign_slots(shape, streams, Mask(mask), counters, slot_of);

  char* const ring_data = static_cast<char*>(ring.mutable_data_ptr());
  float* const gram_data = static_cast<float*>(gram.mutable_data_ptr());
  const int64_t ring_size = shape.window * shape.dim * size_of(streams[0].type),
                gram_size = shape.window * shape.window;
  const int64_t work = shape.window * shape.dim * shape.steps;
  torch::stable::parallel_for(0, shape.layers * shape.batch, 1 + 1000000 / (1 + work), [&](int64_t begin, int64_t end) {
    float* x = scratch_row(shape.dim);
    for (int64_t stream = begin; stream < end; ++stream) {
      const int64_t layer = stream / shape.batch, b = stream % shape.batch;
      int64_t accepted = 0;
      for (int64_t t = 0; t < shape.steps; ++t) accepted += slot_of[b * shape.steps + t] >= 0;
      int64_t seen_before = counters[b * kSeenColumns + kSeenRows] - accepted;
      for (int64_t t = 0; t < shape.steps; ++t) {
        const int64_t slot = slot_of[b * shape.steps + t];
        if (slot < 0) continue;
        push_row(ring_data + stream * ring_size, gram_data + stream * gram_size, x, streams[layer], b, t, shape, slot,
                 window_rows(++seen_before, shape.window));
      }
    }
  });
}

// A sequence's accepted rows, side by side as load_row leaves them, and how many had been accepted up to each step.
struct Sequence {
  std::vector<float> rows;
  std::vector<int64_t> seen;
};

Sequence gather_sequence(const Rows& hidden, const Mask& mask, int64_t b, int64_t steps, int64_t dim) {
  Sequence s;
  s.rows.resize(size_t(steps * dim));
  s.seen.resize(size_t(steps));
  int64_t accepted = 0;
  for (int64_t t = 0; t < steps; ++t) {
    if (mask.keeps(b, t)) {
      float* const to = s.rows.data() + accepted * dim;
      kernels().load_row(to, hidden.row(b, t), hidden.type, hidden.stride, dim);
      accepted += norm_is_finite(kernels().row_norm(to, dim));
    }
    s.seen[size_t(t)] = accepted;
  }
  return s;
}

// band[s * window + k] = <row s, row s - k>: every inner product of every window, each computed once.
std::vector<float> gram_band(const Sequence& s, int64_t window, int64_t dim) {
  const int64_t rows = s.seen.empty() ? 0 : s.seen.back();
  std::vector<float> band(size_t(rows * window));
  torch::stable::parallel_for(0, rows, 1 + 1000000 / (1 + window * dim), [&](int64_t begin, int64_t end) {
    double dots[kMaxWindow];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t count = window_rows(i + 1, window), first = i + 1 - count;
      kernels().dot_rows(dots, s.rows.data() + i * dim, s.rows.data() + first * dim, DType::kFloat32, count, dim);
      for (int64_t k = 0; k < count; ++k) band[size_t(i * window + k)] = float(dots[count - 1 - k]);
    }
  });
  return band;
}

// The Gram matrix after `seen` rows, in the order the ring would have them: row i sits in slot i % window.
void write_window(float* gram, const float* band, int64_t seen, int64_t window) {
  std::memset(gram, 0, size_t(window * window) * sizeof(float));
  for (int64_t i = seen - window_rows(seen, window); i < seen; ++i)
    for (int64_t k = 0; k <= i && k < window && i - k >= seen - window; ++k) {
      const int64_t row = window_slot(i, window), column = window_slot(i - k, window);
      gram[row * window + column] = gram[column * window + row] = band[i * window + k];
    }
}

std::tuple<Tensor, Tensor> window_gram(Tensor hidden, int64_t window, int64_t stride, std::optional<Tensor> mask) {
  const WindowGramShape shape = check_window_gram(hidden, window, stride, mask);
  const int64_t B = shape.batch, T = shape.steps, D = shape.dim, W = shape.windows;
  const Rows rows(hidden);
  const Mask keep(mask);
  Tensor gram = torch::stable::new_empty(hidden, {B, W, window, window}, ScalarType::Float);
  Tensor seen = torch::stable::new_empty(hidden, {B, W}, ScalarType::Long);
  float* const gram_data = static_cast<float*>(gram.mutable_data_ptr());
  int64_t* const seen_data = static_cast<int64_t*>(seen.mutable_data_ptr());
  for (int64_t b = 0; b < B; ++b) {
    const Sequence sequence = gather_sequence(rows, keep, b, T, D);
    const std::vector<float> band = gram_band(sequence, window, D);
    torch::stable::parallel_for(0, W, 64, [&](int64_t begin, int64_t end) {
      for (int64_t w = begin; w < end; ++w) {
        const int64_t count = seen_data[b * W + w] = sequence.seen[size_t((w + 1) * stride - 1)];
        write_window(gram_data + (b * W + w) * window * window, band.data(), count, window);
      }
    });
  }
  return {gram, seen};
}

}  // namespace
}  // namespace rmtkernels

STABLE_TORCH_LIBRARY_IMPL(rmtkernels, CPU, m) {
  m.impl("window_push_", TORCH_BOX(&rmtkernels::window_push_));
  m.impl("window_gram", TORCH_BOX(&rmtkernels::window_gram));
}
