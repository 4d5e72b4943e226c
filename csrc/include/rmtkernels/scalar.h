// The 16-bit floating point types as bits, and their exact conversion to float32.
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

}  // namespace RMT_ISA
}  // namespace rmtkernels
