// Launch shapes of the covariance kernels, and their working memory.
#include <algorithm>
#include <cfloat>

#include "cuda/arena.h"
#include "cuda/covariance.h"
#include "rmtkernels/covariance_scatter.cuh"
#include "rmtkernels/covariance_tensor.cuh"

namespace rmtkernels {
namespace {

constexpr int64_t kMostBlocksX = (int64_t(1) << 31) - 1;

CovarianceWork take_work(Arena& arena, int64_t rows, int64_t dim) {
  CovarianceWork work{};
  work.given = arena.take<double>(rows);
  work.offset = arena.take<int64_t>(rows);
  work.weight = arena.take<double>(rows);
  work.root = arena.take<double>(rows);
  work.parts = arena.take<double>(2 * std::min(kMostParts, ceil_div(rows, kLeastPartRows)) * dim);
  work.mean = arena.take<double>(dim);
  work.gap = arena.take<double>(dim);
  work.moment = arena.take<double>(dim);
  work.reduced = arena.take<double>(3 * ceil_div(dim, kSampleThreads));
  work.selection = arena.take<CovarianceSelection>(1);
  work.plan = arena.take<CovariancePlan>(1);
  return work;
}

template <class T>
T* take_slabs(Arena& arena, int64_t rows, int64_t dim) {
  const int64_t tiles = tiles_of(dim, kTile<T>), splits = tiles > 0 ? splits_of(rows, tiles) : 1;
  return arena.take<T>(splits > 1 ? splits * tiles * kTile<T> * kTile<T> : 0);
}

// A kernel may use 48 KB of shared memory; more has to be asked for, on each device. Asking waits for nothing.
template <class Kernel>
cudaError_t allow_shared(Kernel kernel, size_t bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
}

template <class X, class T>
cudaError_t launch_products(const CovarianceScatter<T>& scatter, dim3 grid, cudaStream_t stream) {
  if constexpr (sizeof(X) == 2 && sizeof(T) == 4) {
    const cudaError_t error = allow_shared(covariance_tensor_kernel<X>, sizeof(TensorShared));
    if (error != cudaSuccess) return error;
    RMT_LAUNCH((covariance_tensor_kernel<X>), grid, dim3(kScatterThreads), sizeof(TensorShared), stream, scatter);
  } else {
    RMT_LAUNCH((covariance_scatter_kernel<X, T>), grid, dim3(kScatterThreads), 0, stream, scatter);
  }
  return cudaGetLastError();
}

template <class X, class T>
cudaError_t add_scatter(const CovarianceBatch& batch, const CovarianceWork& work, T* scatter, T* slabs,
                        cudaStream_t stream) {
  const int64_t tiles = tiles_of(batch.dim, kTile<T>), splits = splits_of(batch.rows, tiles);
  if (tiles > kMostBlocksX) return cudaErrorInvalidConfiguration;
  const CovarianceScatter<T> args{batch, work, scatter, slabs};
  const cudaError_t error = launch_products<X, T>(args, dim3(unsigned(tiles), unsigned(splits)), stream);
  if (error != cudaSuccess || splits == 1) return error;
  RMT_LAUNCH((covariance_slabs_kernel<T>), dim3(unsigned(tiles), kSlabBlocks), dim3(kScatterThreads), 0, stream, args);
  return cudaGetLastError();
}

// Everything up to the new mean and totals.
template <class X, class T>
cudaError_t add_sample(const CovarianceUpdate& u, const CovarianceBatch& batch, const CovarianceWork& work,
                       cudaStream_t stream) {
  constexpr double kLargest = sizeof(T) == 8 ? DBL_MAX : double(FLT_MAX);
  const int64_t norm_blocks = ceil_div(u.rows, kSampleThreads / kWarpSize);
  if (norm_blocks > kMostBlocksX) return cudaErrorInvalidConfiguration;
  RMT_LAUNCH((covariance_norms_kernel<X>), dim3(unsigned(norm_blocks)), dim3(kSampleThreads), 0, stream, batch,
             kLargest, work.given);
  RMT_LAUNCH(covariance_select_kernel, dim3(1), dim3(kSelectThreads), 0, stream, batch, kLargest, work);
  if (u.dim > 0) {
    const int64_t across = ceil_div(u.dim, kLanesAcross * Pack<X>::kSize),
                  parts = std::min(kMostParts, ceil_div(u.rows, kLeastPartRows));
    RMT_LAUNCH((covariance_sums_kernel<X>), dim3(unsigned(across), unsigned(parts)), dim3(kSampleThreads), 0, stream,
               batch, work);
    RMT_LAUNCH((covariance_columns_kernel<T>), dim3(unsigned(ceil_div(u.dim, kSampleThreads))), dim3(kSampleThreads), 0,
               stream, u.mean, static_cast<const T*>(u.scatter), u.totals, u.dim, work);
  }
  RMT_LAUNCH(covariance_commit_kernel, dim3(1), dim3(kSampleThreads), 0, stream, u.mean, u.totals, u.dim, u.decay,
             kLargest, work);
  return cudaGetLastError();
}

template <class X, class T>
cudaError_t update(const CovarianceUpdate& u, cudaStream_t stream) {
  CovarianceBatch batch{};
  batch.data = u.batch;
  batch.weights = u.weights;
  batch.mask = u.mask;
  batch.rows = u.rows;
  batch.dim = u.dim;
  batch.row_stride = u.row_stride;
  batch.weight_stride = u.weight_stride;
  batch.mask_stride = u.mask_stride;
  batch.weights_are_double = u.weights_are_double;
  batch.allows_packs = reinterpret_cast<uintptr_t>(u.batch) % 16 == 0 && u.row_stride * int64_t(sizeof(X)) % 16 == 0;
  Arena arena(u.workspace);
  const CovarianceWork work = take_work(arena, u.rows, u.dim);
  const cudaError_t error = add_sample<X, T>(u, batch, work, stream);
  if (error != cudaSuccess || u.dim == 0) return error;
  return add_scatter<X, T>(batch, work, static_cast<T*>(u.scatter), take_slabs<T>(arena, u.rows, u.dim), stream);
}

template <class T>
cudaError_t update_from(const CovarianceUpdate& u, cudaStream_t stream) {
  switch (u.type) {
    case SampleType::kFloat32:
      return update<float, T>(u, stream);
    case SampleType::kBFloat16:
      return update<bfloat16, T>(u, stream);
    case SampleType::kFloat16:
      return update<float16, T>(u, stream);
    case SampleType::kFloat64:
      return update<double, T>(u, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int64_t rmtkernels_cuda_covariance_workspace(int64_t rows, int64_t dim, bool scatter_is_double) {
  Arena arena(nullptr);
  take_work(arena, rows, dim);
  if (scatter_is_double)
    take_slabs<double>(arena, rows, dim);
  else
    take_slabs<float>(arena, rows, dim);
  return arena.used();
}

int rmtkernels_cuda_covariance_update(const CovarianceUpdate* update, void* stream) {
  if (update->rows == 0) return cudaSuccess;
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  return update->scatter_is_double ? update_from<double>(*update, queue) : update_from<float>(*update, queue);
}

}  // namespace rmtkernels
