// simt_shadow.h -- who touched which memory: bounds, races, uninitialized reads.
//
// Every element of every array of a launch, and every byte of shared memory, has a cell that holds
// its last write and two of its reads. Two accesses by different threads, at least one of them a
// write, race unless something orders them:
//   __syncthreads  orders all threads of a block: the block's epoch counts them;
//   __syncwarp     orders the lanes of its mask: each thread knows, for every lane of its warp, up
//                  to which of that lane's clock it is ordered (a vector clock);
//   atomics        do not race with each other. They order nothing.
// A shuffle moves a value and orders no memory. Blocks are never ordered within a launch.
//
// Two reads are enough: they are kept as far apart as possible (block, then warp, then lane), so a
// later write that is ordered after both is ordered after all others, except where a __syncwarp
// of part of a warp orders it after the two only.
#pragma once

#include "simt_report.h"

static constexpr unsigned LANES = 32;

struct Access {
    uint32_t thread = 0;  // number in the grid + 1; 0: none
    uint32_t epoch = 0;   // of the block
    uint32_t clock = 0;   // of the lane
    uint32_t pc = 0;
};

struct Cell {
    Access write, reads[2];
    uint32_t atomic = 0;  // the write was one
};

// An array argument, or a variable in shared memory. Arrays that overlap share cells.
struct Region {
    char* begin;  // null: an argument that is absent
    uint64_t bytes;
    uint64_t item;     // bytes of an element, 0 if not known
    uint64_t granule;  // bytes of a cell
    Cell* cells;       // of the first element
    const char* name;
    int32_t writable, shared;
};

// What the checks must know of the running thread.
struct Thread {
    uint32_t block, index, lane, warp;  // index in the block
    uint32_t epoch;
    uint32_t number;       // Access::thread
    uint32_t seen[LANES];  // vector clock; the own entry is this lane's clock
};

struct Shadow {
    std::vector<Region> regions;
    uint32_t block_size = 0;
    Findings findings;
};

// The region that holds all of the range, writable if possible; null: out of bounds.
static const Region* region_of(const Shadow& shadow, const char* address, uint64_t bytes)
{
    const Region* best = nullptr;
    for (const Region& region : shadow.regions) {
        const uint64_t offset = (uint64_t)(address - region.begin);  // huge if it lies before
        if (offset >= region.bytes || bytes > region.bytes - offset) continue;
        if (region.writable) return &region;
        best = &region;
    }
    return best;
}

static std::string who(const Thread& me) { return text("block %u, thread %u", me.block, me.index); }

// An element of an array as the kernel's author would write it; `bytes` are those of the access.
static std::string item(const Region& region, int64_t offset, uint64_t bytes)
{
    const int64_t size = (int64_t)(region.item ? region.item : bytes);
    const int64_t index = (offset - (offset < 0 ? size - 1 : 0)) / size;
    return text("%s[%lld]", region.name, (long long)index);
}

// ---- order

static bool ordered(const Shadow& shadow, const Access& old, const Thread& me)
{
    if (old.thread == me.number) return true;
    if ((old.thread - 1) / shadow.block_size != me.block) return false;
    if (old.epoch != me.epoch) return true;
    const uint32_t index = (old.thread - 1) % shadow.block_size;
    return index / LANES == me.warp && me.seen[index % LANES] >= old.clock;
}

// 3: other block, 2: other warp, 1: other lane, 0: one thread.
static int apart(const Shadow& shadow, const Access& a, const Access& b)
{
    const uint32_t x = a.thread - 1, y = b.thread - 1, size = shadow.block_size;
    if (x / size != y / size) return 3;
    return x % size / LANES != y % size / LANES ? 2 : x != y;
}

// ---- one access

// An access that is being checked, and what is known of it.
struct Check {
    Shadow& shadow;
    const Region& region;
    uint64_t offset, bytes;
    int use;
    const Thread& me;
    Access now;
};

// Two findings are the same mistake if they agree in this.
static uint64_t key(const Check& check, uint64_t kind, uint32_t other_pc)
{
    const uint64_t place = (kind * 31 + (uintptr_t)check.region.begin) * 1000003 + check.now.pc;
    return place * 1000003 + other_pc;
}

static std::string subject(const Check& check)
{
    const char* verb = check.use == SIMT_READ ? " reads "
                       : check.use == SIMT_WRITE ? " writes " : " changes (atomic) ";
    return who(check.me) + verb + item(check.region, (int64_t)check.offset, check.bytes) +
           place(check.now.pc);
}

static void race(const Check& check, const char* done, const Access& old)
{
    const uint64_t kind = 1 + apart(check.shadow, old, check.now);
    check.shadow.findings.add(key(check, kind, old.pc), [&] {
        const uint32_t block = (old.thread - 1) / check.shadow.block_size;
        const uint32_t index = (old.thread - 1) % check.shadow.block_size;
        const char* rule = "no __syncwarp lies between; shuffles order nothing";
        if (index / LANES != check.me.warp) rule = "no __syncthreads lies between";
        if (block != check.me.block) rule = "blocks are not ordered within a launch";
        return "race: " + subject(check) + text(", which block %u, thread %u %s", block, index, done) +
               place(old.pc) + ": " + rule;
    });
}

static void remember(const Check& check, Cell& cell)
{
    Access &a = cell.reads[0], &b = cell.reads[1];
    if (!a.thread || ordered(check.shadow, a, check.me))
        a = check.now;
    else if (!b.thread || ordered(check.shadow, b, check.me) ||
             apart(check.shadow, a, check.now) > apart(check.shadow, a, b))
        b = check.now;
}

static void check_cell(const Check& check, Cell& cell)
{
    const Access& last = cell.write;
    if (last.thread) {
        if (!(check.use == SIMT_ATOMIC && cell.atomic) && !ordered(check.shadow, last, check.me))
            race(check, cell.atomic ? "changed" : "wrote", last);
    } else if (check.use != SIMT_WRITE && check.region.shared) {
        check.shadow.findings.add(key(check, 5, 0), [&] {
            return "uninitialized: " + subject(check) + ", which no thread of its block wrote";
        });
    }
    if (check.use == SIMT_READ) return remember(check, cell);
    for (Access& old : cell.reads) {
        if (old.thread && !ordered(check.shadow, old, check.me)) race(check, "read", old);
        old.thread = 0;
    }
    cell.write = check.now;
    cell.atomic = check.use == SIMT_ATOMIC;
}

// One access of `bytes` inside a region.
static void check_access(Shadow& shadow, const Region& region, const char* address, uint64_t bytes,
                         int use, const Thread& me, uint32_t pc)
{
    const uint64_t offset = (uint64_t)(address - region.begin);
    const Check check{shadow, region, offset, bytes,
                      use,    me,     {me.number, me.epoch, me.seen[me.lane], pc}};
    if (use != SIMT_READ && !region.writable)
        shadow.findings.add(key(check, 6, 0),
                            [&] { return "write to a const array: " + subject(check); });
    const uint64_t last = (offset + bytes - 1) / region.granule;
    for (uint64_t i = offset / region.granule; i <= last; i++) check_cell(check, region.cells[i]);
}
