// The CPU kernels: plain pointers and sizes, no torch. Each *_kernels.cpp is compiled once per instruction set into a
// namespace of that name; kernels() returns the set in use. Threads are the caller's business.
#pragma once

#include "rmtkernels/portability.h"
#include "rmtkernels/spectrum.h"

namespace rmtkernels {

enum class DType { kFloat32, kBFloat16, kFloat16, kFloat64 };

// The rows of a batch that count: rows[index[k] * stride ...], unit stride within, with their weights.
struct RowList {
  const void* rows;
  DType type;
  int64_t stride;
  const int64_t* index;
  const double* weight;
  int64_t count;
};

// Panels of columns of a packed batch: the part of the scatter matrix that one thread adds to.
struct PanelBlock {
  int64_t row_begin, row_end, column_begin, column_end;
};
constexpr int64_t kScatterDepth = 128;  // rows summed in registers before their sum goes to memory

struct RowProducts {
  const float* x;       // (rows, dim), from load_activations unless all is float32
  const void* weights;  // (out_dim, dim)
  const void* bias;     // (out_dim,) of the weights' type, or null
  void* out;            // (rows, out_dim)
  DType weight_type;    // float32 or bfloat16
  DType out_type;       // float32 or bfloat16
  int64_t rows, dim, out_dim;
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
  // Converts a strided row to float32, a bfloat16 one to the order in which dot_rows wants it.
  void (*load_row)(float* x, const void* row, DType type, int64_t stride, int64_t dim);
  // <x, x> of such a row, to the bit what dot_rows gives.
  double (*row_norm)(const float* x, int64_t dim);
  // out[j] = <x, rows[j]> for `count` rows that lie `dim` elements apart.
  void (*dot_rows)(double* out, const float* x, const void* rows, DType type, int64_t count, int64_t dim);
  // Eigenvalues, ascending, of the symmetric matrices whose lower triangles are given.
  void (*eigvalsh_f32)(const float* matrices, float* eigenvalues, int64_t n, int64_t begin, int64_t end);
  void (*eigvalsh_f64)(const double* matrices, double* eigenvalues, int64_t n, int64_t begin, int64_t end);
  // A problem is layer * batch + sequence, or a sequence alone if the layers are joined.
  void (*descriptors)(const DescriptorArgs& args, int64_t begin, int64_t end);
  // In float64, overflow included.
  double (*squared_norm)(const void* row, DType type, int64_t dim);
  // sums[j] += sum of weight * row[j] over the rows in their order, for the columns j = begin .. end - 1.
  void (*add_rows)(double* sums, const RowList& rows, int64_t begin, int64_t end);
  // Columns of a panel. The scatter matrix and what is packed are float32, or float64 if `is_double`.
  int64_t (*panel_width)(bool is_double);
  // Packs sqrt(weight) (row - mean) as rows place, place + 1, ... of the panels begin .. end - 1.
  void (*pack_rows)(void* packed, bool is_double, int64_t place, const RowList& rows, const double* mean, int64_t dim,
                    int64_t begin, int64_t end);
  // Adds the outer products of `depth` packed rows to the lower triangle of the (dim, dim) scatter matrix.
  void (*add_scatter)(void* scatter, const void* packed, bool is_double, int64_t depth, int64_t dim,
                      const PanelBlock& block);
  // Multiplies the lower triangle's rows begin .. end - 1; by 0 without reading them.
  void (*scale_lower)(void* scatter, bool is_double, int64_t dim, double scale, int64_t begin, int64_t end);
  // Rows (rows, dim) as float32; `pairs` is the order that row_products wants for bfloat16 weights. Never in place.
  void (*load_activations)(float* out, const void* x, DType type, bool pairs, int64_t rows, int64_t dim);
  // out[r][j] = <x[r], weights[j]> + bias[j] for all rows r and outputs begin .. end - 1.
  void (*row_products)(const RowProducts& args, int64_t begin, int64_t end);
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
