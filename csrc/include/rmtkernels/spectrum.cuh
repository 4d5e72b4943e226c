// spectrum, device code. Status: compiled and emulated; the tests in tests/gpu have passed on an H100, on no other GPU.
//
// A block works on one matrix: it loads, scales, centres and joins Gram matrices into shared memory (here), finds their
// eigenvalues (small_eigenvalues.cuh), and its first warp makes the descriptors of them (spectrum.h, shared with the
// CPU). One launch does all layers and sequences; nothing is allocated, no block waits for another, there is no atomic.
#pragma once

#include "rmtkernels/sliding_window.h"
#include "rmtkernels/small_eigenvalues.cuh"

namespace rmtkernels {

// The lanes of one warp, for the shared code of the descriptors.
struct WarpTeam {
  static constexpr int size = kWarpSize;
  int rank;

  // Called by all lanes together. The host never runs them, but nvcc compiles shared code for it too.
  RMT_HD double sum(double x) const {
#if defined(__CUDA_ARCH__) || defined(RMT_EMULATE)
    return warp_sum(x);
#else
    return x;
#endif
  }

  RMT_HD void wait() const {
#if defined(__CUDA_ARCH__) || defined(RMT_EMULATE)
    __syncwarp();
#endif
  }

  // A lane owns two points and gathers what the values give them, in the values' order: no atomics, the same bits.
  RMT_HD void histogram(const double* log_share, double log_scale, int count, double* mass) const {
    for (int k = rank; k < kBins; k += size) {
      double sum = 0;
      for (int i = 0; i < count; ++i) {
        const double position = histogram_position(log_share[i] + log_scale);
        const int bin = histogram_bin(position);
        if (bin == k) sum += 1.0 - (position - bin);
        if (bin + 1 == k) sum += position - bin;
      }
      mass[k] = sum;
    }
  }
};

// Where load_window keeps what it knows of the rows of one layer: capacity doubles each.
struct RowSums {
  double *trace, *total;                // entry on the diagonal; the row's part of the sum of all entries
  double *scaled_trace, *scaled_total;  // the same with rows of activations of mean square 1
  double* inverse;                      // what makes them so

  __device__ explicit RowSums(const BlockMatrix& m)
      : trace(m.partial),
        total(m.partial + m.capacity),
        scaled_trace(m.partial + 2 * m.capacity),
        scaled_total(m.partial + 3 * m.capacity),
        inverse(m.v) {}
};

// Sums over the rows of one layer's Gram matrix, a warp per row. Reads the lower triangle.
__device__ inline void sum_rows(const RowSums& sums, const float* gram, int rows, int window, bool normalize) {
  for (int i = warp_index(); i < rows; i += thread_count() / kWarpSize) {
    const float* row = gram + i * window;
    double below = 0, scaled = 0;
    for (int j = lane_index(); j < i; j += kWarpSize) {
      below += double(row[j]);
      if (normalize) scaled += sums.inverse[j] * double(row[j]);
    }
    below = warp_sum(below);
    if (normalize) scaled = warp_sum(scaled);
    if (lane_index() != 0) continue;
    const double entry = double(row[i]), inverse = normalize ? sums.inverse[i] : 1.0;
    sums.trace[i] = entry;
    sums.total[i] = 2 * below + entry;
    if (!normalize) continue;
    sums.scaled_trace[i] = inverse * inverse * entry;
    sums.scaled_total[i] = 2 * inverse * scaled + inverse * inverse * entry;
  }
}

// m.a += weight * G, or G_ij / sqrt(G_ii G_jj) if normalised. Threads share the work as in sum_rows, always alike: from
// layer to layer a thread meets its own entries.
__device__ inline void add_gram(const BlockMatrix& m, const float* gram, const double* inverse, double weight, int rows,
                                int window, bool normalize) {
  for (int i = warp_index(); i < rows; i += thread_count() / kWarpSize) {
    const float* row = gram + i * window;
    const double scale = normalize ? weight * inverse[i] : weight;
    for (int j = lane_index(); j <= i; j += kWarpSize)
      m.a[packed_row(i) + j] += (normalize ? scale * inverse[j] : scale) * double(row[j]);
  }
}

// G -> J G J with J = I - 11'/rows: the Gram matrix of the rows less their mean, at a cost of rows^2.
__device__ inline void center_gram(const BlockMatrix& m, int rows) {
  const int x = threadIdx.x;
  if (threadIdx.y == 0 && x < rows) m.v[x] = 1;
  __syncthreads();
  multiply(m, 0, rows);
  __syncthreads();
  if (threadIdx.y == 0 && x < rows) m.w[x] = parts_sum(m, x) / rows;  // mean of the row
  __syncthreads();
  const double total = sum_of(m.w, rows) / rows;
  if (x < rows)
    for (int j = threadIdx.y; j <= x; j += kParts) m.a[packed_row(x) + j] += (total - m.w[x]) - m.w[j];
  __syncthreads();
}

// Fills m.a with the window's Gram matrix (one layer's, or the joined one); the overlap is left to the caller. All
// threads come to the same facts.
__device__ inline WindowFacts load_window(const BlockMatrix& m, const DescriptorArgs& args, int64_t problem, int rows) {
  const int window = int(args.window);
  const bool scaled = args.joint == kJointTrace;
  const RowSums sums(m);
  FactSums facts;
  for (int t = thread_index(); t < packed_row(rows); t += thread_count()) m.a[t] = 0;
  __syncthreads();
  const int64_t first = args.joint == kPerLayer ? problem / args.batch : 0;
  const int64_t last = args.joint == kPerLayer ? first + 1 : args.layers;
  for (int64_t layer = first; layer < last; ++layer) {
    const float* gram = args.gram + (layer * args.batch + problem % args.batch) * (args.window * args.window);
    if (args.normalize) {
      for (int i = thread_index(); i < rows; i += thread_count())
        sums.inverse[i] = inverse_rms(double(gram[i * window + i]), args.dim);
      __syncthreads();
    }
    sum_rows(sums, gram, rows, window, args.normalize);
    __syncthreads();
    GramSums block = {sum_of(sums.trace, rows), sum_of(sums.total, rows)};
    const double raw_trace = centred_trace(block, rows, args.center);
    if (args.normalize) block = {sum_of(sums.scaled_trace, rows), sum_of(sums.scaled_total, rows)};
    const double trace = args.normalize ? centred_trace(block, rows, args.center) : raw_trace;
    if (trace != 0) add_gram(m, gram, sums.inverse, scaled ? 1 / trace : 1.0, rows, window, args.normalize);
    facts.add(raw_trace, block, rows, args.dim);
    __syncthreads();
  }
  if (args.center) center_gram(m, rows);
  return facts.facts(last - first, rows, args.dim, scaled);
}

// Sum of what the threads of the first `rows` rows have, in an order that does not depend on the launch.
__device__ inline double block_sum(const BlockMatrix& m, double value, int rows) {
  const int i = threadIdx.x;
  if (i < rows) m.partial[threadIdx.y * m.capacity + i] = value;
  __syncthreads();
  if (threadIdx.y == 0 && i < rows) m.v[i] = parts_sum(m, i);
  __syncthreads();
  return sum_of(m.v, rows);
}

// Overlap of the window's covariance with that of its rows but the newest, from the (centred) Gram matrix. Less the
// mean of the others, a row is y_i + f y_new with f = 1 / (rows - 1) (0 if not centred): so tr(S S') and |S'|^2 are the
// squares of a_ij + f a_nj and of a_ij + f (a_in + a_nj) + f^2 a_nn, summed without cancellation.
__device__ inline double overlap_without_newest(const BlockMatrix& m, int newest, int rows, bool center) {
  if (rows < 2) return 0.0;
  const double f = center ? 1.0 / (rows - 1) : 0.0;
  const int i = threadIdx.x;
  double squares = 0, cross = 0, rest = 0;
  if (i < rows) {
    const double shift = f * (m.a[packed(newest, i)] + f * m.a[packed(newest, newest)]);
    for (int j = threadIdx.y; j < rows; j += kParts) {
      const double entry = m.a[packed(i, j)], mixed = entry + f * m.a[packed(newest, j)], without = mixed + shift;
      squares += entry * entry;
      if (i != newest) cross += mixed * mixed;
      if (i != newest && j != newest) rest += without * without;
    }
  }
  squares = block_sum(m, squares, rows);
  cross = block_sum(m, cross, rows);
  rest = block_sum(m, rest, rows);
  return covariance_overlap(squares, cross, rest);
}

// Shared memory of a block, in bytes: a matrix of `window` rows, and room for the descriptors.
constexpr size_t spectrum_shared_bytes(int64_t window, bool descriptors) {
  return (size_t(BlockMatrix::doubles(int(window))) + (descriptors ? kBins : 0)) * sizeof(double);
}

static_assert(spectrum_shared_bytes(kMaxWindow, true) <= 99 * 1024, "what a block of sm_86, sm_89 and sm_120 may have");

// Eigenvalues in descending order, less the structural zero of centring, into m.w. No negative ones, NaN if scale is.
__device__ inline void scale_eigenvalues(const BlockMatrix& m, double scale, int rows, int n, int64_t dim) {
  for (int i = thread_index(); i < n; i += thread_count()) {
    const double value = scale > 0 ? m.values[rows - 1 - i] * scale / double(dim) : scale;
    m.w[i] = value < 0 ? 0.0 : value;
  }
  __syncthreads();
}

// Eigenvalues and descriptors of the windows of layers and sequences.
//
//   lambda = eig(J G J / D),   descriptors as in spectrum.h
//
// Shapes: as in DescriptorArgs. Grid: one block per problem, from `first_problem` on; a block is (window rounded up to
// whole warps, kParts) threads and spectrum_shared_bytes(window, true). Moves N (N + 1) / 2 floats in, twice (the
// second time from the caches), and N + 24 floats out.
__global__ void __launch_bounds__(kMaxThreads, 1)
    spectrum_descriptors_kernel(const DescriptorArgs args, int64_t first_problem) {
  RMT_DYN_SHARED(double, memory);
  const int window = int(args.window);
  const BlockMatrix m(memory, window);
  const int64_t problem = first_problem + blockIdx.x, layer = problem / args.batch, sequence = problem % args.batch;
  const int64_t seen = args.seen[sequence * args.seen_stride];
  const int rows = seen > 0 ? int(window_rows(seen, args.window)) : 0, n = degrees_of_freedom(rows, args.center);
  const int64_t dim = args.joint == kPerLayer ? args.dim : args.dim * args.layers;

  WindowFacts facts = load_window(m, args, problem, rows);
  if (rows > 0) facts.overlap = overlap_without_newest(m, int((seen - 1) % window), rows, args.center);
  __syncthreads();
  const double scale = solve(m, rows, kFloatWidth);
  scale_eigenvalues(m, scale, rows, n, dim);

  float* eigenvalues = args.eigenvalues + layer * args.eigenvalues_stride[0] + sequence * args.eigenvalues_stride[1];
  for (int i = thread_index(); i < window; i += thread_count()) eigenvalues[i] = i < n ? float(m.w[i]) : 0.0f;
  if (warp_index() != 0) return;
  float* out = args.descriptors + layer * args.descriptors_stride[0] + sequence * args.descriptors_stride[1];
  if (scale != scale) {
    for (int i = lane_index(); i < kDescriptors; i += kWarpSize) out[i] = NAN;
  } else {
    spectral_descriptors(WarpTeam{lane_index()}, {m.v, memory + BlockMatrix::doubles(window)}, m.w, n, dim, args.window,
                         args.noise, args.laws, facts, out);
  }
}

// Eigenvalues, ascending, of symmetric matrices of which the lower triangle is read.
//
// Shapes: matrices (..., n, n), eigenvalues (..., n), contiguous, from problem 0 on. Grid: one block per matrix; a
// block is (n rounded up to whole warps, kParts) threads and spectrum_shared_bytes(n, false).
template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1)
    spectrum_eigvalsh_kernel(const T* matrices, T* eigenvalues, int n, int64_t first_problem) {
  RMT_DYN_SHARED(double, memory);
  const BlockMatrix m(memory, n);
  const int64_t problem = first_problem + blockIdx.x;
  const T* matrix = matrices + problem * n * n;
  for (int i = warp_index(); i < n; i += thread_count() / kWarpSize)
    for (int j = lane_index(); j <= i; j += kWarpSize) m.a[packed_row(i) + j] = double(matrix[i * n + j]);
  __syncthreads();
  const double scale = solve(m, n, sizeof(T) == 4 ? kFloatWidth : kDoubleWidth);
  for (int i = thread_index(); i < n; i += thread_count())
    eigenvalues[problem * n + i] = T(scale > 0 ? m.values[i] * scale : scale);
}

}  // namespace rmtkernels
