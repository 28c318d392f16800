// simt_runtime.h -- the runtime of the SIMT simulator, compiled as a library of its own: runs a launch
// block after block, every thread a fiber, and checks every memory access.
//
// The fibers of a block run in rounds: each that can go on runs, in an order given by the launch
// (forward, reverse, or drawn anew for every round), until it waits, makes an atomic operation or
// ends. When none can go on, a barrier is complete or the block has diverged. Nothing depends on time:
// one seed is one execution.
//
// What is found comes back as text. After a finding with which a thread cannot go on (out of bounds,
// divergence, no end) the launch is abandoned; all others are collected.

#pragma once

#include <dlfcn.h>
#include <link.h>

#include <cstring>

#include "simt_wait.h"

namespace {

SimtDim thread() { return {run->running->thread.index, 0, 0}; }
SimtDim block() { return {run->running->thread.block, 0, 0}; }
SimtDim block_dim() { return {run->launch->block, 1, 1}; }
SimtDim grid_dim() { return {run->launch->grid, 1, 1}; }

const SimtHooks hooks = {thread, block, block_dim, grid_dim, on_access, on_tick, on_enter,
                         on_barrier, on_warp, on_yield, on_fault};

void fiber_main()
{
    run->launch->entry(run->launch->arguments);
    run->running->state = FINISHED;
    take_turns();
}

uint64_t draw()  // splitmix64
{
    uint64_t z = run->random += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

void put_in_order(std::vector<uint32_t>& list)
{
    if (run->launch->order == 1) std::reverse(list.begin(), list.end());
    if (run->launch->order == 2)
        for (size_t i = list.size(); i > 1; i--) std::swap(list[i - 1], list[draw() % i]);
}

void start_block(uint32_t block)
{
    Launch& launch = *run->launch;
    for (const Region& region : run->shadow.regions)
        if (region.shared) {
            std::fill_n(region.begin, region.bytes, (char)0xff);
            std::fill_n(region.cells, region.bytes / region.granule, Cell{});
        }
    run->epoch = 0;
    for (uint32_t i = 0; i < launch.block; i++) {
        Fiber& fiber = run->fibers[i];
        fiber.state = READY;
        fiber.low = stacks.low(i);
        fiber.high = stacks.high(i);
        fiber.thread = {block, i, i % LANES, i / LANES, 0, block * launch.block + i + 1, {}};
        fiber.thread.seen[i % LANES] = 1;
        fiber_prepare(fiber.context, fiber.low, fiber.high, fiber_main);
    }
}

void run_block(uint32_t block)
{
    start_block(block);
    for (;;) {
        run->running = nullptr;
        run->ready.clear();
        bool finished = true;
        for (uint32_t i = 0; i < run->launch->block; i++) {
            if (run->fibers[i].state == READY) run->ready.push_back(i);
            finished = finished && run->fibers[i].state == FINISHED;
        }
        if (finished) return;
        if (run->steps > run->launch->limit)
            return stop(text("no end: block %u still runs after %llu steps", block,
                             (unsigned long long)run->steps));
        if (run->ready.empty() && !release_barrier()) return diverged();
        put_in_order(run->ready);
        for (const uint32_t i : run->ready) {
            run->running = &run->fibers[i];
            run->launch->switches++;
            run->steps++;
            fiber_switch(run->scheduler, run->running->context);
            if (run->stopped) return;
        }
    }
}

// Where the kernel's library keeps code and constants: from its start to its first writable part.
int find_code(dl_phdr_info* info, size_t, void* base)
{
    if ((void*)info->dlpi_addr != base) return 0;
    run->code_begin = (char*)base;
    run->code_end = (char*)base;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const auto& segment = info->dlpi_phdr[i];
        if (segment.p_type != PT_LOAD || segment.p_flags & PF_W) continue;
        char* end = (char*)base + segment.p_vaddr + segment.p_memsz;
        run->code_end = std::max(run->code_end, end);
    }
    return 1;
}

void prepare(Launch& launch)
{
    Dl_info library{};
    dladdr((void*)launch.entry, &library);
    dl_iterate_phdr(find_code, library.dli_fbase);
    run->shadow.regions.assign(launch.regions, launch.regions + launch.region_count);
    run->shadow.block_size = launch.block;
    run->fibers.resize(launch.block);
    run->random = launch.seed;
    launch.switches = launch.accesses = launch.touch_count = 0;
}

}  // namespace

extern "C" {

#define EXPORT __attribute__((visibility("default")))

EXPORT const SimtHooks* simt_hooks() { return &hooks; }

EXPORT uint64_t simt_cell_bytes() { return sizeof(Cell); }

// Run a launch. The findings, a line each, go to `report`; the result is their number, -1 if there
// is no memory for stacks. One launch at a time.
EXPORT int64_t simt_launch(Launch* launch, char* report, uint64_t report_bytes)
{
    if (!stacks.reserve(launch->block)) return -1;
    Run here;
    run = &here;
    run->launch = launch;
    prepare(*launch);
    std::vector<uint32_t> blocks(launch->grid);
    for (uint32_t i = 0; i < launch->grid; i++) blocks[i] = i;
    put_in_order(blocks);
    for (const uint32_t block : blocks) {
        run_block(block);
        if (run->stopped) break;
    }
    run = nullptr;
    const std::string lines = here.shadow.findings.lines();
    strncpy(report, lines.c_str(), report_bytes - 1);
    report[report_bytes - 1] = 0;
    return (int64_t)here.shadow.findings.total();
}

}  // extern "C"
