// CUDA on a CPU, for tests: kernels written in CUDA C++ run unmodified when compiled as C++17 by g++ (x86-64, or any
// machine with ucontext) with -DRMT_EMULATE. Include it through rmtkernels/gpu.cuh.
//
// One fiber per CUDA thread, one OS thread per block in flight. Run-time settings:
//   EMU_SCHED=rr|rev|rand, EMU_SEED=n   order in which the threads of a block and the blocks of a grid run
//   EMU_WORKERS=n                       blocks in flight
// Compile-time settings: EMU_WARP=32|64, EMU_SHARED_MAX (bytes of shared memory a block may ask for), EMU_UCONTEXT.
//
// What it reports by itself: divergent __syncthreads (exited threads, different call sites), warp operations whose
// lanes do not all arrive, masks that differ or miss a lane, deadlocks, bad launch shapes. With -fsanitize=thread a
// missing
// __syncthreads or __syncwarp is a data race whatever order the threads ran in, and a race between blocks is one with
// EMU_WORKERS=2. With -fsanitize=address an overrun of shared memory is found.
//
// What it cannot show: tensor cores, PTX, cp.async, clusters, cooperative grids, real speed, a GPU's memory model.
#pragma once

#include <atomic>
#include <cmath>
#include <functional>
#include <map>
#include <thread>
#include <type_traits>

#include "block.h"

#ifndef EMU_SHARED_MAX
#define EMU_SHARED_MAX (227 * 1024)
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __constant__ static
#if defined(__SANITIZE_ADDRESS__)
#define RMT_SHARED static  // ASan does not guard thread_local arrays, and runs one block at a time
#else
#define RMT_SHARED static thread_local
#endif
#define RMT_DYN_SHARED(type, name) type* name = reinterpret_cast<type*>(::emu::block->dynamic_shared.get())
#define RMT_LAUNCH(kernel, grid, block, shared, stream, ...) \
  ::emu::launch((grid), (block), (shared), (stream), (kernel)__VA_OPT__(, ) __VA_ARGS__)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

typedef struct EmulatedStream* cudaStream_t;
typedef int cudaError_t;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };

namespace emu {

using LaneMask = std::conditional_t<(kWarp > 32), uint64_t, unsigned>;

inline std::atomic<int>& last_error() {
  static std::atomic<int> error{cudaSuccess};
  return error;
}

inline const char* setting(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value ? value : otherwise;
}

inline Schedule schedule_setting() {
  const std::string name = setting("EMU_SCHED", "rr");
  if (name == "rr") return Schedule::kInOrder;
  if (name == "rev") return Schedule::kReversed;
  if (name == "rand") return Schedule::kRandom;
  die("EMU_SCHED must be rr, rev or rand, not " + name);
}

inline bool launchable(const dim3& grid, const dim3& block, size_t shared) {
  const size_t threads = size_t(block.x) * block.y * block.z;
  return threads > 0 && threads <= 1024 && block.z <= 64 && shared <= EMU_SHARED_MAX && grid.x > 0 && grid.y > 0 &&
         grid.z > 0 && grid.x <= 2147483647u && grid.y <= 65535 && grid.z <= 65535;
}

inline std::vector<size_t> block_order(size_t blocks, Schedule schedule, uint64_t& random) {
  std::vector<size_t> order(blocks);
  for (size_t i = 0; i < blocks; ++i) order[i] = schedule == Schedule::kReversed ? blocks - 1 - i : i;
  if (schedule == Schedule::kRandom)
    for (size_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[next_random(random) % i]);
  return order;
}

// Blocks in flight, one OS thread each. They outlive a launch, so that their fibers are made once.
inline Block& block_in_flight(size_t worker) {
  static std::deque<Block> blocks;
  while (blocks.size() <= worker) blocks.emplace_back();
  return blocks[worker];
}

// Dynamic shared memory that a kernel may be launched with: as on a GPU 48 KB, and more when it was asked for.
inline size_t& shared_limit(const void* kernel) {
  static std::map<const void*, size_t> limits;
  return limits.emplace(kernel, size_t(48) * 1024).first->second;
}

// Returns when the grid is done. One host thread at a time.
template <class... Parameters, class... Arguments>
void launch(dim3 grid, dim3 block_shape, size_t shared, cudaStream_t, void (*kernel)(Parameters...),
            Arguments... arguments) {
  if (!launchable(grid, block_shape, shared) || shared > shared_limit(reinterpret_cast<const void*>(kernel))) {
    last_error() = cudaErrorInvalidConfiguration;
    return;
  }
  const size_t blocks = size_t(grid.x) * grid.y * grid.z;
  const Schedule schedule = schedule_setting();
  uint64_t random = std::strtoull(setting("EMU_SEED", "1"), nullptr, 10) * 0x9E3779B97F4A7C15ull + 1;
  const std::vector<size_t> order = block_order(blocks, schedule, random);
  auto body = [&]() { kernel(arguments...); };
  std::atomic<size_t> taken{0};
  auto work = [&](Block& b, uint64_t seed) {
    b.shape = block_shape;
    b.grid = grid;
    b.dynamic_shared_bytes = shared;
    b.schedule = schedule;
    b.random = seed | 1;
    b.argument = const_cast<void*>(static_cast<const void*>(&body));
    b.body = [](void* argument) { (*static_cast<decltype(body)*>(argument))(); };
    for (size_t i; (i = taken.fetch_add(1, std::memory_order_relaxed)) < blocks;) {
      const size_t o = order[i];
      run_block(b, {unsigned(o % grid.x), unsigned(o / grid.x % grid.y), unsigned(o / grid.x / grid.y)});
    }
  };
#if defined(__SANITIZE_ADDRESS__)
  const size_t workers = 1;
#else
  const size_t workers = std::min<size_t>(blocks, std::max(1, std::atoi(setting("EMU_WORKERS", "1"))));
#endif
  if (workers == 1) return work(block_in_flight(0), random);
  std::vector<std::thread> threads;
  for (size_t w = 0; w < workers; ++w) threads.emplace_back(work, std::ref(block_in_flight(w)), next_random(random));
  for (std::thread& t : threads) t.join();
}

template <class T>
T shuffle(Site site, LaneMask mask, T value, int source) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  uint64_t raw = 0;
  std::memcpy(&raw, &value, sizeof(T));
  meet(mask, raw, source, site, false);
  std::memcpy(&value, &thread->received, sizeof(T));
  return value;
}

// The four forms of a shuffle differ in the source lane. A source outside the segment of `width` lanes means oneself.
template <class T>
T shuffle_index(Site site, LaneMask mask, T value, int index, int width = kWarp) {
  return shuffle(site, mask, value, thread->lane / width * width + (index % width + width) % width);
}
template <class T>
T shuffle_xor(Site site, LaneMask mask, T value, int bits, int width = kWarp) {
  const int source = thread->lane ^ bits;
  return shuffle(site, mask, value, source / width > thread->lane / width ? thread->lane : source);
}
template <class T>
T shuffle_up(Site site, LaneMask mask, T value, int delta, int width = kWarp) {
  return shuffle(site, mask, value, thread->lane % width < delta ? thread->lane : thread->lane - delta);
}
template <class T>
T shuffle_down(Site site, LaneMask mask, T value, int delta, int width = kWarp) {
  return shuffle(site, mask, value, thread->lane % width + delta >= width ? thread->lane : thread->lane + delta);
}

inline LaneMask ballot(Site site, LaneMask mask, bool predicate) {
  meet(mask, predicate, thread->lane, site, false);
  return LaneMask(thread->votes);
}
inline void sync_warp(Site site, LaneMask mask = LaneMask(kEveryLane)) { meet(mask, 0, thread->lane, site, true); }

template <class T, class Operation>
T read_modify_write(T* address, Operation operation) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "atomics on 4 or 8 bytes");
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  Bits* target = reinterpret_cast<Bits*>(address);
  Bits old_bits = __atomic_load_n(target, __ATOMIC_RELAXED), new_bits;
  T old_value, new_value;
  do {
    std::memcpy(&old_value, &old_bits, sizeof(T));
    new_value = operation(old_value);
    std::memcpy(&new_bits, &new_value, sizeof(T));
  } while (!__atomic_compare_exchange_n(target, &old_bits, new_bits, true, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
  return old_value;
}

}  // namespace emu

#define EMU_SITE (::emu::Site{__FILE__, __LINE__})
#define threadIdx (::emu::thread->index)
#define blockIdx (::emu::block->index)
#define blockDim (::emu::block->shape)
#define gridDim (::emu::block->grid)
#define __syncthreads() ((void)::emu::sync_block(EMU_SITE))
#define __syncthreads_and(p) (int(::emu::sync_block(EMU_SITE, (p) != 0).all))
#define __syncthreads_or(p) (int(::emu::sync_block(EMU_SITE, (p) != 0).any))
#define __syncthreads_count(p) (::emu::sync_block(EMU_SITE, (p) != 0).count)
#define __syncwarp(...) ::emu::sync_warp(EMU_SITE __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_sync(...) ::emu::shuffle_index(EMU_SITE, __VA_ARGS__)
#define __shfl_xor_sync(...) ::emu::shuffle_xor(EMU_SITE, __VA_ARGS__)
#define __shfl_up_sync(...) ::emu::shuffle_up(EMU_SITE, __VA_ARGS__)
#define __shfl_down_sync(...) ::emu::shuffle_down(EMU_SITE, __VA_ARGS__)
#define __ballot_sync(mask, p) ::emu::ballot(EMU_SITE, (mask), (p) != 0)
#define __any_sync(mask, p) (::emu::ballot(EMU_SITE, (mask), (p) != 0) != 0)
#define __all_sync(mask, p) (::emu::ballot(EMU_SITE, (mask), (p) == 0) == 0)

template <class T, class V>
T atomicAdd(T* address, V value) {
  return ::emu::read_modify_write(address, [&](T old) { return T(old + T(value)); });
}

inline int __ffs(int bits) { return __builtin_ffs(bits); }

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  if (size_t(bytes) > EMU_SHARED_MAX) return cudaErrorInvalidValue;
  ::emu::shared_limit(reinterpret_cast<const void*>(kernel)) = size_t(bytes);
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return ::emu::last_error().exchange(cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess                     ? "no error"
         : error == cudaErrorInvalidConfiguration ? "invalid configuration argument"
                                                  : "error";
}
