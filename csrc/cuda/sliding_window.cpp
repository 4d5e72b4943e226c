// CUDA binding of sliding_window: checks tensors, hands pointers to the launcher on torch's current stream.
#include "cuda/sliding_window.h"

#include <torch/csrc/stable/library.h>

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

}  // namespace
}  // namespace rmtkernels

STABLE_TORCH_LIBRARY_IMPL(rmtkernels, CUDA, m) { m.impl("window_push_", TORCH_BOX(&rmtkernels::window_push_)); }
