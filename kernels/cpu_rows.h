// The formulas, applied to one row, or to several consecutive rows at once, in loops of vectors.
//
// Each formula is written once, with flags that turn its parts on. Sets of flags that are common are known to the
// compiler, in a copy of the loop for each; for all other sets one copy tests the flags in the loop.

#pragma once

#include <algorithm>

#include "cpu_plans.h"
#include "cpu_vectors.h"

namespace {

constexpr int64_t STEP = 32;          // lanes at a time, each with sums of its own, so that additions need not wait
constexpr int64_t CHUNK = 64 * STEP;  // lanes that are summed in the dtype of the computation: float32 is exact enough

/// Partial sums of the squares of AR and of TAR.
struct Partials {
    double ar = 0, tar = 0;

    void operator+=(Partials more) {
        ar += more.ar;
        tar += more.tar;
    }
};

/// The factors of the gradients of the two sums; a loop rounds them to the dtype of the computation.
struct Factors {
    double ar, tar;
};

/// The parts of a formula.
using Flags = unsigned;
constexpr Flags AR = 1;         // sum the squares of AR
constexpr Flags TAR = 2;        // and of TAR
constexpr Flags AR_GRAD = 4;    // write a gradient, with the part of AR
constexpr Flags TAR_GRAD = 8;   // and with that of TAR
constexpr Flags OF_RAW = 16;    // with dropout: AR is of raw, not of dropped
constexpr Flags UPSTREAM = 32;  // dropped has a gradient
constexpr Flags ARRIVES = 64;   // the change from the row before counts
constexpr Flags LEAVES = 128;   // and that to the row behind
constexpr Flags INSIDE = ARRIVES | LEAVES;
constexpr Flags UNMASKED = 256;  // the gradient passes no mask

/// Where a row begins in each tensor, and the rows before and behind it; null where there is none.
struct Pointers {
    const char *previous, *current, *following;
    const char *mask, *upstream;  // the gradient of dropped
    char *out;
    bool streams;  // out is written past the caches

    Pointers after(int64_t bytes) const {
        const auto at = [=](auto *row) { return row ? row + bytes : nullptr; };
        return {at(previous), at(current), at(following), at(mask), at(upstream), at(out), streams};
    }
};

/// A copy of the end of a row, too short for a step, with zeros behind it.
class Tail {
  public:
    /// Copy the last `size` bytes of all rows; a step has `step` bytes.
    __attribute__((noinline)) Pointers copy(Pointers rows, int64_t size, int64_t step) {
        const auto at = [=](char *to, const char *row) -> const char * {
            if (!row) return nullptr;
            std::memset(to, 0, step);
            std::memcpy(to, row, size);
            return to;
        };
        bytes = size;
        out = rows.out;
        return {at(copies[0], rows.previous), at(copies[1], rows.current),
                at(copies[2], rows.following), at(copies[3], rows.mask),
                at(copies[4], rows.upstream),  out ? written : nullptr,
                false};
    }

    /// Write to the end of the row, if it was copied.
    void finish() const {
        if (out) std::memcpy(out, written, bytes);
    }

  private:
    char copies[5][STEP * sizeof(double)];
    char written[STEP * sizeof(double)];
    char *out = nullptr;
    int64_t bytes;
};

/// Sums of the lanes of a step, in float64.
class Totals {
  public:
    /// Add those of a chunk.
    template <class A>
    INLINE void add(const Pair<A> (&parts)[STEP / PAIR]) {
        for (int64_t j = 0; j < STEP / PAIR; ++j) {
            for (int64_t lane = 0; lane < LANES; ++lane) {
                sums[j * PAIR + lane] += parts[j].first[lane];
                sums[j * PAIR + LANES + lane] += parts[j].second[lane];
            }
        }
    }

    /// Add them up in the order of their positions in memory: the same in all builds.
    template <class T>
    __attribute__((noinline)) double total() const {
        double by_position[STEP];
        for (int64_t j = 0; j < STEP; ++j)
            by_position[j / PAIR * PAIR + position<T>(j % PAIR / LANES, j % LANES)] = sums[j];
        for (int64_t left = STEP / 2; left; left /= 2)
            for (int64_t j = 0; j < left; ++j) by_position[j] += by_position[j + left];
        return by_position[0];
    }

  private:
    double sums[STEP] = {};
};

/// Call `use(rows, lane, ar, tar)` for all lanes of a row, a pair of vectors at a time; return the sums that it adds
/// up, those of AR and of TAR that `flags` have.
///
/// A chunk is summed in the dtype of the computation, and the chunks in float64. The order of additions is the same in
/// all builds, whichever gradients are written.
template <class A, class T, class F, class Use>
inline INLINE Partials over_lanes(const Pointers &rows, int64_t lanes, F flags, Use use) {
    constexpr int64_t PAIRS = STEP / PAIR;
    Totals ar_sums, tar_sums;
    Tail tail;
    for (int64_t done = 0; done < lanes; done += CHUNK) {
        Pair<A> ar[PAIRS] = {}, tar[PAIRS] = {};
        Pointers now = rows.after(done * sizeof(T));
        int64_t whole = std::min(lanes - done, CHUNK) / STEP * STEP, rest = std::min(lanes - done, CHUNK) - whole;
        for (;;) {  // a second time for the tail, so that the compiler needs no second copy of the loop
            for (int64_t lane = 0; lane < whole; lane += STEP)
#pragma GCC unroll STEP  // early, so that the sums stay in registers
                for (int64_t j = 0; j < PAIRS; ++j) use(now, lane + j * PAIR, ar[j], tar[j]);
            if (rest == 0) break;
            now = tail.copy(now.after(whole * sizeof(T)), rest * sizeof(T), STEP * sizeof(T));
            whole = STEP;
            rest = 0;
        }
        if (flags & AR) ar_sums.add(ar);
        if (flags & TAR) tar_sums.add(tar);
    }
    tail.finish();
    return {flags & AR ? ar_sums.total<T>() : 0, flags & TAR ? tar_sums.total<T>() : 0};
}

/// Sum the squares of a row and of the changes that lead to it; write the gradient of both.
struct PenaltyRow {
    template <class A, class T, class F>
    static Partials run(const Pointers &rows, int64_t lanes, const Factors &factors, F flags) {
        const A ar_factor = factors.ar, tar_factor = factors.tar;
        return over_lanes<A, T>(rows, lanes, flags, [=](const Pointers &at, int64_t lane, auto &ar, auto &tar) INLINE {
            const Pair<A> value = read<A, T>(at.current, lane);
            Pair<A> arriving{}, leaving{}, gradient{};
            if (flags & ARRIVES) arriving = value - read<A, T>(at.previous, lane);
            if (flags & AR) ar += value * value;
            if (flags & TAR) tar += arriving * arriving;
            if (!(flags & (AR_GRAD | TAR_GRAD))) return;
            if (flags & LEAVES) leaving = read<A, T>(at.following, lane) - value;
            if (flags & TAR_GRAD) gradient = (arriving - leaving) * tar_factor;
            if (flags & AR_GRAD) gradient = flags & TAR_GRAD ? gradient + value * ar_factor : value * ar_factor;
            write<A, T>(at.out, lane, gradient, at.streams);
        });
    }
};

/// Write `raw * mask`; sum its squares, or those of raw, and those of the changes of raw that lead to the row.
struct DropoutRow {
    template <class A, class T, class F>
    static Partials run(const Pointers &rows, int64_t lanes, const Factors &, F flags) {
        return over_lanes<A, T>(rows, lanes, flags, [=](const Pointers &at, int64_t lane, auto &ar, auto &tar) INLINE {
            const Pair<A> value = read<A, T>(at.current, lane);
            const Pair<A> kept = write<A, T>(at.out, lane, value * read<A, T>(at.mask, lane), at.streams);
            const Pair<A> counted = flags & OF_RAW ? value : kept;
            Pair<A> arriving{};
            if (flags & ARRIVES) arriving = value - read<A, T>(at.previous, lane);
            if (flags & AR) ar += counted * counted;
            if (flags & TAR) tar += arriving * arriving;
        });
    }
};

/// Write the gradient of raw: that of dropped and of AR through the mask, and that of TAR. Without a mask, add those of
/// AR of raw and of TAR to a gradient that arrives at raw.
struct DropoutGradientRow {
    template <class A, class T, class F>
    static Partials run(const Pointers &rows, int64_t lanes, const Factors &factors, F flags) {
        const A ar_factor = factors.ar, tar_factor = factors.tar;
        return over_lanes<A, T>(rows, lanes, flags, [=](const Pointers &at, int64_t lane, auto &, auto &) INLINE {
            const Pair<A> value = read<A, T>(at.current, lane);
            const bool ar_of_dropped = (flags & (AR_GRAD | OF_RAW)) == AR_GRAD;
            Pair<A> gradient{}, keep{}, arriving{}, leaving{};
            if (!(flags & UNMASKED)) keep = read<A, T>(at.mask, lane);
            if (flags & UPSTREAM) gradient = read<A, T>(at.upstream, lane);
            if (ar_of_dropped) gradient += rounded<A, T>(value * keep) * ar_factor;
            // Where nothing has passed the mask, 0 * inf would be NaN.
            if (!(flags & UNMASKED) && (flags & UPSTREAM || ar_of_dropped)) gradient *= keep;
            if (flags & AR_GRAD && flags & OF_RAW) gradient += value * ar_factor;
            if (flags & ARRIVES) arriving = value - read<A, T>(at.previous, lane);
            if (flags & LEAVES) leaving = read<A, T>(at.following, lane) - value;
            if (flags & TAR_GRAD) gradient += (arriving - leaving) * tar_factor;
            write<A, T>(at.out, lane, gradient, at.streams);
        });
    }
};

// ---- from values to copies of the loops

/// One copy of a formula's loop. A copy with known flags ignores its argument `flags`.
using RowLoop = Partials (*)(const Pointers &rows, int64_t lanes, const Factors &factors, Flags flags);

/// A formula with all flags but those of the neighbours, and its loops.
struct RowCode {
    Flags flags, usual_flags;
    RowLoop usual, any;  // with the usual flags, where there is such a loop; with any flags
    Factors factors;

    Partials operator()(const Pointers &rows, int64_t lanes) const {
        Flags now = flags;
        if (flags & (TAR | TAR_GRAD) && rows.previous) now |= ARRIVES;
        if (flags & TAR_GRAD && rows.following) now |= LEAVES;
        return (now == usual_flags ? usual : any)(rows, lanes, factors, now);
    }
};

template <class Formula, class A, class T>
Partials any_loop(const Pointers &rows, int64_t lanes, const Factors &factors, Flags flags) {
    return Formula::template run<A, T>(rows, lanes, factors, flags);
}

template <class Formula, class A, class T, Flags KNOWN>
Partials usual_loop(const Pointers &rows, int64_t lanes, const Factors &factors, Flags) {
    return Formula::template run<A, T>(rows, lanes, factors, std::integral_constant<Flags, KNOWN>());
}

/// Find the loops of a formula. All rows but the first and the last have both neighbours.
template <class Formula, class A, class T, Flags... KNOWN>
RowCode code_of(Flags flags, Factors factors) {
    const Flags usual = flags | (flags & (TAR | TAR_GRAD) ? ARRIVES : 0) | (flags & TAR_GRAD ? LEAVES : 0);
    RowCode code{flags, usual, any_loop<Formula, A, T>, any_loop<Formula, A, T>, factors};
    ((usual == KNOWN && (code.usual = usual_loop<Formula, A, T, KNOWN>)), ...);
    return code;
}

/// Find the loops for the dtypes of memory and of the computation. Tensors of two dtypes, one of them float64, are rare:
/// a computation in float64 over another dtype has no loops with known flags.
template <class Formula, Flags... KNOWN>
RowCode code_for(int32_t dtype, int32_t compute_dtype, Flags flags, Factors factors) {
    if (compute_dtype == FLOAT64) switch (dtype) {
        case FLOAT16: return code_of<Formula, double, Half>(flags, factors);
        case BFLOAT16: return code_of<Formula, double, BFloat>(flags, factors);
        case FLOAT32: return code_of<Formula, double, float>(flags, factors);
        default: return code_of<Formula, double, double, KNOWN...>(flags, factors);
    }
    switch (dtype) {
        case FLOAT16: return code_of<Formula, float, Half, KNOWN...>(flags, factors);
        case BFLOAT16: return code_of<Formula, float, BFloat, KNOWN...>(flags, factors);
        default: return code_of<Formula, float, float, KNOWN...>(flags, factors);
    }
}

RowCode penalty_code(int32_t dtype, int32_t compute_dtype, Flags flags, Factors factors) {
    return code_for<PenaltyRow, AR, AR_GRAD, AR | AR_GRAD, TAR | ARRIVES, TAR_GRAD | INSIDE, TAR | TAR_GRAD | INSIDE,
                    AR | TAR | ARRIVES, AR_GRAD | TAR_GRAD | INSIDE, AR | TAR | AR_GRAD | TAR_GRAD | INSIDE>(
        dtype, compute_dtype, flags, factors);
}

RowCode dropout_code(int32_t dtype, int32_t compute_dtype, Flags flags) {
    return code_for<DropoutRow, 0, AR, TAR | ARRIVES, AR | TAR | ARRIVES, AR | OF_RAW | TAR | ARRIVES>(
        dtype, compute_dtype, flags, {});
}

RowCode dropout_gradient_code(int32_t dtype, int32_t compute_dtype, Flags flags, Factors factors) {
    return code_for<DropoutGradientRow, UPSTREAM, UPSTREAM | AR_GRAD, UPSTREAM | TAR_GRAD | INSIDE,
                    UPSTREAM | AR_GRAD | TAR_GRAD | INSIDE, UPSTREAM | AR_GRAD | OF_RAW | TAR_GRAD | INSIDE,
                    UNMASKED | UPSTREAM | AR_GRAD | OF_RAW, UNMASKED | UPSTREAM | TAR_GRAD | INSIDE,
                    UNMASKED | UPSTREAM | AR_GRAD | OF_RAW | TAR_GRAD | INSIDE>(
        dtype, compute_dtype, flags, factors);
}

}  // namespace
