// Launch shapes of the lowrank_linear kernels.
#include <algorithm>

#include "cuda/lowrank_linear.h"
#include "rmtkernels/lowrank_linear.cuh"

namespace rmtkernels {
namespace {

constexpr int64_t kMostBlocksX = (int64_t(1) << 31) - 1, kMostBlocksY = 65535;
constexpr int64_t kManyColumns = 2048;  // enough for the GPU with a warp for each

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads that share a sum. It must not depend on the rows, nor on the GPU: the order of summation does depend on it.
int team_of(int64_t packs, int64_t columns) {
  if (packs <= 2 * kSmallTeam) return kSmallTeam;
  return packs <= 2 * kWarpSize || columns >= kManyColumns ? kWarpSize : kProductThreads;
}

template <class W, class A, int kRows, int kColumns>
cudaError_t launch(const ThinProduct& p, cudaStream_t stream) {
  const int64_t blocks = ceil_div(p.columns, kProductThreads / p.team * kColumns);
  if (blocks > kMostBlocksX) return cudaErrorInvalidConfiguration;
  RMT_LAUNCH((lowrank_product_kernel<W, A, kRows, kColumns>), dim3(unsigned(blocks), unsigned(ceil_div(p.rows, kRows))),
             dim3(kProductThreads), 0, stream, p);
  return cudaGetLastError();
}

// A second column to a team halves how often the activations are read, which come from the caches; registers set a
// limit.
template <class W, class A>
cudaError_t launch_rows(const ThinProduct& p, cudaStream_t stream) {
  if (p.rows <= 1) return launch<W, A, 1, 1>(p, stream);
  if (p.rows <= 2) return launch<W, A, 2, 2>(p, stream);
  if (p.rows <= 4) return launch<W, A, 4, 2>(p, stream);
  if (p.rows <= 8) return launch<W, A, 8, 4>(p, stream);
  return launch<W, A, 16, 2>(p, stream);
}

template <class W, class A, class Out>
cudaError_t multiply(const A* activations, const void* weights, const void* bias, Out* out, ElementType out_type,
                     int64_t rows, int64_t dim, int64_t columns, cudaStream_t stream) {
  const int team = team_of(ceil_div(dim, Pack<W>::kSize), columns);
  constexpr int64_t kMostRows = kMostBlocksY * 16;
  for (int64_t first = 0; first < rows && columns > 0; first += kMostRows) {
    const ThinProduct part{activations + first * dim,
                           weights,
                           bias,
                           out + first * columns,
                           std::min(kMostRows, rows - first),
                           dim,
                           columns,
                           out_type,
                           team};
    const cudaError_t error = launch_rows<W, A>(part, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <class W, class A>
cudaError_t multiply_twice(const LowrankLinear& l, cudaStream_t stream) {
  const cudaError_t error = multiply<W>(static_cast<const A*>(l.x), l.down, nullptr, l.hidden, ElementType::kFloat32,
                                        l.rows, l.d_in, l.k, stream);
  if (error != cudaSuccess) return error;
  return multiply<W>(static_cast<const float*>(l.hidden), l.up, l.bias, static_cast<A*>(l.out), l.type, l.rows, l.k,
                     l.d_out, stream);
}

}  // namespace

int rmtkernels_cuda_lowrank_linear(const LowrankLinear* layer, void* stream) {
  const LowrankLinear& l = *layer;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (l.rows == 0 || l.d_out == 0) return cudaSuccess;
  if (l.type == ElementType::kFloat16 && l.weight_type == ElementType::kFloat16)
    return multiply_twice<float16, float16>(l, s);
  if (l.type == ElementType::kFloat16 || l.weight_type == ElementType::kFloat16) return cudaErrorInvalidValue;
  if (l.weight_type == ElementType::kFloat32)
    return l.type == ElementType::kFloat32 ? multiply_twice<float, float>(l, s) : multiply_twice<float, bfloat16>(l, s);
  return l.type == ElementType::kFloat32 ? multiply_twice<bfloat16, float>(l, s)
                                         : multiply_twice<bfloat16, bfloat16>(l, s);
}

}  // namespace rmtkernels
