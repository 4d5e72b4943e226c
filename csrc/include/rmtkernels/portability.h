// What lets one header serve g++, nvcc and the emulation build. No torch, no CUDA header.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define RMT_HD __host__ __device__ __forceinline__
#else
#define RMT_HD inline
#endif

// CPU kernels are compiled once per instruction set into one library. Every shared function lives in a namespace named
// after the instruction set: otherwise the linker would keep one copy for all, and a machine without AVX2 could run it.
#if !defined(RMT_ISA)
#define RMT_ISA generic
#endif
