// The instructions by which products of 16-bit numbers reach the tensor cores of an NVIDIA GPU (sm_80 and newer), each
// behind one wrapper. Everywhere else, under emulation too, a scalar body does the same from lane to lane.
//
// "Warp" means 32 threads here, lane = threadIdx.x % 32, blocks are one-dimensional; all lanes of the hardware's warp
// must come along.
#pragma once

#include <type_traits>

#include "rmtkernels/gpu.cuh"
#include "rmtkernels/scalar.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define RMT_TENSOR_CORES 1
#else
#define RMT_TENSOR_CORES 0
#endif

namespace rmtkernels {

constexpr int kMmaLanes = 32;

// Four 8 x 8 matrices of float16, each given by the addresses of its rows: lane l brings row l % 8 of matrix l / 8, 16
// bytes on a multiple of 16. part[i] of lane l: entries (2 (l % 4), l / 4) and (2 (l % 4) + 1, l / 4) of matrix i.
__device__ __forceinline__ void load_transposed(uint32_t (&part)[4], const float16* row) {
#if RMT_TENSOR_CORES
  const unsigned address = unsigned(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(part[0]), "=r"(part[1]), "=r"(part[2]), "=r"(part[3])
               : "r"(address)
               : "memory");
#else
  const int lane = threadIdx.x % kMmaLanes;
  for (int i = 0; i < 4; ++i) {
    part[i] = 0;
    for (int half = 0; half < 2; ++half) {
      const auto from =
          __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(row), 8 * i + 2 * (lane % 4) + half, kMmaLanes);
      part[i] |= uint32_t(reinterpret_cast<const float16*>(from)[lane / 4].bits) << (16 * half);
    }
  }
#endif
}

// Four 8 x 8 matrices as load_transposed takes them, of any 16-bit type and not transposed: part[i] of lane l: entries
// (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1) of matrix i.
template <class Half>
__device__ __forceinline__ void load_matrices(uint32_t (&part)[4], const Half* row) {
#if RMT_TENSOR_CORES
  const unsigned address = unsigned(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(part[0]), "=r"(part[1]), "=r"(part[2]), "=r"(part[3])
               : "r"(address)
               : "memory");
#else
  const int lane = threadIdx.x % kMmaLanes;
  for (int i = 0; i < 4; ++i) {
    const auto from = __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(row), 8 * i + lane / 4, kMmaLanes);
    const Half* const pair = reinterpret_cast<const Half*>(from) + lane % 4 * 2;
    part[i] = pair[0].bits | uint32_t(pair[1].bits) << 16;
  }
#endif
}

// Two numbers rounded to float16, the first in the low half.
__device__ __forceinline__ uint32_t round_pair(float first, float second) {
#if RMT_TENSOR_CORES
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
#else
  float16 low, high;
  round_to(first, &low);
  round_to(second, &high);
  return low.bits | uint32_t(high.bits) << 16;
#endif
}
__device__ __forceinline__ float first_of(uint32_t pair) { return to_float(float16{uint16_t(pair)}); }
__device__ __forceinline__ float second_of(uint32_t pair) { return to_float(float16{uint16_t(pair >> 16)}); }

// The float32 next to x towards zero, which is how tensor cores round sums.
RMT_HD float towards_zero(double x) {
  const float nearest = float(x);
  const double size = x < 0 ? -x : x, found = nearest < 0 ? -nearest : nearest;
  return found > size ? float_from_bits(bits_of(nearest) - 1) : nearest;
}

// d += A B, A 16 x 16 and B 16 x 8 of float16 or bfloat16, d 16 x 8 of float32, which rounds towards zero. With
// g = lane / 4 and t = lane % 4, two elements to a register, the first in the low half:
//   a[0], a[1]: A(g, 2t ..), A(g + 8, 2t ..)   a[2], a[3]: the same 8 columns on   b[0], b[1]: B(2t .., g), 8 rows on
//   d[0 .. 1]: D(g, 2t ..)                     d[2 .. 3]: D(g + 8, 2t ..)
template <class Half = float16>
__device__ __forceinline__ void multiply_add_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if RMT_TENSOR_CORES
  if constexpr (std::is_same_v<Half, bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#else
  using Word = unsigned long long;
  const auto element = [](uint32_t bits, int half) { return double(to_float(Half{uint16_t(bits >> (16 * half))})); };
  const int lane = threadIdx.x % kMmaLanes;
  double row[2][16], column[2][16];
  for (int t = 0; t < 4; ++t) {
    for (int right = 0; right < 2; ++right) {
      const Word mine = a[2 * right] | Word(a[2 * right + 1]) << 32;
      const Word both = __shfl_sync(kAllLanes, mine, lane / 4 * 4 + t, kMmaLanes);
      for (int half = 0; half < 2; ++half) {
        row[0][8 * right + 2 * t + half] = element(uint32_t(both), half);
        row[1][8 * right + 2 * t + half] = element(uint32_t(both >> 32), half);
      }
    }
    for (int n = 0; n < 2; ++n) {
      const Word both = __shfl_sync(kAllLanes, b0 | Word(b1) << 32, (2 * (lane % 4) + n) * 4 + t, kMmaLanes);
      for (int half = 0; half < 2; ++half) {
        column[n][2 * t + half] = element(uint32_t(both), half);
        column[n][8 + 2 * t + half] = element(uint32_t(both >> 32), half);
      }
    }
  }
  for (int m = 0; m < 2; ++m)
    for (int n = 0; n < 2; ++n) {
      double sum = d[2 * m + n];
      for (int k = 0; k < 16; ++k) sum += row[m][k] * column[n][k];
      d[2 * m + n] = towards_zero(sum);
    }
#endif
}

}  // namespace rmtkernels
