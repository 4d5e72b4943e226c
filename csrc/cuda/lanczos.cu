// Launch shapes of the lanczos kernels, and how many sweeps there may be.
#include <algorithm>

#include "cuda/lanczos.h"
#include "rmtkernels/lanczos.cuh"

namespace rmtkernels {
namespace {

constexpr int kSweeps = 4;      // the last two where a random row came in: as it is, then made orthogonal
constexpr int kMoreSweeps = 6;  // a random row of which little is left, or a pivot below float64's own rounding
constexpr int64_t kStateNumbers = (sizeof(LanczosState) + sizeof(double) - 1) / sizeof(double);

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t part_count(int64_t dim) { return std::min<int64_t>(ceil_div(dim, kChunk), kMostParts); }

bool in_pairs(const void* rows, int64_t dim, size_t size) {
  return dim % kLaneColumns == 0 && reinterpret_cast<uintptr_t>(rows) % (kLaneColumns * size) == 0;
}

// Rows of the group at `first`: those for which there is room and those beyond do not share one.
int64_t count_at(const LanczosRows& l, int64_t first) {
  const int64_t left = l.count - first, room = l.dim - l.size - first;
  return std::min<int64_t>(kBlockRows, room > 0 ? std::min(left, room) : left);
}

template <class T>
LanczosGroup<T> group_at(const LanczosRows& l, int64_t first) {
  LanczosGroup<T> g{};
  g.rows = static_cast<const T*>(l.rows) + first * l.dim;
  g.basis = static_cast<const T*>(l.basis);
  g.before = static_cast<const T*>(l.unit);
  g.noise = static_cast<const T*>(l.noise) + first * l.dim;
  g.unit = static_cast<T*>(l.unit) + first * l.dim;
  g.negligible = l.negligible;
  g.products = l.products + first * l.size;
  g.triangle = l.triangle + first;
  g.dim = l.dim;
  g.size = l.size;
  g.known = std::min(l.size + first, l.dim);
  g.width = l.count;
  g.shift = l.shift;
  g.count = int(count_at(l, first));
  g.part_count = int(part_count(l.dim));
  g.in_pairs = in_pairs(l.basis, l.dim, sizeof(T)) && in_pairs(l.unit, l.dim, sizeof(T));
  g.state = reinterpret_cast<LanczosState*>(l.workspace);
  g.coefficients = l.workspace + kStateNumbers;
  g.parts = g.coefficients + (g.known + kBlockRows) * kBlockRows;
  return g;
}

template <class T>
cudaError_t sweep(const LanczosGroup<T>& g, int number, bool sums, cudaStream_t stream) {
  RMT_LAUNCH((lanczos_sweep_kernel<T>), dim3(unsigned(g.part_count)), dim3(kSweepThreads), kSweepShared, stream, g,
             number);
  const int64_t blocks = ceil_div((g.known + kBlockRows) * kBlockRows, kSumEntries);
  if (sums) RMT_LAUNCH((lanczos_sum_kernel<T>), dim3(unsigned(blocks)), dim3(kSumThreads), 0, stream, g, number);
  return cudaGetLastError();
}

template <class T>
cudaError_t orthonormalize(const LanczosGroup<T>& g, cudaStream_t stream) {
  cudaError_t error = sweep(g, 0, true, stream);
  if (error != cudaSuccess || g.known == g.dim) return error;
  error = sweep(g, 1, true, stream);
  const int sweeps = sizeof(T) == sizeof(double) || g.known >= g.dim / 2 ? kMoreSweeps : kSweeps;
  for (int number = 2; number < sweeps && error == cudaSuccess; ++number) {
    const bool last = number == sweeps - 1;
    RMT_LAUNCH((lanczos_factor_kernel<T>), dim3(1), dim3(kFactorThreads), 0, stream, g, number, last);
    error = sweep(g, number, !last, stream);
  }
  return error;
}

template <class T>
cudaError_t orthonormalize_all(const LanczosRows& l, cudaStream_t stream) {
  cudaError_t error =
      cudaFuncSetAttribute(lanczos_sweep_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSweepShared);
  for (int64_t first = 0; first < l.count && error == cudaSuccess; first += count_at(l, first))
    error = orthonormalize(group_at<T>(l, first), stream);
  return error;
}

}  // namespace

int64_t rmtkernels_cuda_lanczos_workspace(int64_t count, int64_t size, int64_t dim) {
  return kStateNumbers + (part_count(dim) + 1) * (size + count + kBlockRows) * kBlockRows;
}

int rmtkernels_cuda_lanczos_orthonormalize(const LanczosRows* rows, void* stream) {
  const LanczosRows& l = *rows;
  if (l.dim < 1 || l.size < 0 || l.count < 0 || l.shift < 0 || l.shift >= l.dim) return cudaErrorInvalidValue;
  return l.is_double ? orthonormalize_all<double>(l, static_cast<cudaStream_t>(stream))
                     : orthonormalize_all<float>(l, static_cast<cudaStream_t>(stream));
}

}  // namespace rmtkernels
