// CPU binding of lowrank_linear: checks tensors, splits the weights over threads, leaves large batches to PyTorch.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <array>

#include "cpu/kernels.h"
#include "tensor_check.h"

namespace rmtkernels {
namespace {

constexpr int64_t kRowBlock = 16;    // rows computed at once, which bounds the scratch memory
constexpr int64_t kGrain = 1 << 16;  // products per thread below which waking another one costs more than it brings

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

DType dtype_of(ScalarType type, const char* name) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, "lowrank_linear: ", name,
                  " must be float32 or bfloat16");
  return type == ScalarType::Float ? DType::kFloat32 : DType::kBFloat16;
}
int64_t size_of(DType type) { return type == DType::kFloat32 ? 4 : 2; }

// Sizes of one call, checked. Each question to a tensor is a call into libtorch: at one row they count.
struct Shape {
  Sizes x;
  int64_t rows, d_in, k, d_out;
  DType type, weight_type;
};

Shape check_lowrank_linear(const Tensor& x, const Tensor& down, const Tensor& up, const std::optional<Tensor>& bias) {
  const Sizes xs = x.sizes(), ds = down.sizes(), us = up.sizes();
  STD_TORCH_CHECK(xs.size() >= 1 && ds.size() == 2 && us.size() == 2,
                  "lowrank_linear: x must be (..., d_in), down (k, d_in), up (d_out, k)");
  const int64_t d_in = xs[xs.size() - 1], k = ds[0], d_out = us[0];
  STD_TORCH_CHECK(ds[1] == d_in && us[1] == k, "lowrank_linear: down must be (k, ", d_in,
                  ") and up (d_out, k), got k = ", k);
  const ScalarType weights = down.scalar_type();
  const DType type = dtype_of(x.scalar_type(), "x"), weight_type = dtype_of(weights, "down");
  STD_TORCH_CHECK(up.scalar_type() == weights, "lowrank_linear: up must have down's dtype");
  if (bias) {
    const Sizes bs = bias->sizes();
    STD_TORCH_CHECK(bs.size() == 1 && bs[0] == d_out && bias->scalar_type() == weights,
                    "lowrank_linear: bias must be (", d_out, ",) of the weights' dtype");
  }
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < xs.size(); ++i) rows *= xs[i];
  return {xs, rows, d_in, k, d_out, type, weight_type};
}

// (..., d_out) of x's dtype, past the dispatcher: allocating through it costs as much as the smallest product.
Tensor empty_result(const Shape& s) {
  std::array<int64_t, 64> sizes, strides;
  const size_t dims = s.x.size();
  STD_TORCH_CHECK(dims <= sizes.size(), "lowrank_linear: x has too many dimensions");
  int64_t stride = 1;
  for (size_t i = dims; i-- > 0;) {
    sizes[i] = i + 1 == dims ? s.d_out : s.x[i];
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  const int32_t dtype = s.type == DType::kFloat32 ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16();
  AtenTensorHandle out;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(dims), sizes.data(), strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &out));
  return Tensor(out);
}

// The elements of a tensor in one piece; `copy` keeps them alive if they had to be brought together.
const void* dense(const Tensor& t, std::optional<Tensor>& copy) {
  const bool contiguous = t.is_contiguous();
  if (!contiguous) {
    check_has_data(t, "lowrank_linear: an argument");
    copy = torch::stable::contiguous(t);
  }
  const void* const data = (contiguous ? t : *copy).const_data_ptr();
  STD_TORCH_CHECK(data != nullptr || t.numel() == 0, "lowrank_linear: an argument has a shape but no memory");
  return data;
}

// Grown once per thread, so that a small call allocates nothing but its result.
float* scratch(int64_t size) {
  static thread_local std::vector<float> buffer;
  if (int64_t(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
}

void multiply(const RowProducts& args) {
  const int64_t grain = 1 + kGrain / (1 + args.rows * args.dim);
  torch::stable::parallel_for(0, args.out_dim, grain,
                              [&](int64_t begin, int64_t end) { kernels().row_products(args, begin, end); });
}

// Blocks of rows: their activations, the products with down, and those in the order of pairs are float32 in scratch.
void compute(const Shape& s, const void* x, const void* down, const void* up, const void* bias, void* out) {
  const bool pairs = s.weight_type == DType::kBFloat16, convert = pairs || s.type != DType::kFloat32;
  const int64_t most = s.rows < kRowBlock ? s.rows : kRowBlock;
  float* const hidden = scratch(most * (s.d_in + 2 * s.k));
  float* const hidden_pairs = hidden + most * s.k;
  float* const converted = hidden_pairs + most * s.k;
  for (int64_t first = 0; first < s.rows; first += most) {
    const int64_t rows = s.rows - first < most ? s.rows - first : most;
    const void* const block = static_cast<const char*>(x) + first * s.d_in * size_of(s.type);
    if (convert) kernels().load_activations(converted, block, s.type, pairs, rows, s.d_in);
    multiply({convert ? converted : static_cast<const float*>(block), down, nullptr, hidden, s.weight_type,
              DType::kFloat32, rows, s.d_in, s.k});
    if (pairs) kernels().load_activations(hidden_pairs, hidden, DType::kFloat32, true, rows, s.k);
    multiply({pairs ? hidden_pairs : hidden, up, bias, static_cast<char*>(out) + first * s.d_out * size_of(s.type),
              s.weight_type, s.type, rows, s.k, s.d_out});
  }
}

Tensor lowrank_linear(const Tensor& x, const Tensor& down, const Tensor& up, const std::optional<Tensor>& bias) {
  const Shape s = check_lowrank_linear(x, down, up, bias);
  Tensor out = empty_result(s);
  if (s.rows * s.d_out == 0) return out;
  std::optional<Tensor> copies[4];
  const void* const offset = bias ? dense(*bias, copies[3]) : nullptr;
  compute(s, dense(x, copies[0]), dense(down, copies[1]), dense(up, copies[2]), offset, out.mutable_data_ptr());
  return out;
}

}  // namespace
}  // namespace rmtkernels

STABLE_TORCH_LIBRARY_IMPL(rmtkernels, CPU, m) { m.impl("lowrank_linear", TORCH_BOX(&rmtkernels::lowrank_linear)); }
