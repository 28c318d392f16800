// simt_wait.h -- where threads wait for each other: barriers, warp operations, and what it means when
// they wait in vain.
#pragma once

#include <map>

#include "simt_run.h"

namespace {

std::string describe(const Fiber& fiber)
{
    static const char* const names[] = {"__syncwarp", "__shfl_sync", "__shfl_xor_sync",
                                        "__shfl_up_sync", "__shfl_down_sync", "__ballot_sync"};
    if (fiber.state == FINISHED) return "finished";
    if (fiber.state == AT_BARRIER) return text("wait in __syncthreads (line %d)", fiber.wait.line);
    return text("wait in %s (line %d, mask 0x%08x)", names[fiber.wait.operation], fiber.wait.line,
                fiber.wait.mask);
}

// The block cannot go on: which threads wait for what.
void diverged()
{
    std::map<std::string, std::string> groups;
    bool barrier = false;
    for (size_t i = 0; i < run->fibers.size();) {
        const std::string state = describe(run->fibers[i]);
        barrier |= run->fibers[i].state == AT_BARRIER;
        size_t end = i + 1;
        while (end < run->fibers.size() && describe(run->fibers[end]) == state) end++;
        std::string& list = groups[state];
        if (list.size() < 60)
            list += (list.empty() ? "" : ", ") +
                    (end == i + 1 ? text("%zu", i) : text("%zu-%zu", i, end - 1));
        else if (list.back() != '.')
            list += ", ...";
        i = end;
    }
    std::string finding = text("divergence at a %s: block %u: ", barrier ? "barrier" : "warp operation",
                               run->fibers[0].thread.block);
    const char* between = "";
    for (const auto& [state, threads] : groups) {
        finding += between + ("threads " + threads + ' ') + state;
        between = "; ";
    }
    stop(finding);
}

void on_barrier(int line)
{
    run->running->state = AT_BARRIER;
    run->running->wait.line = line;
    take_turns();
}

// All threads of the block wait in one and the same __syncthreads: let them go on.
bool release_barrier()
{
    for (const Fiber& fiber : run->fibers)
        if (fiber.state != AT_BARRIER || fiber.wait.line != run->fibers[0].wait.line) return false;
    run->epoch++;
    for (Fiber& fiber : run->fibers) {
        fiber.state = READY;
        fiber.thread.epoch = run->epoch;
    }
    return true;
}

bool same(const Wait& a, const Wait& b)
{
    return a.operation == b.operation && a.line == b.line && a.mask == b.mask && a.width == b.width;
}

// The lane whose value a shuffle gives to `lane`.
int source_of(const Wait& wait, int lane)
{
    const int first = lane / wait.width * wait.width, end = first + wait.width;
    int source = lane;
    if (wait.operation == SIMT_SHFL) source = first + (wait.argument & (wait.width - 1));
    if (wait.operation == SIMT_SHFL_XOR) source = lane ^ wait.argument;
    if (wait.operation == SIMT_SHFL_UP) source = lane - wait.argument;
    if (wait.operation == SIMT_SHFL_DOWN) source = lane + wait.argument;
    return source < first || source >= end ? lane : source;
}

// All lanes of the mask are here: exchange values, order memory, let them go on.
void complete(Fiber* warp)
{
    const unsigned mask = run->running->wait.mask;
    uint64_t result[LANES] = {}, votes = 0;
    uint32_t joined[LANES] = {};
    for (unsigned lane = 0; lane < LANES; lane++) {
        if (!(mask >> lane & 1)) continue;
        const Fiber& fiber = warp[lane];
        votes |= (fiber.wait.value & 1) << lane;
        for (unsigned l = 0; l < LANES; l++)
            joined[l] = std::max(joined[l], fiber.thread.seen[l]);
        const int source = source_of(fiber.wait, (int)lane);
        if (!(mask >> source & 1))
            run->shadow.findings.add((uint64_t)fiber.wait.line << 32, [&] {
                return "shuffle: " + who(fiber.thread) +
                       text(" reads lane %d, which is not in the mask 0x%08x (line %d)", source,
                            mask, fiber.wait.line);
            });
        else
            result[lane] = warp[source].wait.value;
    }
    const int operation = run->running->wait.operation;
    for (unsigned lane = 0; lane < LANES; lane++) {
        if (!(mask >> lane & 1)) continue;
        Thread& thread = warp[lane].thread;
        if (operation == SIMT_SYNC) {
            std::copy(joined, joined + LANES, thread.seen);
            thread.seen[lane]++;
        }
        warp[lane].wait.value = operation == SIMT_BALLOT ? votes : result[lane];
        warp[lane].state = READY;
    }
}

unsigned long long on_warp(int operation, unsigned mask, unsigned long long value, int argument,
                           int width, int line)
{
    Fiber& me = *run->running;
    me.wait = {operation, line, argument, width, mask, value};
    me.state = IN_WARP;
    if (!(mask >> me.thread.lane & 1))
        stop("warp operation: " + who() +
             text(" is not in the mask 0x%08x that it gives (line %d)", mask, line));
    if (width < 1 || width > 32 || (width & (width - 1)))
        stop("warp operation: " + who() + text(" gives the width %d (line %d)", width, line));
    Fiber* warp = &run->fibers[me.thread.warp * LANES];
    bool all = true;
    for (unsigned lane = 0; lane < LANES; lane++)
        if (mask >> lane & 1)
            all = all && warp[lane].state == IN_WARP && same(warp[lane].wait, me.wait);
    if (all) complete(warp);
    take_turns();
    return me.wait.value;
}

void on_yield() { take_turns(); }

}  // namespace
