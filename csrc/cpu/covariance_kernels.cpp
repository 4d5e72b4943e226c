// Mean and scatter matrix of a batch of rows. Compiled once per instruction set.
//
// The scatter matrix is a symmetric rank-k update by half of a matrix product: rows, centred in float64, are packed
// into panels of kWidth columns; a tile of kTileRows x kWidth products stays in registers while it runs through kDepth
// rows, and only panel pairs that touch the lower triangle are multiplied. Each entry is summed in the order of the
// rows, so neither the split over threads nor the split into tiles changes a bit.
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace rmtkernels {
namespace RMT_ISA {
namespace {

#if defined(__AVX2__)
constexpr int kVectors = 3;  // 4 x 3 sums, 3 columns and a broadcast fill the 16 registers
#else
constexpr int kVectors = 1;  // a vector is two registers here
#endif
constexpr int kTileRows = 4;

template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef f32x8 Vector;
  static RMT_INLINE f32x8 load(const float* p) { return load8(p); }
  static RMT_INLINE f32x8 splat(float x) { return f32x8{x, x, x, x, x, x, x, x}; }
  static RMT_INLINE void store(float* p, f32x8 v) { store8(p, v); }
};
template <>
struct Simd<double> {
  typedef f64x4 Vector;
  static RMT_INLINE f64x4 load(const double* p) { return load4(p); }
  static RMT_INLINE f64x4 splat(double x) { return f64x4{x, x, x, x}; }
  static RMT_INLINE void store(double* p, f64x4 v) { store4(p, v); }
};

template <class T>
constexpr int kLanes = 32 / int(sizeof(T));
template <class T>
constexpr int kWidth = kVectors * kLanes<T>;

// Eight elements in float64.
struct Eight {
  f64x4 low, high;
};
template <class T>
RMT_INLINE Eight load_eight(const T* p) {
  const f32x8 v = load8(p);
  return {__builtin_convertvector(__builtin_shufflevector(v, v, 0, 1, 2, 3), f64x4),
          __builtin_convertvector(__builtin_shufflevector(v, v, 4, 5, 6, 7), f64x4)};
}
RMT_INLINE Eight load_eight(const double* p) { return {load4(p), load4(p + 4)}; }

template <class T>
RMT_INLINE double to_double(T x) {
  return double(to_float(x));
}
RMT_INLINE double to_double(double x) { return x; }

RMT_INLINE void store_eight(float* p, const Eight& v) {
  const f32x4 low = __builtin_convertvector(v.low, f32x4), high = __builtin_convertvector(v.high, f32x4);
  std::memcpy(p, &low, sizeof(low));
  std::memcpy(p + 4, &high, sizeof(high));
}
RMT_INLINE void store_eight(double* p, const Eight& v) {
  store4(p, v.low);
  store4(p + 4, v.high);
}

template <class X>
double squared_norm_of(const X* x, int64_t dim) {
  f64x4 low[2] = {}, high[2] = {};
  int64_t j = 0;
  for (; j + 16 <= dim; j += 16)
    for (int i = 0; i < 2; ++i) {
      const Eight v = load_eight(x + j + 8 * i);
      low[i] = fma(v.low, v.low, low[i]);
      high[i] = fma(v.high, v.high, high[i]);
    }
  double norm = lane_sum((low[0] + low[1]) + (high[0] + high[1]));
  for (; j < dim; ++j) norm += to_double(x[j]) * to_double(x[j]);
  return norm;
}

template <class X>
void add_rows_of(double* sums, const RowList& rows, int64_t begin, int64_t end) {
  constexpr int kTogether = 4;
  for (int64_t first = 0; first < rows.count; first += kTogether) {
    const int together = int(rows.count - first < kTogether ? rows.count - first : kTogether);
    const X* x[kTogether] = {};
    for (int k = 0; k < together; ++k) x[k] = static_cast<const X*>(rows.rows) + rows.index[first + k] * rows.stride;
    int64_t j = begin;
    if (together == kTogether)
      for (; j + 8 <= end; j += 8) {
        f64x4 low = load4(sums + j), high = load4(sums + j + 4);
        for (int k = 0; k < kTogether; ++k) {
          const Eight v = load_eight(x[k] + j);
          low = low + splat(rows.weight[first + k]) * v.low;
          high = high + splat(rows.weight[first + k]) * v.high;
        }
        store4(sums + j, low);
        store4(sums + j + 4, high);
      }
    for (; j < end; ++j)
      for (int k = 0; k < together; ++k) sums[j] += rows.weight[first + k] * to_double(x[k][j]);
  }
}

// Where row k of a panel lies: panels of kScatterDepth rows, all panels of the first rows first. Panels that lay a
// power of two apart would share the same few sets of the cache.
template <class T>
RMT_INLINE int64_t packed_row(int64_t panel, int64_t k, int64_t dim) {
  const int64_t panels = (dim + kWidth<T> - 1) / kWidth<T>;
  return ((k / kScatterDepth * panels + panel) * kScatterDepth + k % kScatterDepth) * kWidth<T>;
}

// sqrt(weight) (x - mean) for the panels begin .. end - 1, from row `place` on; columns past the last are 0:
// their products are thrown away, but subnormal leftovers would slow some processors down.
template <class T, class X>
void pack_rows_of(T* packed, int64_t place, const RowList& rows, const double* mean, int64_t dim, int64_t begin,
                  int64_t end) {
  for (int64_t k = 0; k < rows.count; ++k) {
    const X* const x = static_cast<const X*>(rows.rows) + rows.index[k] * rows.stride;
    const double root = __builtin_sqrt(rows.weight[k]);
    for (int64_t panel = begin; panel < end; ++panel) {
      T* const to = packed + packed_row<T>(panel, place + k, dim);
      const int64_t first = panel * kWidth<T>;
      const int count = int(dim - first < kWidth<T> ? dim - first : kWidth<T>);
      int j = 0;
      for (; j + 8 <= count; j += 8) {
        const Eight v = load_eight(x + first + j);
        store_eight(to + j, {splat(root) * (v.low - load4(mean + first + j)),
                             splat(root) * (v.high - load4(mean + first + j + 4))});
      }
      for (; j < count; ++j) to[j] = T(root * (to_double(x[first + j]) - mean[first + j]));
      for (; j < kWidth<T>; ++j) to[j] = 0;
    }
  }
}

// sum[r][v] += the products of columns a, a + 1, ... of one panel with the columns of panel b, over `depth` rows.
template <class T>
RMT_INLINE void multiply(typename Simd<T>::Vector (&sum)[kTileRows][kVectors], const T* a, const T* b, int64_t depth) {
  for (int64_t k = 0; k < depth; ++k, a += kWidth<T>, b += kWidth<T>) {
    typename Simd<T>::Vector column[kVectors];
    for (int v = 0; v < kVectors; ++v) column[v] = Simd<T>::load(b + v * kLanes<T>);
    for (int r = 0; r < kTileRows; ++r)
      for (int v = 0; v < kVectors; ++v) sum[r][v] = fma(Simd<T>::splat(a[r]), column[v], sum[r][v]);
  }
}

// A tile that lies whole within the lower triangle. Unrolled by order: GCC would keep the sums in memory otherwise,
// which costs a third of the speed; so does waiting for the scatter matrix, which is far away.
template <class T>
void add_whole_tile(T* scatter, int64_t stride, const T* a, const T* b, int64_t depth) {
  typename Simd<T>::Vector sum[kTileRows][kVectors] = {};
  for (int r = 0; r < kTileRows; ++r)
    for (int v = 0; v < kVectors; v += 2) __builtin_prefetch(scatter + r * stride + v * kLanes<T>, 1);
  multiply(sum, a, b, depth);
#pragma GCC unroll 4
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      T* const to = scatter + r * stride + v * kLanes<T>;
      Simd<T>::store(to, Simd<T>::load(to) + sum[r][v]);
    }
}

// A tile of `rows` rows, of which row r reaches to column first + r: beyond it nothing is written.
template <class T>
void add_cut_tile(T* scatter, int64_t stride, const T* a, const T* b, int64_t depth, int64_t first, int64_t rows) {
  typename Simd<T>::Vector sum[kTileRows][kVectors] = {};
  multiply(sum, a, b, depth);
  for (int64_t r = 0; r < rows; ++r) {
    T values[kWidth<T>];
    for (int v = 0; v < kVectors; ++v) Simd<T>::store(values + v * kLanes<T>, sum[r][v]);
    for (int64_t j = 0; j < kWidth<T> && j <= first + r; ++j) scatter[r * stride + j] += values[j];
  }
}

// Panels p >= q: kWidth x kWidth entries of the scatter matrix, fewer at the diagonal and at the last row.
template <class T>
void add_panel_pair(T* scatter, const T* a, const T* b, int64_t depth, int64_t p, int64_t q, int64_t dim) {
  for (int64_t i = 0; i < kWidth<T> && p * kWidth<T> + i < dim; i += kTileRows) {
    const int64_t row = p * kWidth<T> + i, rows = dim - row < kTileRows ? dim - row : kTileRows;
    T* const to = scatter + row * dim + q * kWidth<T>;
    if (p > q && rows == kTileRows)
      add_whole_tile(to, dim, a + i, b, depth);
    else
      add_cut_tile(to, dim, a + i, b, depth, p > q ? kWidth<T> : i, rows);
  }
}

template <class T>
void add_scatter_of(T* scatter, const T* packed, int64_t depth, int64_t dim, const PanelBlock& block) {
  for (int64_t k = 0; k < depth; k += kScatterDepth) {
    const int64_t count = depth - k < kScatterDepth ? depth - k : kScatterDepth;
    for (int64_t q = block.column_begin; q < block.column_end; ++q)
      for (int64_t p = block.row_begin > q ? block.row_begin : q; p < block.row_end; ++p)
        add_panel_pair(scatter, packed + packed_row<T>(p, k, dim), packed + packed_row<T>(q, k, dim), count, p, q, dim);
  }
}

// A scale of 0 does not read what was there.
template <class T>
void scale_lower_of(T* scatter, int64_t dim, T scale, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    T* const row = scatter + i * dim;
    if (scale == 0)
      std::memset(row, 0, size_t(i + 1) * sizeof(T));
    else
      for (int64_t j = 0; j <= i; ++j) row[j] *= scale;
  }
}

template <class T>
void pack_rows_as(T* packed, int64_t place, const RowList& rows, const double* mean, int64_t dim, int64_t begin,
                  int64_t end) {
  switch (rows.type) {
    case DType::kBFloat16:
      return pack_rows_of<T, bfloat16>(packed, place, rows, mean, dim, begin, end);
    case DType::kFloat16:
      return pack_rows_of<T, float16>(packed, place, rows, mean, dim, begin, end);
    case DType::kFloat64:
      return pack_rows_of<T, double>(packed, place, rows, mean, dim, begin, end);
    default:
      return pack_rows_of<T, float>(packed, place, rows, mean, dim, begin, end);
  }
}

}  // namespace

double squared_norm(const void* row, DType type, int64_t dim) {
  switch (type) {
    case DType::kBFloat16:
      return squared_norm_of(static_cast<const bfloat16*>(row), dim);
    case DType::kFloat16:
      return squared_norm_of(static_cast<const float16*>(row), dim);
    case DType::kFloat64:
      return squared_norm_of(static_cast<const double*>(row), dim);
    default:
      return squared_norm_of(static_cast<const float*>(row), dim);
  }
}

void add_rows(double* sums, const RowList& rows, int64_t begin, int64_t end) {
  switch (rows.type) {
    case DType::kBFloat16:
      return add_rows_of<bfloat16>(sums, rows, begin, end);
    case DType::kFloat16:
      return add_rows_of<float16>(sums, rows, begin, end);
    case DType::kFloat64:
      return add_rows_of<double>(sums, rows, begin, end);
    default:
      return add_rows_of<float>(sums, rows, begin, end);
  }
}

void scale_lower(void* scatter, bool is_double, int64_t dim, double scale, int64_t begin, int64_t end) {
  if (is_double)
    scale_lower_of(static_cast<double*>(scatter), dim, scale, begin, end);
  else
    scale_lower_of(static_cast<float*>(scatter), dim, float(scale), begin, end);
}

int64_t panel_width(bool is_double) { return is_double ? kWidth<double> : kWidth<float>; }

void pack_rows(void* packed, bool is_double, int64_t place, const RowList& rows, const double* mean, int64_t dim,
               int64_t begin, int64_t end) {
  if (is_double)
    pack_rows_as(static_cast<double*>(packed), place, rows, mean, dim, begin, end);
  else
    pack_rows_as(static_cast<float*>(packed), place, rows, mean, dim, begin, end);
}

void add_scatter(void* scatter, const void* packed, bool is_double, int64_t depth, int64_t dim,
                 const PanelBlock& block) {
  if (is_double)
    add_scatter_of(static_cast<double*>(scatter), static_cast<const double*>(packed), depth, dim, block);
  else
    add_scatter_of(static_cast<float*>(scatter), static_cast<const float*>(packed), depth, dim, block);
}

}  // namespace RMT_ISA
}  // namespace rmtkernels
