// AR and TAR on CPUs: the operations of penalty.py and dropout.py.
//
// Activations are seen as (outer, time, inner) with a contiguous inner axis. An item of work is a block of lanes
// (positions on the inner axis) of one sequence over a run of time steps. It is walked along time, so that a row is
// still in the cache when its neighbours need it and memory is read once. A program takes some of the items and keeps
// its own sums; they are added up in the order of the programs, so a result depends neither on the number of threads
// nor on which of them was faster.
//
// No header but those of the compiler: one build serves every Python and every torch.

#include <pthread.h>
#include <sys/mman.h>
#if defined(__AVX2__) && defined(__F16C__)
#define X86_64_V3
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>
#include <vector>

#pragma GCC diagnostic ignored "-Wpsabi"  // no function that takes vectors is called from outside

namespace {

using std::int32_t, std::int64_t, std::uint8_t, std::uint16_t, std::uint32_t, std::uintptr_t;

constexpr int64_t BLOCK = 8192;          // lanes: a row, its neighbours and its gradient stay in a cache of 256 KB
constexpr int64_t ITEM = 1 << 16;        // elements: enough to hide what it costs to fetch an item
constexpr int64_t COPIES = 2048;         // elements of a mask for several short rows
constexpr int64_t PROGRAMS = 1024;       // at most, for each tensor
constexpr int64_t SERIAL = 3 << 17;      // elements up to which one thread is about as fast as two: a second may wait
                                         // for a core that others use, 8 ms, and the first for it
constexpr int64_t HUGE_PAGE = 1 << 21;   // bytes
constexpr int64_t LARGE = 1 << 22;       // bytes of an output from which huge pages are asked for

// ---- vectors, in the compiler's own notation: it does not see all loops that could be vector code

#define INLINE __attribute__((always_inline))  // vectors stay in registers

enum class Half : uint16_t {};
enum class BFloat : uint16_t {};

#ifdef X86_64_V3
constexpr int64_t LANES = 8;  // of a vector: as many floats as the processor takes at once
#else
constexpr int64_t LANES = 4;
#endif
constexpr int64_t STEP = 16;          // lanes at a time, each with sums of its own: additions wait for few others
constexpr int64_t CHUNK = 64 * STEP;  // lanes after which these are added up: float32 is exact enough until there

template <class T>
struct VectorOf {
    using Element = std::conditional_t<std::is_enum_v<T>, uint16_t, T>;
    typedef Element type __attribute__((vector_size(LANES * sizeof(T))));
};
template <class T>
using Vector = typename VectorOf<T>::type;

template <class To, class From>
To bits_of(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

/// Convert 16 bits to 32, for which the compiler takes more instructions than one.
inline INLINE Vector<uint32_t> widened(Vector<uint16_t> x) {
#ifdef X86_64_V3
    return bits_of<Vector<uint32_t>>(_mm256_cvtepu16_epi32(bits_of<__m128i>(x)));
#else
    return __builtin_convertvector(x, Vector<uint32_t>);
#endif
}

/// The same back, of numbers that 16 bits can hold.
inline INLINE Vector<uint16_t> narrowed(Vector<uint32_t> x) {
#ifdef X86_64_V3
    const auto bits = bits_of<__m256i>(x);
    return bits_of<Vector<uint16_t>>(_mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1)));
#else
    return __builtin_convertvector(x, Vector<uint16_t>);
#endif
}

/// Convert elements to A, the dtype of the computation, float or double.
template <class A, class T>
inline INLINE Vector<A> wide(const Vector<T> &x) {
    if constexpr (std::is_same_v<T, BFloat>) {
        return __builtin_convertvector(bits_of<Vector<float>>(widened(x) << 16), Vector<A>);
    } else if constexpr (std::is_same_v<T, Half>) {
#ifdef X86_64_V3
        const auto value = bits_of<Vector<float>>(_mm256_cvtph_ps(bits_of<__m128i>(x)));
#else
        const auto half = bits_of<Vector<int32_t>>(widened(x));
        const Vector<int32_t> magnitude = (half & 0x7fff) << 13;  // its exponent is 112 too small
        auto bits = bits_of<Vector<int32_t>>(bits_of<Vector<float>>(magnitude) * 0x1p112f);  // exact, subnormal, too
        bits |= (magnitude >= 0x0f800000) & 0x7f800000;  // infinity and NaN
        const auto value = bits_of<Vector<float>>(bits | (half & 0x8000) << 16);
#endif
        return __builtin_convertvector(value, Vector<A>);
    } else {
        return __builtin_convertvector(x, Vector<A>);
    }
}

/// Round results to the dtype of some memory, to the nearest, ties to even.
template <class T, class A>
inline INLINE Vector<T> rounded(const Vector<A> &results) {
    if constexpr (std::is_same_v<T, BFloat>) {
        const Vector<float> value = __builtin_convertvector(results, Vector<float>);
        const auto bits = bits_of<Vector<uint32_t>>(value);
        const Vector<uint32_t> nearest = bits + 0x7fff + (bits >> 16 & 1);
        return narrowed((value == value ? nearest : Vector<uint32_t>{} + 0x7fc00000) >> 16);
    } else if constexpr (std::is_same_v<T, Half>) {
        const Vector<float> value = __builtin_convertvector(results, Vector<float>);
#ifdef X86_64_V3
        return bits_of<Vector<T>>(_mm256_cvtps_ph(bits_of<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
#else
        const auto bits = bits_of<Vector<int32_t>>(value);
        const Vector<int32_t> magnitude = bits & 0x7fffffff;
        // Below 2 ** -14 a half is a multiple of 2 ** -24, as a float between 0.5 and 1 is.
        const auto small = bits_of<Vector<int32_t>>(bits_of<Vector<float>>(magnitude) + 0.5f) - bits_of<int32_t>(0.5f);
        const Vector<int32_t> nearest = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112 << 23)) >> 13;
        const Vector<int32_t> normal = nearest < 0x7c00 ? nearest : 0x7c00;
        const Vector<int32_t> ordered = magnitude < 113 << 23 ? small : normal;
        const Vector<int32_t> half = value == value ? ordered : 0x7e00;
        return narrowed(bits_of<Vector<uint32_t>>(half | (bits >> 16 & 0x8000)));
#endif
    } else {
        return __builtin_convertvector(results, Vector<T>);
    }
}

/// Where a row has the lanes of a vector, or fewer of them at its end.
struct Whole {
    int64_t first;
    static constexpr int64_t lanes = LANES;
};
struct Part {
    int64_t first, lanes;
};

/// Read lanes of a row; beyond its end are zeros.
template <class A, class T, class At>
inline INLINE Vector<A> read(const T *row, At at) {
    Vector<T> x{};
    std::memcpy(&x, row + at.first, at.lanes * sizeof(T));
    return wide<A, T>(x);
}

/// Write lanes of a row; give what can be read there.
template <class A, class T, class At>
inline INLINE Vector<A> write(T *row, At at, const Vector<A> &results) {
    const Vector<T> x = rounded<T, A>(results);
    std::memcpy(row + at.first, &x, at.lanes * sizeof(T));
    return wide<A, T>(x);
}

// ---- what the host hands over: cpu.py has the same structures

struct Sizes {
    int64_t outer, time, inner;
};

struct Strides {  // in elements
    int64_t outer, time;
};

/// What the sums are divided by, and how lengths are given.
struct Steps {
    double ar_divisor, tar_divisor;  // 0: the elements and the changes that count
    int64_t packed;                  // rows as in a PackedSequence: lengths are its batch sizes, and outer is not used
};

/// The metadata of a penalty: what stays the same from call to call.
struct Penalty {
    Sizes sizes;
    Strides raw, dropped, grad_raw, grad_dropped;
    Steps steps;
    double alpha, beta;
    int32_t raw_dtype, dropped_dtype, compute_dtype;
    int32_t ar_of_raw;
    int32_t adds;  // the penalty and its terms are added to what is there
};

/// Its memory. A pointer that is null is a term that is off, a gradient that nobody needs, or a value not asked for.
struct PenaltyMemory {
    const void *raw, *dropped;
    void *grad_raw, *grad_dropped;
    const void *grad;          // () in the dtype of the computation: the upstream gradient
    const void *assumed;       // () likewise: the upstream gradient that a forward wrote gradients for
    const int64_t *lengths;    // (outer,), or batch sizes (time,), or null
    const uint8_t *valid;      // (outer, time), 1 where a step counts, or null; with neither all steps count
    const void *alpha, *beta;  // () like grad; they take the place of the plan's, or null
    void *penalty, *terms;     // (), and (2,) ar and tar, like grad
};

/// The metadata of variational dropout with the penalty; `dropped` has the strides of its gradient in a backward.
struct Dropout {
    Sizes sizes;
    Strides raw, mask, dropped, grad_raw;
    Steps steps;
    double alpha, beta;
    int32_t dtype, compute_dtype;
    int32_t ar, tar;    // whether each term is on
    int32_t ar_of_raw;  // AR is that of raw, as fastai v1 forms it, not that of dropped
    int32_t adds;       // as in the penalty
};

struct DropoutMemory {
    const void *raw, *mask;
    void *dropped, *grad_raw;
    const void *grad;          // () in the dtype of the computation, or null: the penalty has no gradient
    const int64_t *lengths;    // this and the rest as in the penalty
    const uint8_t *valid;
    const void *alpha, *beta;
    void *penalty, *terms;
};

enum Dtype : int32_t { FLOAT16, BFLOAT16, FLOAT32, FLOAT64 };

// ---- how the work is cut

/// A block of lanes of one sequence over a run of time steps.
struct Item {
    int64_t sequence, lane, lanes, start, stop;
};

/// The items of a view, and how many programs share them.
struct Cut {
    Sizes sizes;
    int64_t blocks, run, runs, items, programs;

    explicit Cut(Sizes given) : sizes(given) {
        blocks = ceil_div(sizes.inner, BLOCK);
        runs = ceil_div(sizes.time, std::max<int64_t>(ITEM / std::min(sizes.inner, BLOCK), 1));
        run = ceil_div(sizes.time, runs);
        items = sizes.outer * blocks * runs;
        programs = std::min(items, PROGRAMS);
    }

    Item place(int64_t item) const {
        const int64_t lane = item % blocks * BLOCK, start = item / blocks % runs * run;
        return {item / blocks / runs, lane, std::min(BLOCK, sizes.inner - lane), start,
                std::min(start + run, sizes.time)};
    }

    /// Whether rows of this stride lie one after the other, and an item has all lanes of each.
    bool dense(Strides strides) const { return strides.time == sizes.inner && blocks == 1; }

  private:
    static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
};

/// Whether a time step of a sequence counts, and whether the changes that arrive at it and that leave it do.
struct State {
    bool counts, arrives, leaves;

    bool operator==(const State &other) const {
        return counts == other.counts && arrives == other.arrives && leaves == other.leaves;
    }
};

/// A state, and the step before which it ends; that may be the very step where not all sequences of an item are in it.
struct Stretch {
    State state;
    int64_t stop;
};

/// Lanes of a time step that are alike, or all lanes of several steps that lie one after the other.
struct Span : State {
    int64_t step, lane, lanes;
};

/// Which time steps count, read once a launch.
class Counted {
  public:
    /// `given` are lengths, or batch sizes of packed rows; `valid` are marks of steps; either or both are null.
    Counted(const Steps &steps, Sizes sizes, const int64_t *given, const uint8_t *valid)
        : steps(steps), sizes(sizes), valid(valid), lengths(steps.packed ? given[0] : sizes.outer, sizes.time) {
        if (steps.packed) {
            offsets.resize(sizes.time);
            for (int64_t step = 1; step < sizes.time; ++step) offsets[step] = offsets[step - 1] + given[step - 1];
            int64_t length = sizes.time;  // batch sizes do not grow, and so lengths do not
            for (size_t i = 0; i < lengths.size(); ++i) {
                while (given[length - 1] <= int64_t(i)) --length;
                lengths[i] = length;
            }
        } else if (given) {
            for (int64_t i = 0; i < sizes.outer; ++i) lengths[i] = std::clamp<int64_t>(given[i], 0, sizes.time);
        }
        int64_t pairs = 0;
        if (valid) {
            ends.resize(sizes.outer * sizes.time);
            for (int64_t i = 0; i < sizes.outer; ++i) {
                int64_t end = sizes.time;
                for (int64_t step = sizes.time; step-- > 0;) {
                    if (step + 1 < end && marked(i, step) != marked(i, step + 1)) end = step + 1;
                    ends[i * sizes.time + step] = end;
                    rows += marked(i, step);
                    pairs += marked(i, step) && step + 1 < end;
                }
            }
        } else {
            for (int64_t length : lengths) {
                rows += length;
                pairs += std::max<int64_t>(length - 1, 0);
            }
        }
        if (steps.ar_divisor == 0) {  // of nothing the mean is 0
            this->steps.ar_divisor = std::max<int64_t>(rows * sizes.inner, 1);
            this->steps.tar_divisor = std::max<int64_t>(pairs * sizes.inner, 1);
        }
    }

    /// The state that all sequences of an item are in from a time step on, or that of the first for no steps.
    Stretch stretch(const Item &item, int64_t step) const {
        const int64_t first = item.sequence + item.lane / sizes.inner;
        const int64_t last = item.sequence + (item.lane + item.lanes - 1) / sizes.inner;
        Stretch found{state(first, step), item.stop};
        for (int64_t i = first; i <= last && found.stop > step; ++i)
            found.stop = state(i, step) == found.state ? std::min(found.stop, until(i, step, found.state)) : step;
        return found;
    }

    /// The lanes of an item that are alike at a time step, from this one on: those of one sequence or of several.
    Span alike(const Item &item, int64_t step, int64_t lane) const {
        const int64_t end = item.lane + item.lanes, first = lane / sizes.inner;
        const State found = state(item.sequence + first, step);
        int64_t past = first + 1;
        while (past * sizes.inner < end && state(item.sequence + past, step) == found) ++past;
        return {found, step, lane, std::min(past * sizes.inner, end) - lane};
    }

    /// The sizes of a view of tensors of these strides. Sequences that lie beside each other at each time step, as in
    /// a batch with time first and in packed rows, count as one of many lanes.
    Sizes view(std::initializer_list<Strides> all) const {
        const int64_t outer = lengths.size();
        for (Strides strides : all)
            if (strides.outer != sizes.inner) return {outer, sizes.time, sizes.inner};
        return {1, sizes.time, outer * sizes.inner};
    }

    /// How many elements a tensor has.
    int64_t elements() const { return (steps.packed ? rows : sizes.outer * sizes.time) * sizes.inner; }

    /// Where each time step of packed rows begins; null of others.
    const int64_t *packed_at() const { return steps.packed ? offsets.data() : nullptr; }

    Steps steps;

  private:
    bool marked(int64_t sequence, int64_t step) const {
        return valid ? valid[sequence * sizes.time + step] : step < lengths[sequence];
    }

    /// Where the steps end that count, or do not, as this one does.
    int64_t end(int64_t sequence, int64_t step) const {
        if (valid) return ends[sequence * sizes.time + step];
        return step < lengths[sequence] ? lengths[sequence] : sizes.time;
    }

    State state(int64_t sequence, int64_t step) const {
        const bool counts = marked(sequence, step);
        return {counts, counts && step > 0 && marked(sequence, step - 1), counts && step + 1 < end(sequence, step)};
    }

    /// Where this state of a sequence ends: the first and the last of the steps that count are in states of their own.
    int64_t until(int64_t sequence, int64_t step, State now) const {
        if (now.counts && !now.arrives) return step + 1;
        return end(sequence, step) - now.leaves;
    }

    Sizes sizes;                   // inner: lanes of one sequence
    const uint8_t *valid;          // (outer, time) marks, or null
    std::vector<int64_t> ends;     // (outer, time) of marks: the next step that is marked otherwise
    std::vector<int64_t> lengths;  // of each sequence, where there are no marks
    std::vector<int64_t> offsets;  // of packed rows: where a time step begins
    int64_t rows = 0;              // that count
};

/// A tensor as (outer, time, inner), or as packed rows.
template <class T>
struct View {
    T *data;
    Strides strides;
    const int64_t *offsets;  // null unless packed

    T *row(int64_t sequence, int64_t step, int64_t lane) const {
        return data + sequence * strides.outer + (offsets ? offsets[step] : step) * strides.time + lane;
    }
};

// ---- rows: the loops that become vector code

struct Sums {
    double ar = 0, tar = 0;

    void operator+=(Sums more) {
        ar += more.ar;
        tar += more.tar;
    }
};

/// What the gradients of the two sums are multiplied by.
template <class A>
struct Scales {
    A ar, tar;
};

/// Add up the sums of the lanes of a step, those of a vector after those of another: in the same order in all builds.
template <class A>
inline INLINE double total(const Vector<A> (&parts)[STEP / LANES]) {
    double sums[STEP];
    for (int64_t j = 0; j < STEP; ++j) sums[j] = parts[j / LANES][j % LANES];
    for (int64_t left = STEP / 2; left; left /= 2)
        for (int64_t j = 0; j < left; ++j) sums[j] += sums[j + left];
    return sums[0];
}

template <class A, class Lanes, size_t... J>
Sums over_lanes(int64_t lanes, Lanes use, std::index_sequence<J...>) {
    Sums sums;
    for (int64_t first = 0; first < lanes; first += CHUNK) {
        const int64_t stop = std::min(first + CHUNK, lanes);
        Vector<A> ar[sizeof...(J)] = {}, tar[sizeof...(J)] = {};
        int64_t i = first;
        for (; i + STEP <= stop; i += STEP) (use(Whole{i + int64_t(J) * LANES}, ar[J], tar[J]), ...);
        const auto rest = [&](int64_t from) { return Part{from, std::clamp<int64_t>(stop - from, 0, LANES)}; };
        if (i < stop) (use(rest(i + int64_t(J) * LANES), ar[J], tar[J]), ...);
        sums += {total<A>(ar), total<A>(tar)};
    }
    return sums;
}

/// Call `use(at, ar, tar)` for all lanes of a row, a vector of them at a time; give the sums of what it adds.
///
/// These are in the dtype of the computation for a while, and then added up in float64. The order of additions is the
/// same in all builds, and for all that one call may be asked to do beside.
template <class A, class Lanes>
Sums over_lanes(int64_t lanes, Lanes use) {
    return over_lanes<A>(lanes, use, std::make_index_sequence<STEP / LANES>());
}

enum Pass { SUM = 1, WRITE = 2, BOTH = 3 };  // form the sums, write the gradient

/// Sum the squares of a row; write the gradient: `scale` times the row.
template <class A, Pass PASS, class T>
Sums squares(const T *row, T *grad, int64_t lanes, A scale) {
    return over_lanes<A>(lanes, [=](auto at, Vector<A> &ar, Vector<A> &) INLINE {
        const Vector<A> value = read<A>(row, at);
        if constexpr (PASS & SUM) ar += value * value;
        if constexpr (PASS & WRITE) write<A>(grad, at, scale * value);
    });
}

/// A row and its neighbours in time, null where there is none.
template <class T>
struct Neighbours {
    const T *previous, *current, *following;
};

/// Call `row(previous, current, following, arrives, leaves)`, the last two telling whether there are such neighbours.
/// Where there are, as nearly everywhere, that is known to the compiler; a row that is missing is not read, but can be.
template <bool LEAVES, class T, class Row>
Sums with_neighbours(Neighbours<T> rows, Row row) {
    const auto [previous, current, following] = rows;
    if (previous && (following || !LEAVES)) return row(previous, current, following, std::true_type(), std::true_type());
    return row(previous ? previous : current, current, following ? following : current, previous != nullptr,
               following != nullptr);
}

/// Which terms raw is in: TAR, AR as well, and either of both only to be measured, without a gradient.
enum Terms { TAR_ALONE, BOTH_TERMS, AR_MEASURED, TAR_MEASURED };

/// Sum the squares of the changes that lead to a row, and those of the row if AR is of raw; write the gradient.
template <class A, Pass PASS, Terms TERMS, class T>
Sums changes(Neighbours<T> rows, T *grad, int64_t lanes, Scales<A> scales) {
    const auto row = [=](const T *previous, const T *current, const T *following, auto arrives, auto leaves) {
        return over_lanes<A>(lanes, [=](auto at, Vector<A> &ar, Vector<A> &tar) INLINE {
            const Vector<A> value = read<A>(current, at);
            const Vector<A> arriving = arrives ? value - read<A>(previous, at) : Vector<A>{};
            if constexpr (PASS & SUM) tar += arriving * arriving;
            if constexpr (PASS & SUM && TERMS != TAR_ALONE) ar += value * value;
            if constexpr (PASS & WRITE) {
                const Vector<A> leaving = leaves ? read<A>(following, at) - value : Vector<A>{};
                Vector<A> gradient = TERMS == TAR_MEASURED ? scales.ar * value : scales.tar * (arriving - leaving);
                if constexpr (TERMS == BOTH_TERMS) gradient += scales.ar * value;
                write<A>(grad, at, gradient);
            }
        });
    };
    return with_neighbours<(PASS & WRITE) != 0>(rows, row);
}

enum Ar { NONE, OF_DROPPED, OF_RAW };  // whether AR is on, and of what

/// Write `raw * mask`; sum its squares, or those of raw, and those of the changes of raw that lead to the row.
template <class A, Ar AR, bool TAR, class T>
Sums drop(Neighbours<T> raw, const T *mask, T *dropped, int64_t lanes) {
    const auto row = [=](const T *previous, const T *current, const T *, auto arrives, auto) {
        return over_lanes<A>(lanes, [=](auto at, Vector<A> &ar, Vector<A> &tar) INLINE {
            const Vector<A> value = read<A>(current, at);
            const Vector<A> kept = write<A>(dropped, at, value * read<A>(mask, at));
            const Vector<A> counted = AR == OF_RAW ? value : kept;
            if constexpr (AR != NONE) ar += counted * counted;
            const Vector<A> arriving = arrives ? value - read<A>(previous, at) : Vector<A>{};
            if constexpr (TAR) tar += arriving * arriving;
        });
    };
    return with_neighbours<false>(raw, row);
}

/// Write the gradient of raw: that of dropped, if ARRIVED, and of AR through the mask, and that of TAR.
template <class A, bool ARRIVED, Ar AR, bool TAR, class T>
Sums drop_backward(Neighbours<T> raw, const T *mask, const T *grad_dropped, T *grad_raw, int64_t lanes, Scales<A> scales) {
    const auto row = [=](const T *previous, const T *current, const T *following, auto arrives, auto leaves) {
        return over_lanes<A>(lanes, [=](auto at, Vector<A> &, Vector<A> &) INLINE {
            const Vector<A> value = read<A>(current, at), keep = read<A>(mask, at);
            Vector<A> gradient{};
            if constexpr (ARRIVED) gradient = read<A>(grad_dropped, at);
            if constexpr (AR == OF_DROPPED) gradient += scales.ar * wide<A, T>(rounded<T, A>(value * keep));
            if constexpr (ARRIVED || AR == OF_DROPPED) gradient *= keep;  // else 0 * inf would be NaN
            if constexpr (AR == OF_RAW) gradient += scales.ar * value;
            if constexpr (TAR) {
                const Vector<A> arriving = arrives ? value - read<A>(previous, at) : Vector<A>{};
                const Vector<A> leaving = leaves ? read<A>(following, at) - value : Vector<A>{};
                gradient += scales.tar * (arriving - leaving);
            }
            write<A>(grad_raw, at, gradient);
        });
    };
    return with_neighbours<true>(raw, row);
}

// ---- from items to rows

/// Go through an item along time. Up to `merged` rows that are alike are taken together: more than one where rows lie
/// one after the other in all tensors. `fill`: visit padding, too.
template <class Visit>
Sums along_time(const Item &item, const Counted &counted, int64_t merged, bool fill, Visit visit) {
    Sums sums;
    for (int64_t step = item.start; step < item.stop;) {
        const auto [state, stop] = counted.stretch(item, step);
        if (stop == step) {
            for (int64_t lane = item.lane, lanes; lane < item.lane + item.lanes; lane += lanes) {
                const Span span = counted.alike(item, step, lane);
                lanes = span.lanes;
                if (span.counts || fill) sums += visit(span);
            }
            ++step;
        } else if (!state.counts && !fill) {
            step = stop;
        } else {
            for (int64_t steps; step < stop; step += steps) {
                steps = std::min(merged, stop - step);
                sums += visit(Span{state, step, item.lane, steps * item.lanes});
            }
        }
    }
    return sums;
}

/// The rows of a span, and its neighbours as far as there are any.
template <class T>
Neighbours<T> rows_of(const View<const T> &x, int64_t sequence, const Span &span) {
    return {span.arrives ? x.row(sequence, span.step - 1, span.lane) : nullptr, x.row(sequence, span.step, span.lane),
            span.leaves ? x.row(sequence, span.step + 1, span.lane) : nullptr};
}

/// A mask as rows of its own: where one stands for all time steps, a span of several needs copies of it.
template <class T>
class MaskRows {
  public:
    MaskRows(const View<const T> &given, const Item &item) : mask(given), item(item) {}

    const T *of(const Span &span) {
        const T *row = mask.row(item.sequence, span.step, span.lane);
        if (mask.strides.time || span.lanes <= item.lanes) return row;
        for (; copied < span.lanes; copied += item.lanes) std::copy_n(row, item.lanes, copies + copied);
        return copies;
    }

  private:
    const View<const T> &mask;
    const Item &item;
    int64_t copied = 0;
    T copies[COPIES];
};

using Walk = std::function<Sums(const Item &)>;

/// Items, and what is to be done with one.
struct Work {
    Cut cut;
    Walk walk;

    /// Do a program's share of the items.
    Sums program(int64_t number) const {
        Sums sums;
        const int64_t stop = (number + 1) * cut.items / cut.programs;
        for (int64_t i = number * cut.items / cut.programs; i < stop; ++i) sums += walk(cut.place(i));
        return sums;
    }
};

// Threads of GNU OpenMP do not survive a fork: a region of more than one would wait for them forever.
bool forked = false;
[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });

/// Do all work in one parallel region; give the sums, always added up in the same order.
Sums run(const std::vector<Work> &works, const Counted &counted, int threads) {
    int64_t programs = 0, elements = 0;
    for (const Work &work : works) {
        programs += work.cut.programs;
        elements += counted.elements();
    }
    if (forked || elements <= SERIAL) threads = 1;
    std::vector<Sums> partials(programs);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < programs; ++i) {
        const int64_t first = works[0].cut.programs;
        partials[i] = i < first ? works[0].program(i) : works[1].program(i - first);
    }
    Sums sums;
    for (const Sums &partial : partials) sums += partial;
    return sums;
}

/// Ask for huge pages where an output of many elements is about to be written, perhaps for the first time.
template <class T>
void advise(View<T> output, int64_t elements) {
    const auto begin = reinterpret_cast<uintptr_t>(output.data), end = begin + elements * sizeof(T);
    const uintptr_t first = (begin + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE, last = end / HUGE_PAGE * HUGE_PAGE;
#ifdef MADV_HUGEPAGE
    if (output.data && end - begin >= LARGE) madvise(reinterpret_cast<void *>(first), last - first, MADV_HUGEPAGE);
#endif
}

// ---- the numbers that a launch reads and writes, in the dtype of the computation

double number(const void *from, int32_t dtype, int64_t i = 0) {
    return dtype == FLOAT64 ? static_cast<const double *>(from)[i] : static_cast<const float *>(from)[i];
}

void store(void *to, int64_t i, double value, int32_t dtype) {
    if (dtype == FLOAT64)
        static_cast<double *>(to)[i] = value;
    else
        static_cast<float *>(to)[i] = static_cast<float>(value);
}

/// A coefficient: the one in memory, if there is one, else that of the plan.
double coefficient(double planned, const void *at, int32_t dtype) { return at ? number(at, dtype) : planned; }

/// Multiply a term by its coefficient; one that is 0 leaves it out, even if it is infinite or NaN.
double weighted(double coefficient, double term) { return coefficient == 0 ? 0 : coefficient * term; }

/// Divide the sums and write the penalty and its terms.
template <class Plan, class Memory>
void finish(const Plan &plan, const Counted &counted, Sums sums, const Memory &memory) {
    const int32_t dtype = plan.compute_dtype;
    const double ar = sums.ar / counted.steps.ar_divisor, tar = sums.tar / counted.steps.tar_divisor;
    const double penalty = weighted(coefficient(plan.alpha, memory.alpha, dtype), ar) +
                           weighted(coefficient(plan.beta, memory.beta, dtype), tar);
    store(memory.penalty, 0, penalty + (plan.adds ? number(memory.penalty, dtype) : 0), dtype);
    if (!memory.terms) return;
    store(memory.terms, 0, ar + (plan.adds ? number(memory.terms, dtype) : 0), dtype);
    store(memory.terms, 1, tar + (plan.adds ? number(memory.terms, dtype, 1) : 0), dtype);
}

/// What the gradients of the sums are multiplied by: rounded once, so that no factor on the way is too large.
template <class A, class Plan, class Memory>
Scales<A> scales_of(const Plan &plan, const Counted &counted, const Memory &memory) {
    if (!memory.grad) return {0, 0};
    const int32_t dtype = plan.compute_dtype;
    const double upstream = number(memory.grad, dtype);
    const double alpha = coefficient(plan.alpha, memory.alpha, dtype), beta = coefficient(plan.beta, memory.beta, dtype);
    return {static_cast<A>(upstream * (2 * alpha / counted.steps.ar_divisor)),
            static_cast<A>(upstream * (2 * beta / counted.steps.tar_divisor))};
}

// ---- from values to types

/// Call `f` with a value of the type of memory, and one of the type of the computation.
template <class A = float, class F>
Walk with_dtype(int32_t dtype, F f) {
    switch (dtype) {
        case FLOAT16: return f(Half(), A());
        case BFLOAT16: return f(BFloat(), A());
        case FLOAT32: return f(float(), A());
        default: return f(double(), double());
    }
}

/// Call `f` with `given` as a type: the one of VALUES that it is.
template <auto... VALUES, class V, class F>
Walk with(V given, F f) {
    Walk walk;
    (void)((given == VALUES && (walk = f(std::integral_constant<V, VALUES>()), true)) || ...);
    return walk;
}

// ---- the penalty

/// A tensor of the penalty, and the memory for its gradient; null where there is none.
struct Operand {
    const void *data;
    void *grad;
    Strides strides, grad_strides;
    int32_t dtype;
};

/// Do a pass over a tensor. `choose(type, compute type, pass, use)` hands `use` what it does with a row: a function of
/// the row and its neighbours, the gradient's row, and how many lanes they have. In padding the gradient is 0.
template <class Choose>
Work penalty_work(const Penalty &plan, const Operand &x, Pass pass, const Counted &counted, Choose choose) {
    const bool packed = counted.packed_at(), writes = pass & WRITE;
    const Cut cut(counted.view({x.strides, writes ? x.grad_strides : x.strides}));
    const bool dense = !packed && cut.dense(x.strides) && (!writes || cut.dense(x.grad_strides));
    const auto walk = [&](auto t, auto a) {
        using T = decltype(t);
        const View<const T> data{static_cast<const T *>(x.data), x.strides, counted.packed_at()};
        const View<T> grad{static_cast<T *>(x.grad), x.grad_strides, counted.packed_at()};
        if (writes) advise(grad, counted.elements());
        return with<SUM, WRITE, BOTH>(pass, [&](auto known_pass) {
            return choose(t, a, known_pass, [&](auto row) -> Walk {
                return [=, &counted](const Item &item) {
                    return along_time(item, counted, dense ? cut.run : 1, writes && !packed, [&](const Span &span) {
                        T *out = writes ? grad.row(item.sequence, span.step, span.lane) : nullptr;
                        if (span.counts) return row(rows_of(data, item.sequence, span), out, span.lanes);
                        std::fill_n(out, span.lanes, T());
                        return Sums();
                    });
                };
            });
        });
    };
    return {cut, plan.compute_dtype == FLOAT64 ? with_dtype<double>(x.dtype, walk) : with_dtype<float>(x.dtype, walk)};
}

/// Which terms raw is in.
Terms terms_of(const Penalty &plan) {
    if (!plan.ar_of_raw) return TAR_ALONE;
    return plan.alpha == 0 ? AR_MEASURED : plan.beta == 0 ? TAR_MEASURED : BOTH_TERMS;
}

/// Form the sums if asked to, and the gradients that have memory, if there is an upstream gradient.
Sums penalty(const Penalty &plan, const PenaltyMemory &memory, const Counted &counted, bool sum, int threads) {
    std::vector<Work> works;
    const auto pass_over = [&](const void *data, const void *grad) {
        return Pass(data ? (sum ? SUM : 0) | (grad && memory.grad ? WRITE : 0) : 0);
    };
    if (const Pass pass = pass_over(memory.raw, memory.grad_raw)) {
        const Operand raw{memory.raw, memory.grad_raw, plan.raw, plan.grad_raw, plan.raw_dtype};
        works.push_back(penalty_work(plan, raw, pass, counted, [&](auto t, auto a, auto known, auto use) {
            using T = decltype(t);
            using A = decltype(a);
            const auto scales = scales_of<A>(plan, counted, memory);
            return with<TAR_ALONE, BOTH_TERMS, AR_MEASURED, TAR_MEASURED>(terms_of(plan), [&](auto terms) {
                return use([=](Neighbours<T> rows, T *grad, int64_t lanes) {
                    return changes<A, decltype(known)::value, decltype(terms)::value>(rows, grad, lanes, scales);
                });
            });
        }));
    }
    if (const Pass pass = pass_over(memory.dropped, memory.grad_dropped)) {
        const Operand dropped{memory.dropped, memory.grad_dropped, plan.dropped, plan.grad_dropped, plan.dropped_dtype};
        works.push_back(penalty_work(plan, dropped, pass, counted, [&](auto t, auto a, auto known, auto use) {
            using T = decltype(t);
            using A = decltype(a);
            const auto scales = scales_of<A>(plan, counted, memory);
            return use([=](Neighbours<T> rows, T *grad, int64_t lanes) {
                return squares<A, decltype(known)::value>(rows.current, grad, lanes, scales.ar);
            });
        }));
    }
    return run(works, counted, threads);
}

// ---- dropout with the penalty

/// How many rows one call takes of those that lie one after the other, and that a mask for all of them is copied for.
template <class T>
int64_t merged(const Item &item, const View<const T> &mask) {
    return mask.strides.time ? item.stop - item.start : std::max<int64_t>(COPIES / item.lanes, 1);
}

/// Whether AR is on, and of what.
Ar ar_of(const Dropout &plan) { return !plan.ar ? NONE : plan.ar_of_raw ? OF_RAW : OF_DROPPED; }

/// Drop units; sum up what counts.
Sums dropout_forward(const Dropout &plan, const DropoutMemory &memory, const Counted &counted, int threads) {
    const Cut cut(counted.view({plan.raw, plan.mask, plan.dropped}));
    const Walk walk = with_dtype(plan.dtype, [&](auto t, auto a) {
        using T = decltype(t);
        using A = decltype(a);
        const View<const T> raw{static_cast<const T *>(memory.raw), plan.raw, nullptr};
        const View<const T> mask{static_cast<const T *>(memory.mask), plan.mask, nullptr};
        const View<T> dropped{static_cast<T *>(memory.dropped), plan.dropped, nullptr};
        const bool dense = cut.dense(plan.raw) && cut.dense(plan.dropped) && (!plan.mask.time || cut.dense(plan.mask));
        advise(dropped, counted.elements());
        return with<NONE, OF_DROPPED, OF_RAW>(ar_of(plan), [&](auto ar) {
            return with<false, true>(plan.tar != 0, [&](auto tar) -> Walk {
                constexpr Ar AR = decltype(ar)::value;
                constexpr bool TAR = decltype(tar)::value;
                return [=, &counted](const Item &item) {
                    MaskRows<T> masks(mask, item);
                    return along_time(item, counted, dense ? merged(item, mask) : 1, true, [&](const Span &span) {
                        const Neighbours<T> rows = rows_of(raw, item.sequence, span);
                        T *out = dropped.row(item.sequence, span.step, span.lane);
                        return span.counts ? drop<A, AR, TAR>(rows, masks.of(span), out, span.lanes)
                                           : drop<A, NONE, false>(rows, masks.of(span), out, span.lanes);
                    });
                };
            });
        });
    });
    return run({{cut, walk}}, counted, threads);
}

/// Write the gradient of raw.
void dropout_backward(const Dropout &plan, const DropoutMemory &memory, const Counted &counted, int threads) {
    const bool arrived = memory.dropped;
    const Cut cut(counted.view({plan.raw, plan.mask, arrived ? plan.dropped : plan.raw, plan.grad_raw}));
    const Walk walk = with_dtype(plan.dtype, [&](auto t, auto a) {
        using T = decltype(t);
        using A = decltype(a);
        const View<const T> raw{static_cast<const T *>(memory.raw), plan.raw, nullptr};
        const View<const T> mask{static_cast<const T *>(memory.mask), plan.mask, nullptr};
        const View<const T> grad_dropped{static_cast<const T *>(memory.dropped), plan.dropped, nullptr};
        const View<T> grad_raw{static_cast<T *>(memory.grad_raw), plan.grad_raw, nullptr};
        const bool dense = cut.dense(plan.raw) && cut.dense(plan.grad_raw) && (!arrived || cut.dense(plan.dropped)) &&
                           (!plan.mask.time || cut.dense(plan.mask));
        const auto scales = scales_of<A>(plan, counted, memory);
        advise(grad_raw, counted.elements());
        return with<false, true>(arrived, [&](auto arrived_) {
            return with<NONE, OF_DROPPED, OF_RAW>(memory.grad ? ar_of(plan) : NONE, [&](auto ar) {
                return with<false, true>(memory.grad && plan.tar, [&](auto tar) -> Walk {
                    constexpr bool ARRIVED = decltype(arrived_)::value, TAR = decltype(tar)::value;
                    constexpr Ar AR = decltype(ar)::value;
                    return [=, &counted](const Item &item) {
                        MaskRows<T> masks(mask, item);
                        return along_time(item, counted, dense ? merged(item, mask) : 1, true, [&](const Span &span) {
                            const Neighbours<T> rows = rows_of(raw, item.sequence, span);
                            const T *above = ARRIVED ? grad_dropped.row(item.sequence, span.step, span.lane) : nullptr;
                            T *out = grad_raw.row(item.sequence, span.step, span.lane);
                            return span.counts
                                ? drop_backward<A, ARRIVED, AR, TAR>(rows, masks.of(span), above, out, span.lanes, scales)
                                : drop_backward<A, ARRIVED, NONE, false>(rows, masks.of(span), above, out, span.lanes, scales);
                        });
                    };
                });
            });
        });
    });
    run({{cut, walk}}, counted, threads);
}

int64_t bytes_of(int32_t dtype) { return dtype == FLOAT64 ? sizeof(double) : sizeof(float); }

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

/// What cpu.py compares with its own structures.
EXPORT const int64_t structure_sizes[] = {sizeof(Penalty), sizeof(PenaltyMemory), sizeof(Dropout), sizeof(DropoutMemory)};

/// Write the penalty and its terms, and the gradients for the upstream gradient that is expected, if one is given.
EXPORT void penalty_forward(const Penalty *plan, const PenaltyMemory *memory, int threads) {
    const Counted counted(plan->steps, plan->sizes, memory->lengths, memory->valid);
    finish(*plan, counted, penalty(*plan, *memory, counted, true, threads), *memory);
}

/// Write the gradients, unless those that a forward wrote are right: `assumed` is null, or has its upstream gradient.
/// Returns whether it wrote any. Bits are compared, so that 0 is not -0, and NaN is itself.
EXPORT int penalty_backward(const Penalty *plan, const PenaltyMemory *memory, int threads) {
    if (memory->assumed && !std::memcmp(memory->assumed, memory->grad, bytes_of(plan->compute_dtype))) return 0;
    const Counted counted(plan->steps, plan->sizes, memory->lengths, memory->valid);
    penalty(*plan, *memory, counted, false, threads);
    return 1;
}

/// Write `raw * mask`, and the penalty and its terms.
EXPORT void dropout_forward(const Dropout *plan, const DropoutMemory *memory, int threads) {
    const Counted counted(plan->steps, plan->sizes, memory->lengths, memory->valid);
    finish(*plan, counted, dropout_forward(*plan, *memory, counted, threads), *memory);
}

/// Write the gradient of raw, of the gradients of dropped and of the penalty, either of which may be null.
EXPORT void dropout_backward(const Dropout *plan, const DropoutMemory *memory, int threads) {
    dropout_backward(*plan, *memory, Counted(plan->steps, plan->sizes, memory->lengths, memory->valid), threads);
}
