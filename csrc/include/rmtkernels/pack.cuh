// 16 bytes of a row, what a lane loads at once.
#pragma once

#include "rmtkernels/gpu.cuh"

namespace rmtkernels {

template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T value[kSize];
};

}  // namespace rmtkernels
