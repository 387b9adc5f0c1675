// The formula, applied to one row, or to several consecutive rows at once, in loops of vectors.
//
// The formula is written once, with flags that turn its parts on. For each common set of flags the compiler makes a
// copy of the loop in which the flags are constants. For all other sets one copy tests the flags as it runs.

#pragma once

#include <algorithm>

#include "cpu_structures.h"
#include "cpu_vectors.h"

namespace {

constexpr int64_t GROUP = 32;           // lanes at a time, each with its own sums, so that additions need not wait
constexpr int64_t CHUNK = 64 * GROUP;  // lanes that float32 sums accurately enough, in the dtype of the computation

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

/// Flags that turn the parts of the formula on.
using Flags = unsigned;
constexpr Flags SUM_AR = 1;      // sum the squares for AR
constexpr Flags SUM_TAR = 2;     // sum the squares for TAR
constexpr Flags GRAD_AR = 4;     // the gradient has AR's part
constexpr Flags GRAD_TAR = 8;    // the gradient has TAR's part
constexpr Flags MASKED = 16;     // there is a mask
constexpr Flags DROPS = 32;      // write raw times the mask
constexpr Flags UPSTREAM = 64;   // add the upstream gradient of dropped
constexpr Flags WRITES = 128;    // write the gradient
constexpr Flags INTO = 256;      // the change into the row counts
constexpr Flags FROM = 512;      // the change from the row counts

/// Pointers to a row in each tensor, and to the rows before and behind it; null if there is none.
struct Pointers {
    const char *previous, *current, *following;
    const char *mask, *upstream_dropped;
    char *out;     // dropped, or a gradient
    bool streams;  // out is written past the caches

    Pointers after(int64_t bytes) const {
        const auto at = [=](auto *row) { return row ? row + bytes : nullptr; };
        return {at(previous), at(current), at(following), at(mask), at(upstream_dropped), at(out), streams};
    }
};

/// A copy of the end of a row that is shorter than a group of lanes, with zeros behind it.
class Tail {
  public:
    /// Copy the last `size` bytes of all rows; a group of lanes has `group` bytes.
    __attribute__((noinline)) Pointers copy(Pointers rows, int64_t size, int64_t group) {
        const auto at = [=](char *to, const char *row) -> const char * {
            if (!row) return nullptr;
            std::memset(to, 0, group);
            std::memcpy(to, row, size);
            return to;
        };
        bytes = size;
        out = rows.out;
        return {at(copies[0], rows.previous), at(copies[1], rows.current), at(copies[2], rows.following),
                at(copies[3], rows.mask), at(copies[4], rows.upstream_dropped), out ? written : nullptr, false};
    }

    /// Write to the end of the row, if it was copied.
    void finish() const {
        if (out) std::memcpy(out, written, bytes);
    }

  private:
    char copies[5][GROUP * sizeof(double)];
    char written[GROUP * sizeof(double)];
    char *out = nullptr;
    int64_t bytes;
};

/// The sums of a group of lanes, in float64.
class Totals {
  public:
    /// Add the sums of a chunk.
    template <class A>
    INLINE void add(const Pair<A> (&parts)[GROUP / PAIR]) {
        for (int64_t j = 0; j < GROUP / PAIR; ++j) {
            for (int64_t lane = 0; lane < LANES; ++lane) {
                sums[j * PAIR + lane] += parts[j].first[lane];
                sums[j * PAIR + LANES + lane] += parts[j].second[lane];
            }
        }
    }

    /// Add the sums up in the order of their positions in memory, which is the same in all builds.
    template <class T>
    __attribute__((noinline)) double total() const {
        double by_position[GROUP];
        for (int64_t j = 0; j < GROUP; ++j)
            by_position[j / PAIR * PAIR + position<T>(j % PAIR / LANES, j % LANES)] = sums[j];
        for (int64_t left = GROUP / 2; left; left /= 2)
            for (int64_t j = 0; j < left; ++j) by_position[j] += by_position[j + left];
        return by_position[0];
    }

  private:
    double sums[GROUP] = {};
};

/// Call `use(rows, lane, ar, tar)` for all lanes of a row, a pair of vectors at a time, and return the sums that it
/// adds up.
///
/// Only sums that `flags` turn on are returned; the others are 0. A chunk is summed in the dtype of the computation,
/// and the chunks are added in float64. The order of additions is the same in all builds, whichever gradients are
/// written.
template <class A, class T, class F, class Use>
inline INLINE Partials over_lanes(const Pointers &rows, int64_t lanes, F flags, Use use) {
    constexpr int64_t PAIRS = GROUP / PAIR;
    Totals ar_sums, tar_sums;
    Tail tail;
    for (int64_t done = 0; done < lanes; done += CHUNK) {
        Pair<A> ar[PAIRS] = {}, tar[PAIRS] = {};
        Pointers now = rows.after(done * sizeof(T));
        int64_t whole = std::min(lanes - done, CHUNK) / GROUP * GROUP, rest = std::min(lanes - done, CHUNK) - whole;
        for (;;) {  // the tail takes a second turn, so that the compiler needs no second copy of the loop
            for (int64_t lane = 0; lane < whole; lane += GROUP)
#pragma GCC unroll GROUP  // early, so that the sums stay in registers
                for (int64_t j = 0; j < PAIRS; ++j) use(now, lane + j * PAIR, ar[j], tar[j]);
            if (rest == 0) break;
            now = tail.copy(now.after(whole * sizeof(T)), rest * sizeof(T), GROUP * sizeof(T));
            whole = GROUP;
            rest = 0;
        }
        if (flags & SUM_AR) ar_sums.add(ar);
        if (flags & SUM_TAR) tar_sums.add(tar);
    }
    tail.finish();
    return {flags & SUM_AR ? ar_sums.total<T>() : 0, flags & SUM_TAR ? tar_sums.total<T>() : 0};
}

/// Apply the formula: compute raw times the mask, the sums of squares for AR and TAR, and the gradient. The gradient
/// has AR's part, TAR's part, and the upstream gradient of dropped. If there is a mask, AR's part and the upstream
/// gradient pass it.
template <class A, class T, class F>
inline INLINE Partials formula(const Pointers &rows, int64_t lanes, const Factors &factors, F flags) {
    const A ar_factor = factors.ar, tar_factor = factors.tar;
    return over_lanes<A, T>(rows, lanes, flags, [=](const Pointers &at, int64_t lane, auto &ar, auto &tar) INLINE {
        const bool masked_ar = (flags & (MASKED | GRAD_AR)) == (MASKED | GRAD_AR);
        const Pair<A> value = read<A, T>(at.current, lane);
        Pair<A> mask{}, kept = value, change_into{}, change_from{}, gradient{}, through{};
        if (flags & MASKED) mask = read<A, T>(at.mask, lane);
        if (flags & DROPS) kept = write<A, T>(at.out, lane, value * mask, at.streams);
        if (flags & INTO) change_into = value - read<A, T>(at.previous, lane);
        if (flags & SUM_AR) ar += kept * kept;
        if (flags & SUM_TAR) tar += change_into * change_into;
        if (!(flags & WRITES)) return;
        if (flags & FROM) change_from = read<A, T>(at.following, lane) - value;
        if (flags & GRAD_TAR) gradient = (change_into - change_from) * tar_factor;
        if (flags & GRAD_AR && !masked_ar)
            gradient = flags & GRAD_TAR ? gradient + value * ar_factor : value * ar_factor;
        if (flags & UPSTREAM) through = read<A, T>(at.upstream_dropped, lane);
        if (masked_ar) through += rounded<A, T>(value * mask) * ar_factor;
        // If nothing passes the mask, nothing is multiplied by it: 0 * inf would be NaN.
        if (flags & MASKED && (flags & UPSTREAM || masked_ar)) through *= mask;
        const bool is_own = flags & GRAD_TAR || (flags & GRAD_AR && !masked_ar);  // in padding -0 stays -0
        if (flags & UPSTREAM || masked_ar) gradient = is_own ? through + gradient : through;
        write<A, T>(at.out, lane, gradient, at.streams);
    });
}

// ---- from values to copies of the loops

/// One copy of the formula's loop. A copy whose flags are constants ignores its argument `flags`.
using RowLoop = Partials (*)(const Pointers &rows, int64_t lanes, const Factors &factors, Flags flags);

/// The loops of the formula, with all flags except INTO and FROM, which each row adds.
struct RowCode {
    Flags flags, usual_flags;
    RowLoop usual, any;  // the loop for the usual flags, if there is one; the loop for any flags
    Factors factors;

    Partials operator()(const Pointers &rows, int64_t lanes) const {
        Flags now = flags;
        if (flags & (SUM_TAR | GRAD_TAR) && rows.previous) now |= INTO;
        if (flags & GRAD_TAR && rows.following) now |= FROM;
        return (now == usual_flags ? usual : any)(rows, lanes, factors, now);
    }
};

template <class A, class T>
Partials any_loop(const Pointers &rows, int64_t lanes, const Factors &factors, Flags flags) {
    return formula<A, T>(rows, lanes, factors, flags);
}

template <class A, class T, Flags KNOWN>
Partials usual_loop(const Pointers &rows, int64_t lanes, const Factors &factors, Flags) {
    return formula<A, T>(rows, lanes, factors, std::integral_constant<Flags, KNOWN>());
}

/// Find the loops for some flags. The usual flags have both neighbours, which only the first and the last row lack.
template <class A, class T, Flags... KNOWN>
RowCode code_of(Flags flags, Factors factors) {
    const Flags usual = flags | (flags & (SUM_TAR | GRAD_TAR) ? INTO : 0) | (flags & GRAD_TAR ? FROM : 0);
    RowCode code{flags, usual, any_loop<A, T>, any_loop<A, T>, factors};
    ((usual == KNOWN && (code.usual = usual_loop<A, T, KNOWN>)), ...);
    return code;
}

/// Find the loops for some flags; common sets of flags have their own copies.
template <class A, class T>
RowCode usual_code(Flags flags, Factors factors) {
    constexpr Flags AR = SUM_AR, TAR = SUM_TAR | INTO, DROP = MASKED | DROPS, BACK = MASKED | UPSTREAM | WRITES;
    constexpr Flags BY_AR = WRITES | GRAD_AR, BY_TAR = WRITES | GRAD_TAR | INTO | FROM, BY_BOTH = BY_AR | BY_TAR;
    return code_of<A, T, AR, TAR, AR | TAR, BY_AR, BY_TAR, BY_BOTH,                       // the penalty, its gradients
                   DROP, DROP | AR, DROP | TAR, DROP | AR | TAR,                          // dropout
                   BACK, BACK | BY_AR, BACK | BY_TAR, BACK | BY_BOTH>(flags, factors);  // its gradient
}

/// Find the loops for the dtypes of memory and of the computation. A computation in float64 over another dtype is rare,
/// since one of the two tensors must be float64; it has no loops whose flags are constants.
inline RowCode row_code(int32_t dtype, int32_t compute_dtype, Flags flags, Factors factors) {
    if (compute_dtype == FLOAT64) switch (dtype) {
        case FLOAT16: return code_of<double, Half>(flags, factors);
        case BFLOAT16: return code_of<double, BFloat>(flags, factors);
        case FLOAT32: return code_of<double, float>(flags, factors);
        default: return usual_code<double, double>(flags, factors);
    }
    switch (dtype) {
        case FLOAT16: return usual_code<float, Half>(flags, factors);
        case BFLOAT16: return usual_code<float, BFloat>(flags, factors);
        default: return usual_code<float, float>(flags, factors);
    }
}

}  // namespace
