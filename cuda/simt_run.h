// simt_run.h -- the state of a running launch, and the checks of its memory accesses.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "simt_hooks.h"

#include "simt_fiber.h"
#include "simt_shadow.h"

// One access to an array or to shared memory, as it is recorded for counting traffic.
struct Touch {
    uint64_t address;
    uint32_t thread, pc, bytes;  // thread: number in the grid
    int32_t use;                 // SimtUse, plus 4 for shared memory
};

struct Launch {
    void (*entry)(const uint64_t*);  // runs the kernel on these argument slots
    const uint64_t* arguments;
    const Region* regions;
    uint64_t region_count;
    uint32_t grid, block;
    int32_t order;  // 0 forward, 1 reverse, 2 drawn
    uint64_t seed;
    uint64_t limit;     // of switches, accesses and blocks of code together
    uint64_t switches;  // result
    uint64_t accesses;  // result
    Touch* touches;     // room for the first `touch_room` accesses; result
    uint64_t touch_room;
    uint64_t touch_count;  // result: of all that were to be recorded
};

namespace {

enum State { READY, AT_BARRIER, IN_WARP, FINISHED };

struct Wait {
    int operation = 0, line = 0, argument = 0, width = 0;
    unsigned mask = 0;
    uint64_t value = 0;
};

struct Fiber {
    FiberContext context;
    Thread thread{};
    State state = READY;
    Wait wait;
    char *low = nullptr, *high = nullptr;
};

struct Run {
    Launch* launch = nullptr;
    Shadow shadow;
    std::vector<Fiber> fibers;
    std::vector<uint32_t> ready;
    FiberContext scheduler;
    Fiber* running = nullptr;
    char *code_begin = nullptr, *code_end = nullptr;  // what the library may read but not write
    uint32_t epoch = 0;
    uint64_t random = 0;
    uint64_t steps = 0;  // switches, accesses, blocks of code
    bool stopped = false;
};

FiberStacks stacks;
Run* run;

uint32_t place_of(const void* pc) { return (uint32_t)((const char*)pc - run->code_begin - 1); }

// Let other threads run until it is this one's turn again.
void take_turns() { fiber_switch(run->running->context, run->scheduler); }

// Report and abandon the launch: the running thread never goes on.
void stop(const std::string& finding)
{
    run->shadow.findings.add_last(finding);
    run->stopped = true;
    if (run->running) take_turns();
}

std::string who() { return who(run->running->thread); }

const Region* nearest(const char* address, uint64_t& distance)
{
    const Region* best = nullptr;
    distance = UINT64_MAX;
    for (const Region& region : run->shadow.regions) {
        const char* end = region.begin + region.bytes;
        const uint64_t away = address < region.begin ? region.begin - address
                              : address >= end ? address - end : 0;
        if (region.begin && away < distance) best = &region, distance = away;
    }
    return best;
}

void out_of_bounds(const char* address, uint64_t bytes, int use, uint32_t pc)
{
    const std::string start = "out of bounds: " + who() + (use == SIMT_READ ? " reads " : " writes ");
    if ((uintptr_t)address < 1 << 16) {
        std::string absent;
        for (const Region& region : run->shadow.regions)
            if (!region.begin)
                absent += (absent.empty() ? "" : ", ") + std::string(region.name);
        stop(start + "a null pointer" + place(pc) + "; absent arguments: " +
             (absent.empty() ? "none" : absent));
    }
    uint64_t distance;
    const Region* region = nearest(address, distance);
    if (!region || distance > 1 << 30)
        stop(start + text("%llu bytes", (unsigned long long)bytes) + place(pc) +
             " that are in no array of this launch");
    const uint64_t size = region->item ? region->item : bytes;
    const std::string many = bytes > size ? text("%llu bytes from ", (unsigned long long)bytes) : "";
    stop(start + many + item(*region, address - region->begin, bytes) + place(pc) +
         text(", which has %llu elements", (unsigned long long)(region->bytes / size)));
}

// Count steps towards the limit.
void on_tick(unsigned steps)
{
    run->steps += steps;
    if (run->steps > run->launch->limit)
        stop("no end: " + who() + text(" still runs after %llu steps",
                                       (unsigned long long)run->steps));
}

void record(const char* address, uint64_t bytes, int use, const Region& region, uint32_t pc)
{
    Launch& launch = *run->launch;
    if (launch.touch_count < launch.touch_room)
        launch.touches[launch.touch_count] = {(uint64_t)address, run->running->thread.number - 1, pc,
                                              (uint32_t)bytes, use + 4 * region.shared};
    launch.touch_count++;
}

void on_access(const void* where, unsigned long long bytes, int use, bool aligned, const void* pc)
{
    const char* address = (const char*)where;
    Fiber& fiber = *run->running;
    if (address >= fiber.low && address < fiber.high) return;
    if (!bytes) return;
    run->launch->accesses++;
    on_tick(1);
    const Region* region = region_of(run->shadow, address, bytes);
    if (!region) {
        if (use == SIMT_READ && address >= run->code_begin && address < run->code_end) return;
        out_of_bounds(address, bytes, use, place_of(pc));
    }
    if (aligned && (uintptr_t)address % bytes)
        stop("misaligned: " + who() + text(" uses %llu bytes at ", bytes) +
             item(*region, address - region->begin, bytes) + place(place_of(pc)) +
             ", an address that is no multiple of it");
    record(address, bytes, use, *region, place_of(pc));
    check_access(run->shadow, *region, address, bytes, use, fiber.thread, place_of(pc));
}

void on_enter(const void* frame)
{
    // Frames have at most 64 KiB (-Werror=frame-larger-than), so none jumps over the margin.
    constexpr ptrdiff_t MARGIN = 80 << 10;
    if ((const char*)frame < run->running->low + MARGIN)
        stop("stack overflow: " + who() +
             text(" needs more than %zu bytes of local variables", FiberStacks::SIZE - MARGIN));
}

void on_fault(const char* kind, const char* type, unsigned long long index, const void* pc)
{
    const std::string start = kind + (": " + who());
    stop(*type ? start + text(" uses index %lld of %s", (long long)index, type) + place(place_of(pc))
               : start + place(place_of(pc)));
}

}  // namespace
