// AR and TAR on CPUs: the operations of ar_tar.py and steps.py.
//
// Activations are seen as (outer, time, inner) with a contiguous inner axis. An item of work is a block of lanes
// (positions on the inner axis) of one sequence over a run of time steps. It is walked along time, so that a row is
// still in the cache when its neighbours need it and memory is read once. A program takes some of the items and keeps
// its own sums; they are added up in the order of the programs, so a result depends neither on the number of threads
// nor on which of them was faster.
//
//     cpu_plans.h    the structures shared with cpu.py
//     cpu_steps.h    the time steps that count
//     cpu_vectors.h  vectors, and the dtypes of memory
//     cpu_rows.h     the formula, row by row
//     cpu_work.h     items, programs, threads
//
// No header of Python or PyTorch is included: one build serves every version of both.

#ifdef __x86_64__
#include <cpuid.h>
#endif

#include <cmath>
#include <cstring>

#include "cpu_plans.h"
#include "cpu_rows.h"
#include "cpu_steps.h"
#include "cpu_work.h"

namespace {

/// Multiply a term by its coefficient; one that is 0 leaves it out, even if it is infinite or NaN.
double weighted(double coefficient, double term) { return coefficient == 0 ? 0 : coefficient * term; }

/// Divide the sums and write the penalty and its terms.
void finish(const Plan &plan, const Counted &counted, Partials sums, const Addresses &memory) {
    const int32_t dtype = plan.compute_dtype;
    const double ar = sums.ar / counted.ar_divisor, tar = sums.tar / counted.tar_divisor;
    store(memory.penalty, 0, weighted(memory.alpha, ar) + weighted(memory.beta, tar), dtype);
    if (!memory.terms) return;
    store(memory.terms, 0, ar, dtype);
    store(memory.terms, 1, tar, dtype);
}

/// Compute the factors of the gradients in float64: no intermediate factor overflows, and each is rounded once.
Factors factors(const Plan &plan, const Counted &counted, const Addresses &memory) {
    const void *const upstream_at = memory.penalty ? memory.assumed : memory.upstream;
    if (!upstream_at) return {0, 0};
    const auto plain = [](double x) { return x == x ? x : std::nan(""); };  // a NaN that survives any rounding
    const double upstream = number(upstream_at, plan.compute_dtype);
    return {plain(upstream * (2 * memory.alpha / counted.ar_divisor)),
            plain(upstream * (2 * memory.beta / counted.tar_divisor))};
}

/// Form the sums, write dropped if a forward has a mask, and write the gradients that have memory.
Partials walk(const Plan &plan, const Addresses &memory, const Counted &counted, int threads) {
    const Factors by = factors(plan, counted, memory);
    const auto rows = [&](const void *base, Strides strides, int32_t dtype) {
        return Rows(base, strides, dtype, counted.offsets);
    };
    const Rows raw = rows(memory.raw, plan.raw, plan.raw_dtype), mask = rows(memory.mask, plan.mask, plan.raw_dtype);
    const Rows arrived = rows(memory.arrived, plan.arrived, plan.raw_dtype);
    const Rows dropped = rows(memory.dropped, plan.dropped, plan.dropped_dtype);
    const Rows grad_raw = rows(memory.grad_raw, plan.grad_raw, plan.raw_dtype);
    const Rows grad_dropped = rows(memory.grad_dropped, plan.grad_dropped, plan.dropped_dtype);
    Pass passes[2];
    int count = 0;
    const auto add = [&](const Pass &pass, Flags always, Flags terms) {  // padding has no terms
        if (!pass.x.base || !(always | terms)) return;
        passes[count] = pass;
        passes[count].code = row_code(pass.x.dtype, plan.compute_dtype, always | terms, by);
        passes[count++].padding = row_code(pass.x.dtype, plan.compute_dtype, always, by);
    };
    const auto flag = [](bool on, Flags flags) { return on ? flags : 0; };
    const bool drops = memory.penalty && mask.base, of_raw = mask.base || plan.ar_of_raw;
    const auto ar = [&](const Rows &grad) { return flag(plan.sum_ar, SUM_AR) | flag(grad.base && plan.grad_ar, GRAD_AR); };
    const Flags tar = flag(plan.sum_tar, SUM_TAR) | flag(grad_raw.base && plan.grad_tar, GRAD_TAR);
    add(Pass(counted, raw, mask, arrived, drops ? dropped : grad_raw),
        flag(mask.base, MASKED) | flag(drops, DROPS) | flag(arrived.base, ARRIVED) | flag(grad_raw.base, WRITES),
        tar | flag(of_raw, ar(grad_raw)) | flag(mask.base && plan.ar_of_raw, AR_OF_RAW));
    if (!mask.base)  // dropped is null where AR is that of raw
        add(Pass(counted, dropped, {}, {}, grad_dropped), flag(grad_dropped.base, WRITES), ar(grad_dropped));
    return run(passes, count, counted, threads);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

/// The sizes that cpu.py compares with those of its own structures.
EXPORT const int64_t structure_sizes[] = {sizeof(Plan), sizeof(Addresses)};

/// The hash of the source that the library was built from.
#ifndef SOURCES
#define SOURCES 0
#endif
EXPORT const std::uint64_t sources = SOURCES;

/// Whether the library was built with OpenMP.
#ifdef _OPENMP
EXPORT const int32_t threaded = 1;
#else
EXPORT const int32_t threaded = 0;
#endif

/// Return the highest level of x86-64 that the processor and the system run; 0 elsewhere. cpu.py asks the library that
/// all processors run before it loads another one.
EXPORT int processor_level() {
#ifdef __x86_64__
    unsigned int eax, ebx, features, extended, edx;
    if (!__get_cpuid(1, &eax, &ebx, &features, &edx) || !__get_cpuid(0x80000001, &eax, &ebx, &extended, &edx)) return 1;
    const bool moves = features & bit_F16C && features & bit_MOVBE && extended & bit_LZCNT;
    __builtin_cpu_init();
#define HAS __builtin_cpu_supports
    if (!moves || !HAS("avx2") || !HAS("bmi") || !HAS("bmi2") || !HAS("fma")) return 1;
    const bool v4 = HAS("avx512f") && HAS("avx512bw") && HAS("avx512cd") && HAS("avx512dq") && HAS("avx512vl");
#undef HAS
    return v4 ? 4 : 3;
#else
    return 0;
#endif
}

/// Mark the steps of all sequences, and count them: see `mark_sequence`. Lengths, (outer,), and valid and starts, (outer,
/// time), may each be null.
EXPORT void mark_steps(const Marking *memory, int64_t outer, int64_t time) {
    memory->counts[0] = memory->counts[1] = 0;
    for (int64_t i = 0; i < outer; ++i) {
        const auto at = [&](auto *marks) { return marks ? marks + i * time : nullptr; };
        mark_sequence(memory->lengths ? memory->lengths[i] : time, at(memory->valid), at(memory->starts),
                      at(memory->steps), time, memory->counts);
    }
}

/// Write the penalty and its terms, dropped where there is a mask, and the gradients for the upstream gradient that is
/// assumed, if one is.
EXPORT void forward(const Plan *plan, const Addresses *memory, int threads) {
    const Counted counted(*plan, *memory);
    finish(*plan, counted, walk(*plan, *memory, counted, threads), *memory);
}

/// Write the gradients, unless those that a forward wrote are right: `assumed` is null, or has its upstream gradient.
/// Bits are compared, so that 0 is not -0, and NaN is itself. Return whether they were written.
EXPORT int backward(const Plan *plan, const Addresses *memory, int threads) {
    if (memory->assumed && !std::memcmp(memory->assumed, memory->upstream, bytes_of(plan->compute_dtype))) return 0;
    walk(*plan, *memory, Counted(*plan, *memory), threads);
    return 1;
}
