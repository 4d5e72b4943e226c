// Eight floats or four doubles at a time, in GCC's vector types: the same source is AVX2 where -mavx2 is given and
// pairs of 16-byte operations elsewhere. Only what the compiler cannot infer is written by hand.
#pragma once

#include <cstring>

#include "rmtkernels/scalar.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Vector arguments never cross a library boundary here, so the ABI note about them says nothing.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace rmtkernels {
inline namespace RMT_ISA {

typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));
typedef double f64x4 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef int64_t i64x4 __attribute__((vector_size(32)));
typedef uint64_t u64x4 __attribute__((vector_size(32)));

#define RMT_INLINE inline __attribute__((always_inline))

RMT_INLINE f64x4 load4(const double* p) {
  f64x4 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
RMT_INLINE f64x4 load4(const float* p) {
  f32x4 v;
  std::memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, f64x4);
}
RMT_INLINE void store4(double* p, f64x4 v) { std::memcpy(p, &v, sizeof(v)); }
RMT_INLINE f64x4 splat(double x) { return f64x4{x, x, x, x}; }

RMT_INLINE f32x8 load8(const float* p) {
  f32x8 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
RMT_INLINE void store8(float* p, f32x8 v) { std::memcpy(p, &v, sizeof(v)); }
RMT_INLINE f32x8 load8(const bfloat16* p) {
#if defined(__AVX2__)
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return (f32x8)_mm256_slli_epi32(wide, 16);
#else
  f32x8 v;
  for (int i = 0; i < 8; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}
RMT_INLINE f32x8 load8(const float16* p) {
#if defined(__AVX2__) && defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  f32x8 v;
  for (int i = 0; i < 8; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

RMT_INLINE f32x8 fma(f32x8 a, f32x8 b, f32x8 c) {
#if defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
RMT_INLINE f64x4 fma(f64x4 a, f64x4 b, f64x4 c) {
#if defined(__FMA__)
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

// The eight lanes as four doubles, lanes i and i + 4 added.
RMT_INLINE f64x4 fold(f32x8 v) {
  const f32x4 low = __builtin_shufflevector(v, v, 0, 1, 2, 3);
  const f32x4 high = __builtin_shufflevector(v, v, 4, 5, 6, 7);
  return __builtin_convertvector(low, f64x4) + __builtin_convertvector(high, f64x4);
}

// Sums of the lanes of four vectors, one sum per lane of the result. The order of additions is the same for each.
RMT_INLINE f64x4 lane_sums(f64x4 a, f64x4 b, f64x4 c, f64x4 d) {
  const f64x4 ab = __builtin_shufflevector(a, b, 0, 4, 2, 6) + __builtin_shufflevector(a, b, 1, 5, 3, 7);
  const f64x4 cd = __builtin_shufflevector(c, d, 0, 4, 2, 6) + __builtin_shufflevector(c, d, 1, 5, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}
RMT_INLINE double lane_sum(f64x4 a) { return (a[0] + a[1]) + (a[2] + a[3]); }

}  // namespace RMT_ISA
}  // namespace rmtkernels
