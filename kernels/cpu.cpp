// AR and TAR on CPUs: the operations of penalty.py and dropout.py.
//
// Activations are seen as (outer, time, inner) with a contiguous inner axis. An item of work is a block of lanes
// (positions on the inner axis) of one sequence over a run of time steps. It is walked along time, so that a row is
// still in the cache when its neighbours need it and memory is read once. A program takes some of the items and keeps
// its own sums; they are added up in the order of the programs, so a result depends neither on the number of threads
// nor on which of them was faster.
//
//     cpu_plans.h    the structures shared with cpu.py
//     cpu_steps.h    lengths and marks: the time steps that count
//     cpu_vectors.h  vectors, and the dtypes of memory
//     cpu_rows.h     the formulas, row by row
//     cpu_work.h     items, programs, threads
//
// No header of Python or PyTorch is included: one build serves every version of both.

#ifdef __x86_64__
#include <cpuid.h>
#endif

#include <cmath>
#include <cstring>
#include <exception>

#include "cpu_plans.h"
#include "cpu_rows.h"
#include "cpu_steps.h"
#include "cpu_work.h"

namespace {

/// Return the coefficient in memory, if there is one, else that of the plan.
double coefficient(double planned, const void *at, int32_t dtype) { return at ? number(at, dtype) : planned; }

/// Multiply a term by its coefficient; one that is 0 leaves it out, even if it is infinite or NaN.
double weighted(double coefficient, double term) { return coefficient == 0 ? 0 : coefficient * term; }

/// Divide the sums and write the penalty and its terms.
template <class Plan, class Memory>
void finish(const Plan &plan, const Counted &counted, Partials sums, const Memory &memory) {
    const int32_t dtype = plan.compute_dtype;
    const double ar = sums.ar / counted.steps.ar_divisor, tar = sums.tar / counted.steps.tar_divisor;
    const double penalty = weighted(coefficient(plan.alpha, memory.alpha, dtype), ar) +
                           weighted(coefficient(plan.beta, memory.beta, dtype), tar);
    store(memory.penalty, 0, penalty + (plan.adds ? number(memory.penalty, dtype) : 0), dtype);
    if (!memory.terms) return;
    store(memory.terms, 0, ar + (plan.adds ? number(memory.terms, dtype) : 0), dtype);
    store(memory.terms, 1, tar + (plan.adds ? number(memory.terms, dtype, 1) : 0), dtype);
}

/// Compute the factors of the gradients in float64: no intermediate factor overflows, and each is rounded once.
template <class Plan, class Memory>
Factors factors(const Plan &plan, const Counted &counted, const Memory &memory) {
    if (!memory.grad) return {0, 0};
    const auto plain = [](double x) { return x == x ? x : std::nan(""); };  // a NaN that survives any rounding
    const int32_t dtype = plan.compute_dtype;
    const double upstream = number(memory.grad, dtype);
    const double alpha = coefficient(plan.alpha, memory.alpha, dtype);
    const double beta = coefficient(plan.beta, memory.beta, dtype);
    return {plain(upstream * (2 * alpha / counted.steps.ar_divisor)),
            plain(upstream * (2 * beta / counted.steps.tar_divisor))};
}

/// Form the sums, if `sum`; write the gradients that have memory, if there is an upstream gradient.
Partials penalty(const Penalty &plan, const PenaltyMemory &memory, const Counted &counted, bool sum, int threads) {
    const Factors by = factors(plan, counted, memory);
    Pass passes[2];
    int count = 0;
    const auto add = [&](const Rows &x, Rows grad, Flags sums, Flags gradients) {
        if (!memory.grad) grad = {};
        const Flags flags = (sum ? sums : 0) | (grad.base ? gradients : 0);
        if (!x.base || !flags) return;
        Pass &pass = passes[count++] = Pass(counted, x, {}, {}, grad);
        pass.code = penalty_code(x.dtype, plan.compute_dtype, flags, by);
    };
    const auto rows = [&](const void *base, Strides strides, int32_t dtype) {
        return Rows(base, strides, dtype, counted.packed_at());
    };
    // A term whose coefficient is 0 is measured without a gradient.
    const Flags ar_grad = plan.ar_of_raw && plan.alpha != 0 ? AR_GRAD : 0;
    const Flags tar_grad = ar_grad && plan.beta == 0 ? 0 : TAR_GRAD;
    add(rows(memory.raw, plan.raw, plan.raw_dtype), rows(memory.grad_raw, plan.grad_raw, plan.raw_dtype),
        plan.ar_of_raw ? AR | TAR : TAR, ar_grad | tar_grad);
    add(rows(memory.dropped, plan.dropped, plan.dropped_dtype),
        rows(memory.grad_dropped, plan.grad_dropped, plan.dropped_dtype), AR, AR_GRAD);
    return run(passes, count, counted, threads);
}

/// Apply the mask, and form the sums.
Partials dropout(const Dropout &plan, const DropoutMemory &memory, const Counted &counted, int threads) {
    const auto rows = [&](const void *base, Strides strides) { return Rows(base, strides, plan.dtype, nullptr); };
    Pass pass(counted, rows(memory.raw, plan.raw), rows(memory.mask, plan.mask), {},
              rows(memory.dropped, plan.dropped));
    const Flags flags = (plan.ar ? AR : 0) | (plan.ar && plan.ar_of_raw ? OF_RAW : 0) | (plan.tar ? TAR : 0);
    pass.code = dropout_code(plan.dtype, plan.compute_dtype, flags);
    pass.padding = dropout_code(plan.dtype, plan.compute_dtype, 0);
    return run(&pass, 1, counted, threads);
}

/// Write the gradient of raw.
void dropout_gradient(const Dropout &plan, const DropoutMemory &memory, const Counted &counted, int threads) {
    const auto rows = [&](const void *base, Strides strides) { return Rows(base, strides, plan.dtype, nullptr); };
    Pass pass(counted, rows(memory.raw, plan.raw), rows(memory.mask, plan.mask), rows(memory.dropped, plan.dropped),
              rows(memory.grad_raw, plan.grad_raw));
    const Factors by = factors(plan, counted, memory);
    const Flags upstream = (memory.dropped ? UPSTREAM : 0) | (memory.mask ? 0 : UNMASKED);
    const Flags ar = plan.ar ? AR_GRAD | (plan.ar_of_raw ? OF_RAW : 0) : 0, tar = plan.tar ? TAR_GRAD : 0;
    pass.code = dropout_gradient_code(plan.dtype, plan.compute_dtype, upstream | (memory.grad ? ar | tar : 0), by);
    pass.padding = dropout_gradient_code(plan.dtype, plan.compute_dtype, upstream, by);
    run(&pass, 1, counted, threads);
}

/// The values that the functions below return.
enum Outcome : int { DONE = 0, NOTHING_TO_DO = 1, OUT_OF_MEMORY = 2 };

/// Call `work(counted)`. No exception may leave the library: its callers are not C++.
template <class Plan, class Memory, class Work>
int guarded(const Plan &plan, const Memory &memory, Work work) {
    try {
        work(Counted(plan.steps, plan.sizes, memory.lengths, memory.valid, memory.starts));
        return DONE;
    } catch (const std::exception &) {  // there is no other than of memory
        return OUT_OF_MEMORY;
    }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

/// The sizes that cpu.py compares with those of its own structures.
EXPORT const int64_t structure_sizes[] = {sizeof(Penalty), sizeof(PenaltyMemory), sizeof(Dropout),
                                          sizeof(DropoutMemory)};

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

/// Write the penalty and its terms, and the gradients for the upstream gradient that is expected, if one is given.
EXPORT int penalty_forward(const Penalty *plan, const PenaltyMemory *memory, int threads) {
    return guarded(*plan, *memory, [=](const Counted &counted) {
        finish(*plan, counted, penalty(*plan, *memory, counted, true, threads), *memory);
    });
}

/// Write the gradients, unless those that a forward wrote are right: `assumed` is null, or has its upstream gradient.
/// Bits are compared, so that 0 is not -0, and NaN is itself.
EXPORT int penalty_backward(const Penalty *plan, const PenaltyMemory *memory, int threads) {
    if (memory->assumed && !std::memcmp(memory->assumed, memory->grad, bytes_of(plan->compute_dtype)))
        return NOTHING_TO_DO;
    return guarded(*plan, *memory,
                   [=](const Counted &counted) { penalty(*plan, *memory, counted, false, threads); });
}

/// Write `raw * mask`, and the penalty and its terms.
EXPORT int dropout_forward(const Dropout *plan, const DropoutMemory *memory, int threads) {
    return guarded(*plan, *memory, [=](const Counted &counted) {
        finish(*plan, counted, dropout(*plan, *memory, counted, threads), *memory);
    });
}

/// Write the gradient of raw. The gradients of dropped and of the penalty may each be null.
EXPORT int dropout_backward(const Dropout *plan, const DropoutMemory *memory, int threads) {
    return guarded(*plan, *memory,
                   [=](const Counted &counted) { dropout_gradient(*plan, *memory, counted, threads); });
}
