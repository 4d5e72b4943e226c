// Products of rows of activations with rows of weights, summed in float32. Compiled once per instruction set.
//
// A sum runs over eight lanes, then over the lanes in pairs, then over the last elements, which fill no vector. Its
// order depends on the width and the weights' dtype alone: other rows, and how the weights are cut among threads, do
// not change a bit.
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace rmtkernels {
namespace RMT_ISA {
namespace {

constexpr int kBlock = 8;   // weight rows that stay in the nearest cache while all rows of x pass by
constexpr int kChunk = 16;  // elements of a bfloat16 vector

typedef uint16_t u16x8 __attribute__((vector_size(16)));

RMT_INLINE void store_as(float* p, f32x8 v) { store8(p, v); }
// To nearest, ties to even; a NaN must not become Inf by losing its low bits.
RMT_INLINE void store_as(bfloat16* p, f32x8 v) {
  const u32x8 bits = (u32x8)v, odd = (bits >> 16) & 1u;
  const u16x8 rounded = __builtin_convertvector((v == v ? bits + 0x7fffu + odd : bits | 0x400000u) >> 16, u16x8);
  std::memcpy(p, &rounded, sizeof(rounded));
}

// Sums of the lanes of four vectors, one per lane of the result.
RMT_INLINE f32x4 lane_sums(f32x8 a, f32x8 b, f32x8 c, f32x8 d) {
  const f32x8 ab = __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
                   __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
  const f32x8 cd = __builtin_shufflevector(c, d, 0, 2, 8, 10, 4, 6, 12, 14) +
                   __builtin_shufflevector(c, d, 1, 3, 9, 11, 5, 7, 13, 15);
  const f32x8 quads = __builtin_shufflevector(ab, cd, 0, 2, 8, 10, 4, 6, 12, 14) +
                      __builtin_shufflevector(ab, cd, 1, 3, 9, 11, 5, 7, 13, 15);
  return __builtin_shufflevector(quads, quads, 0, 1, 2, 3) + __builtin_shufflevector(quads, quads, 4, 5, 6, 7);
}

// Eight more products for each of R * W sums.
template <int R, int W, class T>
RMT_INLINE void add8(f32x8 (&sum)[R][W], const float* x, const T* const* w, int64_t i, int64_t dim) {
  f32x8 activations[R];
  for (int r = 0; r < R; ++r) activations[r] = load8(x + r * dim + i);
  for (int j = 0; j < W; ++j) {
    const f32x8 weights = load8(w[j] + i);
    for (int r = 0; r < R; ++r) sum[r][j] = fma(activations[r], weights, sum[r][j]);
  }
}

// Sixteen more. Those of bfloat16 weights come as the elements 0, 2, ... and 1, 3, ...: a shift and a mask convert
// them, with no shuffle. `load_activations` has brought x into the same order.
template <int R, int W>
RMT_INLINE void add16(f32x8 (&sum)[R][W], const float* x, const float* const* w, int64_t i, int64_t dim) {
  add8(sum, x, w, i, dim);
  add8(sum, x, w, i + 8, dim);
}
template <int R, int W>
RMT_INLINE void add16(f32x8 (&sum)[R][W], const float* x, const bfloat16* const* w, int64_t i, int64_t dim) {
  f32x8 even[R], odd[R];
  for (int r = 0; r < R; ++r) even[r] = load8(x + r * dim + i), odd[r] = load8(x + r * dim + i + 8);
  for (int j = 0; j < W; ++j) {
    u32x8 pairs;
    std::memcpy(&pairs, w[j] + i, sizeof(pairs));
    for (int r = 0; r < R; ++r) sum[r][j] = fma(even[r], (f32x8)(pairs << 16), sum[r][j]);
    for (int r = 0; r < R; ++r) sum[r][j] = fma(odd[r], (f32x8)(pairs & 0xffff0000u), sum[r][j]);
  }
}

// sums[r * kBlock + j] = <x_r, w_j> for R rows of x and W rows of weights: R * W chains of FMAs hide their latency.
template <int R, int W, class T>
RMT_INLINE void tile(float* sums, const float* x, const T* const* w, int64_t dim) {
  const int64_t next_block = kBlock * dim * int64_t(sizeof(T));
  f32x8 sum[R][W] = {};
  int64_t i = 0;
  for (; i + kChunk <= dim; i += kChunk) {
    if (R == 1)  // the same place in the next block: memory is what one row waits for
      for (int j = 0; j < W; ++j) __builtin_prefetch(reinterpret_cast<const char*>(w[j] + i) + next_block);
    add16(sum, x, w, i, dim);
  }
  if (i + 8 <= dim) {
    add8(sum, x, w, i, dim);
    i += 8;
  }
  for (int r = 0; r < R; ++r) {
    const f32x4 low = lane_sums(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
    std::memcpy(sums + r * kBlock, &low, sizeof(low));
    if (W < kBlock) continue;
    const f32x4 high = lane_sums(sum[r][W - 4], sum[r][W - 3], sum[r][W - 2], sum[r][W - 1]);
    store8(sums + r * kBlock, __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7));
  }
  for (; i < dim; ++i)
    for (int j = 0; j < W; ++j)
      for (int r = 0; r < R; ++r) sums[r * kBlock + j] += x[r * dim + i] * to_float(w[j][i]);
}

// out[j] = sums[j] + bias[j] for the first `count` of a block.
template <class T, class Out>
RMT_INLINE void finish(Out* out, const float* sums, const T* bias, int count) {
  f32x8 total = load8(sums);
  if (count == kBlock) return store_as(out, bias ? total + load8(bias) : total);
  for (int j = 0; bias && j < count; ++j) total[j] += to_float(bias[j]);
  Out block[kBlock];
  store_as(block, total);
  std::memcpy(out, block, sizeof(Out) * size_t(count));
}

template <int R, class T, class Out>
RMT_INLINE void multiply_rows(const RowProducts& args, int64_t row, int64_t first, int count, const T* const* w) {
  float sums[R * kBlock];
  const float* const x = args.x + row * args.dim;
  if (R == 1) {
    tile<R, kBlock>(sums, x, w, args.dim);
  } else {
    tile<R, kBlock / 2>(sums, x, w, args.dim);
    tile<R, kBlock / 2>(sums + kBlock / 2, x, w + kBlock / 2, args.dim);
  }
  for (int r = 0; r < R; ++r) {
    Out* const out = static_cast<Out*>(args.out) + (row + r) * args.out_dim + first;
    const T* const bias = args.bias ? static_cast<const T*>(args.bias) + first : nullptr;
    finish(out, sums + r * kBlock, bias, count);
  }
}

template <class T, class Out>
void row_products_of(const RowProducts& args, int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end; first += kBlock) {
    const int count = int(end - first < kBlock ? end - first : kBlock);
    const T* w[kBlock];
    for (int j = 0; j < kBlock; ++j)  // past the end the last row is read again: a result nobody keeps
      w[j] = static_cast<const T*>(args.weights) + (first + (j < count ? j : count - 1)) * args.dim;
    int64_t row = 0;
    if (sizeof(T) == 4)  // the conversion of bfloat16 wants a register more than three rows leave
      for (; args.rows - row >= 3 && args.rows - row != 4; row += 3)
        multiply_rows<3, T, Out>(args, row, first, count, w);
    for (; args.rows - row >= 2; row += 2) multiply_rows<2, T, Out>(args, row, first, count, w);
    if (row < args.rows) multiply_rows<1, T, Out>(args, row, first, count, w);
  }
}

}  // namespace

void load_activations(float* out, const void* x, DType type, bool pairs, int64_t rows, int64_t dim) {
  for (int64_t r = 0; r < rows; ++r, out += dim) {
    const bfloat16* const half = static_cast<const bfloat16*>(x) + r * dim;
    const float* const full = static_cast<const float*>(x) + r * dim;
    int64_t i = 0;
    for (; i + kChunk <= dim; i += kChunk) {
      const f32x8 a = type == DType::kBFloat16 ? load8(half + i) : load8(full + i);
      const f32x8 b = type == DType::kBFloat16 ? load8(half + i + 8) : load8(full + i + 8);
      store8(out + i, pairs ? __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) : a);
      store8(out + i + 8, pairs ? __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15) : b);
    }
    for (; i < dim; ++i) out[i] = type == DType::kBFloat16 ? to_float(half[i]) : full[i];
  }
}

void row_products(const RowProducts& args, int64_t begin, int64_t end) {
  const bool half_out = args.out_type == DType::kBFloat16;
  if (args.weight_type == DType::kBFloat16)
    return half_out ? row_products_of<bfloat16, bfloat16>(args, begin, end)
                    : row_products_of<bfloat16, float>(args, begin, end);
  return half_out ? row_products_of<float, bfloat16>(args, begin, end)
                  : row_products_of<float, float>(args, begin, end);
}

}  // namespace RMT_ISA
}  // namespace rmtkernels
