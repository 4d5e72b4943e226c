// Launch shapes of the spectrum kernels.
#include <algorithm>

#include "cuda/spectrum.h"
#include "rmtkernels/spectrum.cuh"

#ifndef RMT_PROBLEMS_PER_LAUNCH
#define RMT_PROBLEMS_PER_LAUNCH \
  0x7fffffff  // what a grid holds; tests set it to 2, to see what happens between launches
#endif

namespace rmtkernels {
namespace {

constexpr int64_t kProblemsPerLaunch = RMT_PROBLEMS_PER_LAUNCH;

dim3 block_shape(int64_t n) { return dim3(unsigned((n + kWarpSize - 1) / kWarpSize * kWarpSize), kParts); }

// A kernel may use 48 KB of shared memory; more has to be asked for, on each device. Asking waits for nothing.
template <class Kernel>
cudaError_t allow_shared(Kernel kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
}

// launch(first, count) for all problems, as many at a time as a grid holds.
template <class Launch>
cudaError_t launch_all(int64_t problems, const Launch& launch) {
  for (int64_t first = 0; first < problems; first += kProblemsPerLaunch) {
    launch(first, unsigned(std::min(problems - first, kProblemsPerLaunch)));
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <class T>
cudaError_t eigvalsh(const void* matrices, void* eigenvalues, int64_t n, int64_t problems, cudaStream_t stream) {
  const size_t shared = spectrum_shared_bytes(n, false);
  const cudaError_t error = allow_shared(spectrum_eigvalsh_kernel<T>, shared);
  if (error != cudaSuccess) return error;
  return launch_all(problems, [&](int64_t first, unsigned count) {
    RMT_LAUNCH((spectrum_eigvalsh_kernel<T>), dim3(count), block_shape(n), shared, stream,
               static_cast<const T*>(matrices), static_cast<T*>(eigenvalues), int(n), first);
  });
}

}  // namespace

int rmtkernels_cuda_spectrum_descriptors(const DescriptorArgs* args, void* stream) {
  if (args->window < 1 || args->window > kMaxWindow) return cudaErrorInvalidValue;
  const size_t shared = spectrum_shared_bytes(args->window, true);
  const cudaError_t error = allow_shared(spectrum_descriptors_kernel, shared);
  if (error != cudaSuccess) return error;
  const int64_t problems = args->joint == kPerLayer ? args->layers * args->batch : args->batch;
  return launch_all(problems, [&](int64_t first, unsigned count) {
    RMT_LAUNCH(spectrum_descriptors_kernel, dim3(count), block_shape(args->window), shared,
               static_cast<cudaStream_t>(stream), *args, first);
  });
}

int rmtkernels_cuda_spectrum_eigvalsh(const void* matrices, void* eigenvalues, bool is_double, int64_t n,
                                      int64_t problems, void* stream) {
  if (n < 1 || n > kMaxWindow) return cudaErrorInvalidValue;
  return is_double ? eigvalsh<double>(matrices, eigenvalues, n, problems, static_cast<cudaStream_t>(stream))
                   : eigvalsh<float>(matrices, eigenvalues, n, problems, static_cast<cudaStream_t>(stream));
}

}  // namespace rmtkernels
