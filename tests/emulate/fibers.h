// Fibers: user-space threads that switch only where they ask to. Part of the CUDA-on-CPU emulation, see cuda_on_cpu.h.
//
// ThreadSanitizer is told of every fiber, and that a switch orders nothing: only barriers do. AddressSanitizer is told
// that a reused stack holds no live frame: what ran on it before never returned from its last function.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
#define EMU_ASSEMBLY_SWITCH 1
#else
#include <ucontext.h>
#endif

#if defined(__SANITIZE_THREAD__)
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
// The scheduler's own reads and writes are ordered by the switches, which TSan must not learn from: leave them out.
#define EMU_SCHEDULER __attribute__((no_sanitize("thread"), noinline))
#else
#define EMU_SCHEDULER
#endif
#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_unpoison_memory_region(void const volatile* address, size_t size);
#endif

namespace emu {

[[noreturn]] inline void die(const std::string& message) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", message.c_str());
  std::fflush(stderr);
  std::abort();
}

// A happens-before edge for ThreadSanitizer: what was done before release() is visible after acquire().
class OrderTag {
 public:
#if defined(__SANITIZE_THREAD__)
  EMU_SCHEDULER void release() { __tsan_release(&tag_); }
  EMU_SCHEDULER void acquire() { __tsan_acquire(&tag_); }

 private:
  char tag_ = 0;
#else
  void release() {}
  void acquire() {}
#endif
};

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kGuardBytes = 4096;

#if defined(EMU_ASSEMBLY_SWITCH)
// Saves the callee-saved registers on the current stack, stores its pointer, continues on the other stack.
extern "C" void emu_switch_stack(void** save, void* load);
__asm__(
    ".text\n.p2align 4\n.globl emu_switch_stack\n.weak emu_switch_stack\n.type emu_switch_stack,@function\n"
    "emu_switch_stack:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n  ret\n"
    ".size emu_switch_stack, .-emu_switch_stack\n");
#endif

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  ~Fiber() {
    if (!stack_) return;
    munmap(stack_, kStackBytes);
#if defined(__SANITIZE_THREAD__)
    __tsan_destroy_fiber(tsan_);
#endif
  }

  // The caller's own stack becomes a fiber that others can switch back to.
  EMU_SCHEDULER void adopt_current() {
#if defined(__SANITIZE_THREAD__)
    tsan_ = __tsan_get_current_fiber();
#endif
  }

  // The next switch to this fiber starts `entry` on the fiber's own stack; `entry` never returns.
  EMU_SCHEDULER void prepare(void (*entry)()) {
    if (!stack_) create();
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_ + kGuardBytes, kStackBytes - kGuardBytes);
#endif
#if defined(EMU_ASSEMBLY_SWITCH)
    void** top = reinterpret_cast<void**>(stack_ + kStackBytes - 64);
    *--top = nullptr;                              // keeps the alignment that the ABI promises at entry
    *--top = reinterpret_cast<void*>(entry);       // return address of emu_switch_stack
    for (int i = 0; i < 6; ++i) *--top = nullptr;  // callee-saved registers
    stack_pointer_ = top;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_ + kGuardBytes;
    context_.uc_stack.ss_size = kStackBytes - kGuardBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

  EMU_SCHEDULER static void switch_from_to(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_THREAD__)
    constexpr unsigned kNoSync = 1;
    __tsan_switch_to_fiber(to.tsan_, kNoSync);
#endif
#if defined(EMU_ASSEMBLY_SWITCH)
    emu_switch_stack(&from.stack_pointer_, to.stack_pointer_);
#else
    swapcontext(&from.context_, &to.context_);
#endif
  }

 private:
  // The lowest page faults on overflow.
  EMU_SCHEDULER void create() {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED) die("no memory for fiber stacks");
    mprotect(memory, kGuardBytes, PROT_NONE);
    stack_ = static_cast<char*>(memory);
#if defined(__SANITIZE_THREAD__)
    tsan_ = __tsan_create_fiber(0);
#endif
  }

  char* stack_ = nullptr;  // null in an adopted fiber
#if defined(EMU_ASSEMBLY_SWITCH)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_{};
#endif
#if defined(__SANITIZE_THREAD__)
  void* tsan_ = nullptr;
#endif
};

}  // namespace emu
