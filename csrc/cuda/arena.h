// How a launcher splits its working memory. No CUDA header.
#pragma once

#include <cstdint>

namespace rmtkernels {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Splits off one array after the other; counts the bytes where there is no memory yet.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}
  int64_t used() const { return used_; }

  template <class T>
  T* take(int64_t count) {
    T* const array = reinterpret_cast<T*>(memory_ + used_);
    used_ += ceil_div(count * int64_t(sizeof(T)), 16) * 16;
    return memory_ == nullptr ? nullptr : array;
  }

 private:
  char* memory_;
  int64_t used_ = 0;
};

}  // namespace rmtkernels
