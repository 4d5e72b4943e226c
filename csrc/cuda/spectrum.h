// Plain launchers of the spectrum kernels: raw device pointers, sizes, a stream. No torch, no CUDA header.
#pragma once

#include "rmtkernels/spectrum.h"

namespace rmtkernels {

// Both queue one kernel on `stream`, a cudaStream_t of the current device, and return a cudaError_t. They allocate
// nothing, wait for nothing, and can be captured in a CUDA graph.
extern "C" int rmtkernels_cuda_spectrum_descriptors(const DescriptorArgs* args, void* stream);

// Eigenvalues, ascending, of `problems` symmetric n x n matrices of which the lower triangles are read.
extern "C" int rmtkernels_cuda_spectrum_eigvalsh(const void* matrices, void* eigenvalues, bool is_double, int64_t n,
                                                 int64_t problems, void* stream);

}  // namespace rmtkernels
