// CPU binding of lowrank_linear: checks tensors, splits the weights over threads, leaves large batches to PyTorch.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <utility>

#include "cpu/kernels.h"
#include "tensor_check.h"

namespace rmtkernels {
namespace {

constexpr int64_t kRowBlock = 16;    // rows computed at once, which bounds the scratch memory
constexpr int64_t kGrain = 1 << 16;  // products per thread below which waking another one costs more than it brings

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// Owns a tensor, as torch::stable::Tensor does, without the shared pointer: at one row its allocations count, and so
// does every question, which is a call into libtorch.
class Handle {
 public:
  explicit Handle(AtenTensorHandle tensor) : tensor_(tensor) {}
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  ~Handle() { aoti_torch_delete_tensor_object(tensor_); }  // which takes null, too

  explicit operator bool() const { return tensor_ != nullptr; }
  AtenTensorHandle get() const { return tensor_; }
  AtenTensorHandle release() { return std::exchange(tensor_, nullptr); }
  Sizes sizes() const {
    int64_t* sizes;
    int64_t dims;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor_, &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor_, &dims));
    return Sizes(sizes, size_t(dims));
  }
  int32_t dtype() const {
    int32_t dtype;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor_, &dtype));
    return dtype;
  }
  const void* const_data() const {
    const void* data;
    TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(tensor_, &data));
    return data;
  }
  void* mutable_data() const {
    void* data;
    TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(tensor_, &data));
    return data;
  }

 private:
  AtenTensorHandle tensor_;
};

DType dtype_of(const Handle& t, const char* name) {
  const int32_t dtype = t.dtype();
  if (dtype == aoti_torch_dtype_float32()) return DType::kFloat32;
  STD_TORCH_CHECK(dtype == aoti_torch_dtype_bfloat16(), "lowrank_linear: ", name, " must be float32 or bfloat16");
  return DType::kBFloat16;
}
int64_t size_of(DType type) { return type == DType::kFloat32 ? 4 : 2; }

// Sizes of one call, checked.
struct Shape {
  Sizes x;
  int64_t rows, d_in, k, d_out;
  DType type, weight_type;
};

Shape check_lowrank_linear(const Handle& x, const Handle& down, const Handle& up, const Handle& bias) {
  const Sizes xs = x.sizes(), ds = down.sizes(), us = up.sizes();
  STD_TORCH_CHECK(xs.size() >= 1 && ds.size() == 2 && us.size() == 2,
                  "lowrank_linear: x must be (..., d_in), down (k, d_in), up (d_out, k)");
  const int64_t d_in = xs[xs.size() - 1], k = ds[0], d_out = us[0];
  STD_TORCH_CHECK(ds[1] == d_in && us[1] == k, "lowrank_linear: down must be (k, ", d_in,
                  ") and up (d_out, k), got k = ", k);
  const DType type = dtype_of(x, "x"), weight_type = dtype_of(down, "down");
  STD_TORCH_CHECK(dtype_of(up, "up") == weight_type, "lowrank_linear: up must have down's dtype");
  if (bias) {
    const Sizes bs = bias.sizes();
    STD_TORCH_CHECK(bs.size() == 1 && bs[0] == d_out && dtype_of(bias, "bias") == weight_type,
                    "lowrank_linear: bias must be (", d_out, ",) of the weights' dtype");
  }
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < xs.size(); ++i) rows *= xs[i];
  return {xs, rows, d_in, k, d_out, type, weight_type};
}

// (..., d_out) of x's dtype, past the dispatcher: allocating through it costs as much as the smallest product.
AtenTensorHandle empty_result(const Shape& s) {
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
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(dims), sizes.data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &out));
  return out;
}

// The elements of a tensor in one piece; `copy` keeps them alive if they had to be brought together.
const void* dense(const Handle& t, int64_t numel, std::optional<Tensor>& copy) {
  const void* const data = t.const_data();
  STD_TORCH_CHECK(data != nullptr || numel == 0, "lowrank_linear: an argument has a shape but no memory");
  bool contiguous;
  TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(t.get(), &contiguous));
  if (contiguous) return data;
  AtenTensorHandle same;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(t.get(), &same));
  copy = torch::stable::contiguous(Tensor(same));
  return copy->const_data_ptr();
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

void lowrank_linear(StableIValue* stack, uint64_t, uint64_t) {
  using torch::stable::detail::to;
  const Handle x(to<AtenTensorHandle>(stack[0])), down(to<AtenTensorHandle>(stack[1])),
      up(to<AtenTensorHandle>(stack[2])),
      bias(to<std::optional<AtenTensorHandle>>(stack[3]).value_or(AtenTensorHandle(nullptr)));
  const Shape s = check_lowrank_linear(x, down, up, bias);
  Handle out(empty_result(s));
  if (s.rows * s.d_out > 0) {
    std::optional<Tensor> copies[4];
    compute(s, dense(x, s.rows * s.d_in, copies[0]), dense(down, s.k * s.d_in, copies[1]),
            dense(up, s.d_out * s.k, copies[2]), bias ? dense(bias, s.d_out, copies[3]) : nullptr, out.mutable_data());
  }
  stack[0] = torch::stable::detail::from(out.release());
}

}  // namespace
}  // namespace rmtkernels

STABLE_TORCH_LIBRARY_IMPL(rmtkernels, CPU, m) { m.impl("lowrank_linear", &rmtkernels::lowrank_linear); }
