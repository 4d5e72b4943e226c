// The 16-bit floating point types as bits, their exact conversion to float32, and rounding to them.
#pragma once

#include <cstring>

#include "rmtkernels/portability.h"

#if defined(__CUDA_ARCH__)
#include <cuda_fp16.h>
#endif

namespace rmtkernels {
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

enum class ElementType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

inline namespace RMT_ISA {

RMT_HD float float_from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

RMT_HD uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
#endif
}

RMT_HD float to_float(float x) { return x; }

RMT_HD float to_float(bfloat16 x) { return float_from_bits(uint32_t(x.bits) << 16); }

RMT_HD float to_float(float16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  // Shift exponent and mantissa into place and rebias. A subnormal is the mantissa of a number in [2^-14, 2^-13), less
  // 2^-14: no step has a subnormal float32, which some processes flush to zero. Inf and NaN keep their bits.
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  if ((x.bits & 0x7c00u) == 0x7c00u) return float_from_bits(sign | 0x7f800000u | magnitude);
  const bool subnormal = (x.bits & 0x7c00u) == 0;
  const float scaled = float_from_bits(magnitude + (subnormal ? 0x38800000u : 0x38000000u)) -
                       float_from_bits(subnormal ? 0x38800000u : 0u);
  return sign ? -scaled : scaled;
#endif
}

// To nearest, ties to even. A NaN stays one: it must not become Inf by losing its low bits.
RMT_HD void round_to(float x, float* out) { *out = x; }

RMT_HD void round_to(float x, bfloat16* out) {
  const uint32_t bits = bits_of(x);
  out->bits = uint16_t((x == x ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | 0x400000u) >> 16);
}

RMT_HD void round_to(float x, float16* out) {
#if defined(__CUDA_ARCH__)
  out->bits = __half_as_ushort(__float2half_rn(x));
#else
  // From 2^16 on there is Inf or NaN; what lies below and rounds up carries into Inf's bits. The sum with 1/2 leaves a
  // subnormal's mantissa, rounded.
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000u, magnitude = bits_of(x) & 0x7fffffffu;
  if (magnitude >= 0x47800000u) {
    out->bits = uint16_t(sign | (magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u));
  } else if (magnitude < 0x38800000u) {
    out->bits = uint16_t(sign | (bits_of(float_from_bits(magnitude) + 0.5f) - 0x3f000000u));
  } else {
    out->bits = uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
  }
#endif
}

}  // namespace RMT_ISA
}  // namespace rmtkernels
