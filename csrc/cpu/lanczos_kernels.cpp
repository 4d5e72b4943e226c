// Products of a large matrix with a narrow block of vectors, the inner loop of block Lanczos. Compiled once per
// instruction set.
//
// A vendor's GEMM is made for wide blocks: at eight columns it runs at half its speed. Here eight vectors lie side by
// side, one to a SIMD lane, and an entry of the matrix is spread over all lanes: each entry is read once, and the sums
// of several rows stay in registers. Sums are taken in the matrix's own type over kRun entries, then in float64.
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace rmtkernels {
namespace RMT_ISA {
namespace {

constexpr int kUnroll = 4;
constexpr int64_t kRun = 252;  // a multiple of that, and of the rows of a tile

// Eight lanes of either type.
struct f64x8 {
  f64x4 low, high;
};
RMT_INLINE f32x8 load_lanes(const float* p) { return load8(p); }
RMT_INLINE f64x8 load_lanes(const double* p) { return f64x8{load4(p), load4(p + 4)}; }
RMT_INLINE f32x8 spread(float x) { return f32x8{x, x, x, x, x, x, x, x}; }
RMT_INLINE f64x8 spread(double x) { return f64x8{splat(x), splat(x)}; }
RMT_INLINE f32x8 multiply_add(f32x8 a, f32x8 b, f32x8 c) { return fma(a, b, c); }
RMT_INLINE f64x8 multiply_add(f64x8 a, f64x8 b, f64x8 c) {
  return f64x8{fma(a.low, b.low, c.low), fma(a.high, b.high, c.high)};
}
RMT_INLINE void store_lanes(float* p, f32x8 v) { store8(p, v); }
RMT_INLINE void store_lanes(double* p, f64x8 v) { store4(p, v.low), store4(p + 4, v.high); }

template <class T>
RMT_INLINE void add_to(double* sum, const T* p) {
  store4(sum, load4(sum) + load4(p));
  store4(sum + 4, load4(sum + 4) + load4(p + 4));
}

// Rows of a copied tile whose sums fit the sixteen registers beside one column and one entry.
template <class T>
constexpr int kTile = sizeof(T) == 4 ? 12 : 6;
static_assert(kTile<float> <= kTileRows, "a tile must fit its scratch");
// Rows read in place: where a row is a multiple of 4 KB, all of them fall into the same eight lines of the first cache.
template <class T>
constexpr int kRows = sizeof(T) == 4 ? 8 : 6;

// A cache line, and how far ahead of the sums the rows are fetched: beyond the end a prefetch does nothing.
template <class T>
constexpr int64_t kLine = 64 / sizeof(T);
template <class T>
constexpr int64_t kAhead = 8 * kLine<T>;

template <class T>
using Lanes = decltype(spread(T(0)));

// part[r] += a[r] column, of one column.
template <class T, int rows>
RMT_INLINE void multiply_column(Lanes<T>* part, const T* a, int64_t stride, const T* column) {
  const Lanes<T> lanes = load_lanes(column);
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) part[r] = multiply_add(spread(a[r * stride]), lanes, part[r]);
}

// sums[r][lane] += sum over j < cols of a[r][j] v[j][lane].
template <class T, int rows>
RMT_INLINE void multiply_rows(double* sums, const T* a, int64_t stride, const T* v, int64_t cols) {
  for (int64_t begin = 0; begin < cols; begin += kRun) {
    const int64_t end = begin + kRun < cols ? begin + kRun : cols;
    Lanes<T> part[rows];
    for (int r = 0; r < rows; ++r) part[r] = spread(T(0));
    int64_t j = begin;
    for (; j + kUnroll <= end; j += kUnroll) {
      if (j % kLine<T> == 0)
        for (int r = 0; r < rows; ++r) __builtin_prefetch(a + r * stride + j + kAhead<T>);
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) multiply_column<T, rows>(part, a + j + u, stride, v + 8 * (j + u));
    }
    for (; j < end; ++j) multiply_column<T, rows>(part, a + j, stride, v + 8 * j);
    for (int r = 0; r < rows; ++r) {
      T lanes[8];
      store_lanes(lanes, part[r]);
      add_to(sums + 8 * r, lanes);
    }
  }
}

template <class T, int rows>
RMT_INLINE void multiply_and_store(const MultiplyArgs& args, int64_t i) {
  double sums[8 * rows] = {};
  multiply_rows<T, rows>(sums, static_cast<const T*>(args.matrix) + i * args.stride, args.stride,
                         static_cast<const T*>(args.block), args.cols);
  T* out = static_cast<T*>(args.out) + i;
  for (int lane = 0; lane < args.lanes; ++lane)
    for (int r = 0; r < rows; ++r) out[lane * args.rows + r] = T(sums[8 * r + lane]);
}

template <class T>
void multiply(const MultiplyArgs& args, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + kRows<T> <= end; i += kRows<T>) multiply_and_store<T, kRows<T>>(args, i);
  for (; i < end; ++i) multiply_and_store<T, 1>(args, i);
}

// out[j][lane] += sum over the tile's rows of tile[r][j] y[r][lane].
template <class T, int rows>
RMT_INLINE void multiply_transposed(T* out, const T* tile, int64_t stride, const T* y, int64_t cols) {
  Lanes<T> lanes[rows];
  for (int r = 0; r < rows; ++r) lanes[r] = load_lanes(y + 8 * r);
  for (int64_t j = 0; j < cols; ++j) {
    auto sum = load_lanes(out + 8 * j);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) sum = multiply_add(spread(tile[r * stride + j]), lanes[r], sum);
    store_lanes(out + 8 * j, sum);
  }
}

// Rows i ... i + rows - 1, less the mean, whose two parts together have twice the digits of T.
template <class T, int rows>
RMT_INLINE void load_tile(T* tile, const MultiplyArgs& args, int64_t i) {
  for (int r = 0; r < rows; ++r) {
    const T* x = static_cast<const T*>(args.matrix) + (i + r) * args.stride;
    T* to = tile + r * tile_stride(args.cols);
    if (!args.mean) {
      std::memcpy(to, x, sizeof(T) * args.cols);
      continue;
    }
    const T* mean = static_cast<const T*>(args.mean);
    for (int64_t j = 0; j < args.cols; ++j) to[j] = (x[j] - mean[j]) - mean[args.cols + j];
  }
}

template <class T, int rows>
RMT_INLINE void add_tile(const MultiplyArgs& args, int64_t i, T* run, T* tile) {
  double sums[8 * rows] = {};
  T y[8 * rows];
  load_tile<T, rows>(tile, args, i);
  multiply_rows<T, rows>(sums, tile, tile_stride(args.cols), static_cast<const T*>(args.block), args.cols);
  for (int k = 0; k < 8 * rows; ++k) y[k] = T(sums[k]);
  multiply_transposed<T, rows>(run, tile, tile_stride(args.cols), y, args.cols);
}

// A problem is a chunk of rows: its share of X'X v goes to its own (cols, 8) float64 sums.
template <class T>
void multiply_gram(const MultiplyArgs& args, int64_t begin, int64_t end) {
  T* run = static_cast<T*>(args.scratch) + begin * gram_scratch(args.cols);
  T* tile = run + 8 * args.cols;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    double* sums = args.sums + chunk * 8 * args.cols;
    const int64_t last = (chunk + 1) * args.chunk < args.rows ? (chunk + 1) * args.chunk : args.rows;
    std::memset(sums, 0, sizeof(double) * 8 * args.cols);
    for (int64_t i = chunk * args.chunk; i < last;) {
      const int64_t stop = i + kRun < last ? i + kRun : last;
      std::memset(run, 0, sizeof(T) * 8 * args.cols);
      for (; i + kTile<T> <= stop; i += kTile<T>) add_tile<T, kTile<T>>(args, i, run, tile);
      for (; i < stop; ++i) add_tile<T, 1>(args, i, run, tile);
      for (int64_t j = 0; j < args.cols; ++j) add_to(sums + 8 * j, run + 8 * j);
    }
  }
}

}  // namespace

void multiply_f32(const MultiplyArgs& args, int64_t begin, int64_t end) { multiply<float>(args, begin, end); }
void multiply_f64(const MultiplyArgs& args, int64_t begin, int64_t end) { multiply<double>(args, begin, end); }
void multiply_gram_f32(const MultiplyArgs& args, int64_t begin, int64_t end) { multiply_gram<float>(args, begin, end); }
void multiply_gram_f64(const MultiplyArgs& args, int64_t begin, int64_t end) {
  multiply_gram<double>(args, begin, end);
}

}  // namespace RMT_ISA
}  // namespace rmtkernels
