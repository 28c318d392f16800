// simt_fiber.h -- fibers: stacks and the switch from one to another inside one host thread.
//
// x86-64: a switch stores and loads the six registers that a function must keep and the stack pointer.
// Elsewhere (or with SIMT_UCONTEXT, for its test): swapcontext, which also makes a system call.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)

struct FiberContext {
    void* stack_pointer = nullptr;
};

extern "C" void simt_switch(void** from, void* to);
asm(R"(
    .text
    .globl simt_switch
    .hidden simt_switch
    .type simt_switch, @function
simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size simt_switch, .-simt_switch
)");

static inline void fiber_switch(FiberContext& from, FiberContext& to)
{
    simt_switch(&from.stack_pointer, to.stack_pointer);
}

// The first switch to `context` calls `start`, which must never return.
static inline void fiber_prepare(FiberContext& context, char* low, char* high, void (*start)())
{
    (void)low;
    void** top = (void**)((uintptr_t)high & ~(uintptr_t)15);
    *--top = nullptr;  // where a caller would be: keeps the stack aligned as after a call
    *--top = (void*)start;
    for (int i = 0; i < 6; i++) *--top = nullptr;
    context.stack_pointer = top;
}

#else

#include <ucontext.h>

struct FiberContext {
    ucontext_t context;
};

static inline void fiber_switch(FiberContext& from, FiberContext& to)
{
    swapcontext(&from.context, &to.context);
}

static inline void fiber_prepare(FiberContext& context, char* low, char* high, void (*start)())
{
    getcontext(&context.context);
    context.context.uc_stack.ss_sp = low;
    context.context.uc_stack.ss_size = (size_t)(high - low);
    context.context.uc_link = nullptr;
    makecontext(&context.context, start, 0);
}

#endif

// Stacks of one size, each with a page below it that cannot be touched. Kept between launches:
// touching fresh pages costs more than running a small kernel.
class FiberStacks {
public:
    static constexpr size_t SIZE = 256 << 10;

    // Room for `count` stacks; false if the system gives no memory.
    bool reserve(size_t count)
    {
        const size_t page = (size_t)sysconf(_SC_PAGESIZE);
        while (lows_.size() < count) {
            void* memory = mmap(nullptr, SIZE + page, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (memory == MAP_FAILED) return false;
            mprotect(memory, page, PROT_NONE);
            lows_.push_back((char*)memory + page);
        }
        return true;
    }
    char* low(size_t index) const { return lows_[index]; }
    char* high(size_t index) const { return lows_[index] + SIZE; }

private:
    std::vector<char*> lows_;
};
