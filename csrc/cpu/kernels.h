// The CPU kernels: plain pointers and sizes, no torch. Each *_kernels.cpp is compiled once per instruction set into a
// namespace of that name; kernels() returns the set in use. Threads are the caller's business.
#pragma once

#include "rmtkernels/portability.h"

namespace rmtkernels {

enum class DType { kFloat32, kBFloat16, kFloat16 };

struct DescriptorArgs {
  const float* gram;    // (layers, batch, window, window)
  const int64_t* seen;  // rows seen, one per sequence, `seen_stride` apart
  const double* laws;   // law_table_size(window): see rmtkernels/spectrum.h
  float* descriptors;   // [layer][sequence][descriptor]
  float* eigenvalues;   // [layer][sequence][window], descending
  int64_t seen_stride;
  int64_t descriptors_stride[2];
  int64_t eigenvalues_stride[2];
  int64_t layers, batch, window, dim;
  int joint;  // JointSpectrum
  int noise;  // Noise
  bool center;
  bool normalize;  // rows of activations to mean square 1 first
};

// A matrix (rows, cols) and eight vectors side by side, packed (cols, 8); lanes beyond `lanes` are zero.
struct MultiplyArgs {
  const void* matrix;  // rows `stride` elements apart
  const void* block;
  void* out;         // multiply: (lanes, rows)
  const void* mean;  // multiply_gram: (2, cols), subtracted from each row one after the other; may be null
  double* sums;      // multiply_gram: (chunks, cols, 8)
  void* scratch;     // multiply_gram: gram_scratch(cols) for each chunk
  int64_t stride, rows, cols;
  int64_t chunk;  // rows of one problem of multiply_gram
  int lanes;
};
constexpr int kTileRows = 12;
// Rows of a tile must not all fall into one set of the cache, as they would a power of two apart.
static constexpr int64_t tile_stride(int64_t cols) { return cols + 16; }
static constexpr int64_t gram_scratch(int64_t cols) { return 8 * cols + kTileRows * tile_stride(cols); }

// One table per instruction set. Problems are numbered; a call does problems begin .. end - 1.
struct Kernels {
  // Converts a strided row to float32 and returns its squared norm.
  double (*load_row)(float* x, const void* row, DType type, int64_t stride, int64_t dim);
  // out[j] = <x, rows[j]> for `count` rows that lie `dim` elements apart.
  void (*dot_rows)(double* out, const float* x, const void* rows, DType type, int64_t count, int64_t dim);
  // Eigenvalues, ascending, of the symmetric matrices whose lower triangles are given.
  void (*eigvalsh_f32)(const float* matrices, float* eigenvalues, int64_t n, int64_t begin, int64_t end);
  void (*eigvalsh_f64)(const double* matrices, double* eigenvalues, int64_t n, int64_t begin, int64_t end);
  // A problem is layer * batch + sequence, or a sequence alone if the layers are joined.
  void (*descriptors)(const DescriptorArgs& args, int64_t begin, int64_t end);
  // Products with a narrow block: A v, a problem is a row; X'X v, a problem is a chunk of rows.
  void (*multiply_f32)(const MultiplyArgs& args, int64_t begin, int64_t end);
  void (*multiply_f64)(const MultiplyArgs& args, int64_t begin, int64_t end);
  void (*multiply_gram_f32)(const MultiplyArgs& args, int64_t begin, int64_t end);
  void (*multiply_gram_f64)(const MultiplyArgs& args, int64_t begin, int64_t end);
};

const Kernels& kernels();

// Name of the instruction set in use: "avx2" or "baseline".
const char* cpu_isa();
bool cpu_isa_available(const char* name);
// "auto" takes the best one there is. False if the name is unknown or this processor lacks it; then nothing changes.
bool set_cpu_isa(const char* name);

}  // namespace rmtkernels
