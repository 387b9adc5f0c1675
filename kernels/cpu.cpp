// AR and TAR on CPUs: the operations of ar_tar.py and steps.py. They make training on CPUs fast. A call on a CPU has
// the checks and the plan of a call on a GPU, so most tests need no GPU.
//
// Activations are viewed as (outer, time, inner) with a contiguous inner axis. An item of work is a block of lanes
// (positions on the inner axis) of one sequence over a stretch of time steps. A thread walks an item along time, so that a
// row is still in the cache when its neighbours need it, and memory is read once. A program takes some of the items and
// keeps its own sums. They are added up in the order of the programs, so a result depends neither on the number of
// threads nor on which of them is faster.
//
//     cpu_structures.h  the structures shared with cpu.py
//     cpu_steps.h       the time steps that count
//     cpu_vectors.h     vectors, and the dtypes of memory
//     cpu_draws.h       masks that are drawn from a seed
//     cpu_rows.h        the formula, row by row
//     cpu_work.h        items, programs, threads
//
// No header of Python or PyTorch is included, so one build serves every version of both.

#ifdef __x86_64__
#include <cpuid.h>
#endif

#include <cmath>

#include "cpu_structures.h"
#include "cpu_draws.h"
#include "cpu_rows.h"
#include "cpu_steps.h"
#include "cpu_work.h"

namespace {

/// Multiply a term by its coefficient; a coefficient of 0 leaves the term out, even if it is infinite or NaN.
double weighted(double coefficient, double term) { return coefficient == 0 ? 0 : coefficient * term; }

/// Divide the sums and write the penalty and its terms.
void finish(const Metadata &metadata, const Steps &steps, Partials sums, const Addresses &memory) {
    const int32_t dtype = metadata.compute_dtype;
    const double ar = sums.ar / steps.ar_divisor, tar = sums.tar / steps.tar_divisor;
    store(memory.penalty, 0, weighted(memory.alpha, ar) + weighted(memory.beta, tar), dtype);
    if (!memory.terms) return;
    store(memory.terms, 0, ar, dtype);
    store(memory.terms, 1, tar, dtype);
}

/// Compute the factors of the gradients in float64: no intermediate factor overflows, and each is rounded once.
Factors factors(const Metadata &metadata, const Steps &steps, const Addresses &memory) {
    const auto plain = [](double x) { return x == x ? x : std::nan(""); };  // a NaN that survives any rounding
    const double upstream = memory.upstream ? number(memory.upstream, metadata.compute_dtype) : 0;
    return {plain(upstream * (2 * memory.alpha / steps.ar_divisor)),
            plain(upstream * (2 * memory.beta / steps.tar_divisor))};
}

/// Compute the sums, write dropped if a forward has a mask, and write the gradients for which there is memory.
Partials walk(const Metadata &metadata, const Addresses &memory, const Steps &steps, int threads) {
    const Factors by = factors(metadata, steps, memory);
    const Rows raw(memory.raw, metadata.raw, metadata.raw_dtype);
    const Draw draw(memory.mask, memory.threshold);
    const Rows mask(draw.on ? nullptr : memory.mask, metadata.mask, metadata.raw_dtype);
    const Rows upstream_dropped(memory.upstream_dropped, metadata.upstream_dropped, metadata.raw_dtype);
    const Rows dropped(memory.dropped, metadata.dropped, metadata.dropped_dtype);
    const Rows grad_raw(memory.grad_raw, metadata.grad_raw, metadata.raw_dtype);
    const Rows grad_dropped(memory.grad_dropped, metadata.grad_dropped, metadata.dropped_dtype);
    Pass passes[2];
    int count = 0;
    const auto add = [&](const Pass &pass, Flags always, Flags terms) {  // padding has no terms
        if (!pass.x.base || !(always | terms)) return;
        passes[count] = pass;
        passes[count].code = row_code(pass.x.dtype, metadata.compute_dtype, always | terms, by);
        passes[count++].padding = row_code(pass.x.dtype, metadata.compute_dtype, always, by);
    };
    const auto flag = [](bool on, Flags flags) { return on ? flags : 0; };
    const bool drops = memory.penalty && memory.mask, of_raw = memory.mask || metadata.ar_of_raw;
    const auto ar = [&](const Rows &grad) {
        return flag(metadata.sum_ar, SUM_AR) | flag(grad.base && metadata.grad_ar, GRAD_AR);
    };
    const Flags tar = flag(metadata.sum_tar, SUM_TAR) | flag(grad_raw.base && metadata.grad_tar, GRAD_TAR);
    const Flags masked = flag(memory.mask, MASKED) | flag(drops, DROPS) | flag(upstream_dropped.base, UPSTREAM);
    add(Pass(steps, raw, mask, draw, upstream_dropped, drops ? dropped : grad_raw),
        masked | flag(grad_raw.base, WRITES), tar | flag(of_raw, ar(grad_raw)));
    if (!memory.mask)  // dropped is null if it is raw itself
        add(Pass(steps, dropped, {}, {}, {}, grad_dropped), flag(grad_dropped.base, WRITES), ar(grad_dropped));
    return run(passes, count, steps, threads);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

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

/// Return the highest level of x86-64 that the processor and the system can run, or 0 on other processors. cpu.py asks
/// the library that all processors can run before it loads another one.
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

/// Encode which steps of all sequences count, and count them: see `encode_sequence`. Lengths, (outer,), valid, (outer,
/// time), and starts, (outer, time), may each be null.
EXPORT void encode_steps(const Encoding *memory, int64_t outer, int64_t time) {
    memory->counts[0] = memory->counts[1] = 0;
    for (int64_t i = 0; i < outer; ++i) {
        const auto at = [&](auto *first) { return first ? first + i * time : nullptr; };
        encode_sequence(memory->lengths ? memory->lengths[i] : time, at(memory->valid), at(memory->starts),
                      at(memory->bits), time, memory->counts);
    }
}

/// Write the penalty and its terms; write dropped if there is a mask.
EXPORT void forward(const Metadata *metadata, const Addresses *memory, int threads) {
    const Steps steps(*metadata, *memory);
    finish(*metadata, steps, walk(*metadata, *memory, steps, threads), *memory);
}

/// Write the gradients.
EXPORT void backward(const Metadata *metadata, const Addresses *memory, int threads) {
    walk(*metadata, *memory, Steps(*metadata, *memory), threads);
}
