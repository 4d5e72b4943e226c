// CUDA binding of sliding_window: checks tensors, hands pointers to the launcher on torch's current stream.
#include "cuda/sliding_window.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cuda/binding.h"
#include "tensor_check.h"

namespace rmtkernels {
namespace {

RowType row_type(ScalarType type) {
  if (type == ScalarType::Float) return RowType::kFloat32;
  return type == ScalarType::BFloat16 ? RowType::kBFloat16 : RowType::kFloat16;
}

OfferedRows offered_rows(const Tensor& rows) {
  return {rows.const_data_ptr(), rows.stride(0), rows.dim() == 3 ? rows.stride(1) : 0, rows.stride(-1)};
}

void check_devices(const Tensor& ring, const Tensor& gram, const Tensor& seen, const std::vector<Tensor>& rows,
                   const std::optional<Tensor>& mask) {
  STD_TORCH_CHECK(ring.is_cuda(), "window_push_: ring must be on a CUDA device");
  const int32_t device = ring.get_device_index();
  check_on_device(gram, device, "window_push_", "gram");
  check_on_device(seen, device, "window_push_", "seen");
  for (const Tensor& row : rows) check_on_device(row, device, "window_push_", "each of rows");
  if (mask) check_on_device(*mask, device, "window_push_", "mask");
}

void window_push_(const Tensor& ring, const Tensor& gram, const Tensor& seen, const std::vector<Tensor>& rows,
                  const std::optional<Tensor>& mask) {
  const PushShape shape = check_window_push(ring, gram, seen, rows, mask);
  check_devices(ring, gram, seen, rows, mask);
  if (shape.layers * shape.batch * shape.steps == 0) return;

  std::vector<OfferedRows> offered;
  offered.reserve(rows.size());
  for (const Tensor& row : rows) offered.push_back(offered_rows(row));
  WindowPush push{};
  push.ring = ring.mutable_data_ptr();
  push.gram = static_cast<float*>(gram.mutable_data_ptr());
  push.seen = static_cast<int64_t*>(seen.mutable_data_ptr());
  push.rows = offered.data();
  if (mask) {
    push.mask = static_cast<const bool*>(mask->const_data_ptr());
    push.mask_batch_stride = mask->stride(0);
    push.mask_step_stride = mask->dim() == 2 ? mask->stride(1) : 0;
  }
  push.layers = shape.layers;
  push.batch = shape.batch;
  push.steps = shape.steps;
  push.window = shape.window;
  push.dim = shape.dim;
  push.type = row_type(ring.scalar_type());

  const torch::stable::accelerator::DeviceGuard guard(ring.get_device_index());
  check_launch(rmtkernels_cuda_window_push(&push, current_stream(ring.get_device_index())), "window_push_");
}

GramRows gram_rows(const Tensor& hidden, int64_t window, const std::optional<Tensor>& mask) {
  GramRows rows{};
  rows.data = hidden.const_data_ptr();
  rows.batch_stride = hidden.stride(0);
  rows.step_stride = hidden.stride(1);
  rows.dim_stride = hidden.stride(2);
  if (mask) {
    rows.mask = static_cast<const bool*>(mask->const_data_ptr());
    rows.mask_batch_stride = mask->stride(0);
    rows.mask_step_stride = mask->stride(1);
  }
  rows.batch = hidden.size(0);
  rows.steps = hidden.size(1);
  rows.dim = hidden.size(2);
  rows.window = window;
  return rows;
}

std::tuple<Tensor, Tensor> window_gram(const Tensor& hidden, int64_t window, int64_t stride,
                                       const std::optional<Tensor>& mask) {
  const WindowGramShape shape = check_window_gram(hidden, window, stride, mask);
  STD_TORCH_CHECK(hidden.is_cuda(), "window_gram: hidden must be on a CUDA device");
  const int32_t device = hidden.get_device_index();
  if (mask) check_on_device(*mask, device, "window_gram", "mask");

  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor gram = torch::stable::new_empty(hidden, {shape.batch, shape.windows, window, window}, ScalarType::Float);
  const Tensor seen = torch::stable::new_empty(hidden, {shape.batch, shape.windows}, ScalarType::Long);
  // From torch's caching allocator, on its current stream: a graph that is being captured gives it memory of its own,
  // and nobody else gets the memory before what is queued here is done.
  const int64_t bytes = rmtkernels_cuda_window_gram_workspace(shape.batch, shape.steps, shape.dim, window);
  const Tensor workspace = torch::stable::new_empty(hidden, {bytes}, ScalarType::Byte);
  WindowGram call{};
  call.rows = gram_rows(hidden, window, mask);
  call.gram = static_cast<float*>(gram.mutable_data_ptr());
  call.seen = static_cast<int64_t*>(seen.mutable_data_ptr());
  call.workspace = workspace.mutable_data_ptr();
  call.stride = stride;
  call.type = row_type(hidden.scalar_type());
  check_launch(rmtkernels_cuda_window_gram(&call, current_stream(device)), "window_gram");
  return {gram, seen};
}

}  // namespace
}  // namespace rmtkernels

STABLE_TORCH_LIBRARY_IMPL(rmtkernels, CUDA, m) {
  m.impl("window_push_", TORCH_BOX(&rmtkernels::window_push_));
  m.impl("window_gram", TORCH_BOX(&rmtkernels::window_gram));
}
