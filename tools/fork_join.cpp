// Tells ThreadSanitizer of fork and join in torch's parallel_for, which stands on libgomp. libgomp is not compiled with
// the sanitizer and waits on futexes: without this, what a worker writes and the caller reads after the join would be
// called a race. What two workers do at the same time still is one. Preloaded, so that _C finds it before torch's.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);

using Body = void (*)(int64_t, int64_t, void*);
using ParallelFor = int32_t (*)(int64_t, int64_t, int64_t, Body, void*);

struct Region {
  Body body;
  void* context;
  char fork, join;  // their addresses stand for the two events
};

static void run(int64_t begin, int64_t end, void* context) {
  Region& region = *static_cast<Region*>(context);
  __tsan_acquire(&region.fork);
  region.body(begin, end, region.context);
  __tsan_release(&region.join);
}

__attribute__((visibility("default"))) int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain, Body body,
                                                                  void* context) {
  void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  const auto next = torch ? reinterpret_cast<ParallelFor>(dlsym(torch, "torch_parallel_for")) : nullptr;
  if (!next) std::fputs("fork_join: torch's parallel_for is not there\n", stderr), std::abort();
  Region region = {body, context, 0, 0};
  __tsan_release(&region.fork);
  const int32_t status = next(begin, end, grain, run, &region);
  __tsan_acquire(&region.join);
  return status;
}
}
