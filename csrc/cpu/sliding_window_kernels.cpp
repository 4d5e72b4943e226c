// Inner products of rows of activations, float32 in, float64 out. Compiled once per instruction set.
//
// Products are summed in float32 over kChunk elements (eight lanes, so kChunk / 8 additions in a row) and the chunks in
// float64: the error stays near one float32 rounding however wide the rows are. The order of additions depends on the
// width alone, so a pair of rows gives the same bits whichever function asked for it.
#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "rmtkernels/sliding_window.h"

namespace rmtkernels {
namespace RMT_ISA {
namespace {

constexpr int64_t kChunk = 256;
constexpr int kRows = 8;  // rows dotted at once: as many chains of FMAs as hide their latency

// out[k] = <x, y[k]> for R rows, 1 or kRows.
template <int R, class T>
void dot_block(double* out, const float* x, const T* const* y, int64_t dim) {
  double total[R] = {};
  int64_t i = 0;
  while (i + 8 <= dim) {
    const int64_t end = i + kChunk < dim - 7 ? i + kChunk : dim - 7;
    f32x8 sum[R] = {};
    for (; i < end; i += 8) {
      const f32x8 xi = load8(x + i);
      for (int k = 0; k < R; ++k) sum[k] = fma(xi, load8(y[k] + i), sum[k]);
    }
    for (int k = 0; k + 4 <= R; k += 4)
      store4(total + k,
             load4(total + k) + lane_sums(fold(sum[k]), fold(sum[k + 1]), fold(sum[k + 2]), fold(sum[k + 3])));
    if (R == 1) total[0] += lane_sum(fold(sum[0]));
  }
  for (; i < dim; ++i)
    for (int k = 0; k < R; ++k) total[k] += double(x[i]) * double(to_float(y[k][i]));
  for (int k = 0; k < R; ++k) out[k] = total[k];
}

template <class T>
void dot_rows_of(double* out, const float* x, const T* rows, int64_t count, int64_t dim) {
  for (int64_t first = 0; first < count; first += kRows) {
    const T* y[kRows];
    double block[kRows];
    for (int k = 0; k < kRows; ++k)  // past the end the last row is read again: a result nobody keeps
      y[k] = rows + (first + k < count ? first + k : count - 1) * dim;
    dot_block<kRows>(block, x, y, dim);
    for (int k = 0; k < kRows && first + k < count; ++k) out[first + k] = block[k];
  }
}

template <class T>
double load_row_of(float* x, const T* row, int64_t stride, int64_t dim) {
  int64_t i = 0;
  if (stride == 1)
    for (; i + 8 <= dim; i += 8) store8(x + i, load8(row + i));
  for (; i < dim; ++i) x[i] = to_float(row[i * stride]);
  double norm;
  const float* const self = x;
  dot_block<1>(&norm, x, &self, dim);
  return norm;
}

}  // namespace

double load_row(float* x, const void* row, DType type, int64_t stride, int64_t dim) {
  switch (type) {
    case DType::kBFloat16:
      return load_row_of(x, static_cast<const bfloat16*>(row), stride, dim);
    case DType::kFloat16:
      return load_row_of(x, static_cast<const float16*>(row), stride, dim);
    default:
      return load_row_of(x, static_cast<const float*>(row), stride, dim);
  }
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
