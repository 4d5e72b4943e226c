// What lets one .cu file serve nvcc (CUDA), hipcc (HIP, never tried) and g++ with RMT_EMULATE (the kernels run on the
// CPU, see tests/emulate). Kernels are plain CUDA C++; three things go through macros, because g++ cannot parse them:
//   RMT_LAUNCH(kernel, grid, block, shared_bytes, stream, args...)   for kernel<<<...>>>(args...)
//   RMT_SHARED                                                       for __shared__
//   RMT_DYN_SHARED(type, name)                                       for extern __shared__ type name[]
// No torch header is included here.
#pragma once

#include <cstdint>

#if defined(RMT_EMULATE)
#include "cuda_on_cpu.h"
#define RMT_WARP_SIZE EMU_WARP
#elif defined(__HIPCC__)
#include <hip/hip_runtime.h>
#define cudaError_t hipError_t
#define cudaStream_t hipStream_t
#define cudaSuccess hipSuccess
#define cudaErrorInvalidValue hipErrorInvalidValue
#define cudaErrorInvalidConfiguration hipErrorInvalidConfiguration
#define cudaFuncAttributeMaxDynamicSharedMemorySize hipFuncAttributeMaxDynamicSharedMemorySize
#define cudaFuncSetAttribute hipFuncSetAttribute
#define cudaGetLastError hipGetLastError
#define cudaGetErrorString hipGetErrorString
#ifndef RMT_WARP_SIZE
#define RMT_WARP_SIZE 64  // 32 for RDNA
#endif
#else
#include <cuda_runtime.h>
#define RMT_WARP_SIZE 32
#endif

#if !defined(RMT_EMULATE)
#define RMT_LAUNCH(kernel, grid, block, shared, stream, ...) \
  (kernel)<<<(grid), (block), (shared), (stream)>>>(__VA_ARGS__)
#define RMT_SHARED __shared__
#define RMT_DYN_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char rmt_dyn_shared[]; \
  type* name = reinterpret_cast<type*>(rmt_dyn_shared)
#endif

namespace rmtkernels {

constexpr int kWarpSize = RMT_WARP_SIZE;
static_assert(kWarpSize == 32 || kWarpSize == 64, "warps have 32 lanes, wavefronts 32 or 64");

#if RMT_WARP_SIZE == 64
using LaneMask = uint64_t;
#else
using LaneMask = unsigned;
#endif
constexpr LaneMask kAllLanes = ~LaneMask(0);

// Sum over the lanes of a whole warp, the same bits in every lane.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

}  // namespace rmtkernels
