// What the CUDA bindings share: the device's checks, its current stream, errors in words. No CUDA header.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "cuda/runtime.h"

// Defined in libtorch_cuda. Weak, so that this library also loads under a CPU build of torch, where it stays null.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace rmtkernels {

// A kernel that follows a pointer to the host or to another GPU takes the process down with it.
inline void check_on_device(const torch::stable::Tensor& t, int32_t device_index, const char* op, const char* name) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == device_index, op, ": ", name,
                  " must be on cuda:", device_index);
}

inline void* current_stream(int32_t device_index) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this build of torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return stream;
}

inline void check_launch(int error, const char* op) {
  STD_TORCH_CHECK(error == 0, op, ": CUDA error ", error, ", ", cuda_error_text(error));
}

}  // namespace rmtkernels
