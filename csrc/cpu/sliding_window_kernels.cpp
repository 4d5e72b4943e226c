// Inner products of rows of activations, float32 in, float64 out. Compiled once per instruction set.
//
// Products are summed in float32 over kChunk elements (eight lanes, so kChunk / 8 additions in a row) and the chunks in
// float64: the error stays near one float32 rounding however wide the rows are. The order of additions depends on the
// width and dtype alone, so a pair of rows gives the same bits whichever function asked for it.
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "rmtkernels/sliding_window.h"

namespace rmtkernels {
namespace RMT_ISA {
namespace {

constexpr int64_t kChunk = 256;
constexpr int kRows = 8;  // rows dotted at once: as many chains of FMAs as hide their latency

// Eight more products for each of R sums, and sixteen more. Those of bfloat16 rows come as the elements 0, 2, ... and
// 1, 3, ...: a shift and a mask convert them, with no shuffle. load_row has brought x into the same order.
template <int R, class T>
RMT_INLINE void add8(f32x8 (&sum)[R], const float* x, const T* const* y, int64_t i) {
  const f32x8 xi = load8(x + i);
  for (int k = 0; k < R; ++k) sum[k] = fma(xi, load8(y[k] + i), sum[k]);
}
template <int R, class T>
RMT_INLINE void add16(f32x8 (&sum)[R], const float* x, const T* const* y, int64_t i) {
  add8(sum, x, y, i);
  add8(sum, x, y, i + 8);
}
template <int R>
RMT_INLINE void add16(f32x8 (&sum)[R], const float* x, const bfloat16* const* y, int64_t i) {
  const f32x8 even = load8(x + i), odd = load8(x + i + 8);
  for (int k = 0; k < R; ++k) {
    u32x8 pairs;
    std::memcpy(&pairs, y[k] + i, sizeof(pairs));
    sum[k] = fma(even, (f32x8)(pairs << 16), sum[k]);
    sum[k] = fma(odd, (f32x8)(pairs & 0xffff0000u), sum[k]);
  }
}

// out[k] += <x, y[k]> for R rows, 1 or kRows.
template <int R, class T>
void dot_block(double* out, const float* x, const T* const* y, int64_t dim) {
  int64_t i = 0;
  while (i + 8 <= dim) {
    const int64_t end = i + kChunk < dim ? i + kChunk : dim;
    f32x8 sum[R] = {};
    for (; i + 16 <= end; i += 16) add16(sum, x, y, i);
    if (i + 8 <= end) {
      add8(sum, x, y, i);
      i += 8;
    }
    for (int k = 0; k + 4 <= R; k += 4)
      store4(out + k, load4(out + k) + lane_sums(fold(sum[k]), fold(sum[k + 1]), fold(sum[k + 2]), fold(sum[k + 3])));
    if (R == 1) out[0] += lane_sum(fold(sum[0]));
  }
  for (; i < dim; ++i)
    for (int k = 0; k < R; ++k) out[k] += double(x[i]) * double(to_float(y[k][i]));
}

template <class T>
void dot_rows_of(double* out, const float* x, const T* rows, int64_t count, int64_t dim) {
  for (int64_t first = 0; first < count; first += kRows) {
    const T* y[kRows];
    double block[kRows] = {};
    for (int k = 0; k < kRows; ++k)  // past the end the last row is read again: a result nobody keeps
      y[k] = rows + (first + k < count ? first + k : count - 1) * dim;
    dot_block<kRows>(block, x, y, dim);
    for (int k = 0; k < kRows && first + k < count; ++k) out[first + k] = block[k];
  }
}

template <class T>
void load_row_of(float* x, const T* row, int64_t stride, int64_t dim) {
  constexpr bool kPairs = std::is_same<T, bfloat16>::value;
  int64_t i = 0;
  if (stride == 1) {
    for (; i + 16 <= dim; i += 16) {
      const f32x8 a = load8(row + i), b = load8(row + i + 8);
      store8(x + i, kPairs ? __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) : a);
      store8(x + i + 8, kPairs ? __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15) : b);
    }
  } else if (kPairs) {
    for (; i + 16 <= dim; i += 16)
      for (int k = 0; k < 16; ++k) x[i + k % 2 * 8 + k / 2] = to_float(row[(i + k) * stride]);
  }
  for (; i < dim; ++i) x[i] = to_float(row[i * stride]);
}

}  // namespace

void load_row(float* x, const void* row, DType type, int64_t stride, int64_t dim) {
  switch (type) {
    case DType::kBFloat16:
      return load_row_of(x, static_cast<const bfloat16*>(row), stride, dim);
    case DType::kFloat16:
      return load_row_of(x, static_cast<const float16*>(row), stride, dim);
    default:
      return load_row_of(x, static_cast<const float*>(row), stride, dim);
  }
}

// Four chunks side by side hide the latency of one chain; they are added in their order, as dot_rows adds them.
double row_norm(const float* x, int64_t dim) {
  double total = 0;
  int64_t first = 0;
  for (; first + 4 * kChunk <= dim; first += 4 * kChunk) {
    f32x8 sum[4] = {};
    for (int64_t i = first; i < first + kChunk; i += 8)
      for (int k = 0; k < 4; ++k) sum[k] = fma(load8(x + i + k * kChunk), load8(x + i + k * kChunk), sum[k]);
    const f64x4 chunks = lane_sums(fold(sum[0]), fold(sum[1]), fold(sum[2]), fold(sum[3]));
    for (int k = 0; k < 4; ++k) total += chunks[k];
  }
  const float* const rest = x + first;
  dot_block<1>(&total, rest, &rest, dim - first);
  return total;
}

void dot_rows(double* out, const float* x, const void* rows, DType type, int64_t count, int64_t dim) {
  switch (type) {
    case DType::kBFloat16:
      return dot_rows_of(out, x, static_cast<const bfloat16*>(rows), count, dim);
    case DType::kFloat16:
      return dot_rows_of(out, x, static_cast<const float16*>(rows), count, dim);
    default:
      return dot_rows_of(out, x, static_cast<const float*>(rows), count, dim);
  }
}

}  // namespace RMT_ISA
}  // namespace rmtkernels
