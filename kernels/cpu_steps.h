// The time steps that count, as lengths or marks of valid steps and starts give them, and stretches of steps in one state.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu_plans.h"

namespace {

constexpr int64_t AHEAD = 1024;  // marks that are read in advance, so that the time taken is not quadratic

/// Where an item of work lies: a block of lanes of one sequence over a run of time steps.
struct Tile {
    int64_t sequence, lane, lanes, start, stop;
};

/// Whether a time step of a sequence counts, and whether the changes from the step before and to the step behind do.
struct State {
    bool counts, arrives, leaves;

    bool operator==(const State &other) const {
        return counts == other.counts && arrives == other.arrives && leaves == other.leaves;
    }
};

/// A state, and the step before which it ends: the first step itself where the sequences of a tile differ.
struct Stretch {
    State state;
    int64_t stop;
};

/// Lanes of a time step in one state, or all lanes of several consecutive steps in it.
struct Span : State {
    int64_t step, lane, lanes;
};

/// The time steps that count, from lengths, batch sizes or marks.
class Counted {
  public:
    /// `given` are lengths, or batch sizes of packed rows; `valid` are marks of steps; either or both are null. `starts`
    /// are marks of the steps that no change leads to, or null; they go with `valid`.
    Counted(const Steps &steps, Sizes sizes, const int64_t *given, const uint8_t *valid, const uint8_t *starts)
        : steps(steps),
          sizes(sizes),
          valid(valid),
          starts(starts),
          lengths(given),
          outer(steps.packed ? given[0] : sizes.outer) {
        if (steps.packed) unpack(given);
        int64_t pairs = 0;
        for (int64_t i = 0; i < outer; ++i) {
            for (int64_t step = 0, stop; step < sizes.time; step = stop) {
                stop = end(i, step, sizes.time);
                if (!marked(i, step)) continue;
                rows += stop - step;
                pairs += stop - step - 1;
                if (starts) pairs -= stop - step - 1 - std::count(starts + at(i, step) + 1, starts + at(i, stop), 0);
            }
        }
        if (steps.ar_divisor == 0) {  // the mean of no elements is 0
            this->steps.ar_divisor = std::max<int64_t>(rows * sizes.inner, 1);
            this->steps.tar_divisor = std::max<int64_t>(pairs * sizes.inner, 1);
        }
    }
    Counted(const Counted &) = delete;

    /// The state of all sequences of a tile from a time step on; no steps if the sequences differ.
    Stretch stretch(const Tile &tile, int64_t step) const {
        const int64_t first = tile.sequence + tile.lane / sizes.inner;
        const int64_t last = tile.sequence + (tile.lane + tile.lanes - 1) / sizes.inner;
        Stretch found{state(first, step), valid ? std::min(tile.stop, step + AHEAD) : tile.stop};
        for (int64_t i = first; i <= last && found.stop > step; ++i)
            found.stop = state(i, step) == found.state ? until(i, step, found) : step;
        return found;
    }

    /// The lanes of a tile, from `lane` on, whose sequences are in one state at a time step.
    Span alike(const Tile &tile, int64_t step, int64_t lane) const {
        const int64_t end = tile.lane + tile.lanes, first = lane / sizes.inner;
        const State found = state(tile.sequence + first, step);
        int64_t past = first + 1;
        while (past * sizes.inner < end && state(tile.sequence + past, step) == found) ++past;
        return {found, step, lane, std::min(past * sizes.inner, end) - lane};
    }

    /// The sizes of a view of tensors with the given strides. Sequences that are adjacent at each time step, as in
    /// a batch with time first and in packed rows, are seen as one sequence of many lanes.
    template <size_t N>
    Sizes view(const Strides (&all)[N]) const {
        for (Strides strides : all)
            if (strides.outer != sizes.inner) return {outer, sizes.time, sizes.inner};
        return {1, sizes.time, outer * sizes.inner};
    }

    /// How many elements a tensor has.
    int64_t elements() const { return (steps.packed ? rows : outer * sizes.time) * sizes.inner; }

    /// Where each time step of packed rows begins; null of others.
    const int64_t *packed_at() const { return steps.packed ? offsets.data() : nullptr; }

    Steps steps;

  private:
    /// Find where the rows of each time step begin, and the length of each sequence: batch sizes do not grow, and so
    /// lengths do not.
    void unpack(const int64_t *batch_sizes) {
        offsets.resize(sizes.time);
        for (int64_t step = 1; step < sizes.time; ++step) offsets[step] = offsets[step - 1] + batch_sizes[step - 1];
        unpacked.resize(outer);
        int64_t length = sizes.time;
        for (int64_t i = 0; i < outer; ++i) {
            while (batch_sizes[length - 1] <= i) --length;
            unpacked[i] = length;
        }
        lengths = unpacked.data();
    }

    int64_t length(int64_t sequence) const {
        return lengths ? lengths[sequence] : sizes.time;  // which may be out of range: time steps are not
    }

    /// The place of a time step in marks.
    int64_t at(int64_t sequence, int64_t step) const { return sequence * sizes.time + step; }

    bool marked(int64_t sequence, int64_t step) const {
        return valid ? valid[at(sequence, step)] : step < length(sequence);
    }

    /// Whether the change that leads to a time step counts; to the step behind the last none does.
    bool joined(int64_t sequence, int64_t step) const {
        return step > 0 && step < sizes.time && marked(sequence, step) && marked(sequence, step - 1) &&
               !(starts && starts[at(sequence, step)]);
    }

    /// Where the steps that are marked as `step` is end, at most `stop`.
    int64_t end(int64_t sequence, int64_t step, int64_t stop) const {
        if (valid) {
            const uint8_t *mark = valid + at(sequence, step);
            return step + (*mark ? find_unmarked(mark, stop - step) : find_marked(mark, stop - step));
        }
        return step < length(sequence) ? std::min(length(sequence), stop) : stop;
    }

    /// How many of `count` marks come before the first that is 0: all if there is none.
    static int64_t find_unmarked(const uint8_t *marks, int64_t count) {
        const void *found = std::memchr(marks, 0, count);
        return found ? static_cast<const uint8_t *>(found) - marks : count;
    }

    /// How many of `count` marks come before the first that is not 0, whichever byte it is.
    static int64_t find_marked(const uint8_t *marks, int64_t count) {
        int64_t before = 0;
        for (std::uint64_t eight; before + 8 <= count; before += 8) {
            std::memcpy(&eight, marks + before, 8);
            if (eight) break;
        }
        return std::find_if(marks + before, marks + count, [](uint8_t mark) { return mark; }) - marks;
    }

    State state(int64_t sequence, int64_t step) const {
        return {marked(sequence, step), joined(sequence, step), joined(sequence, step + 1)};
    }

    /// Where a sequence leaves the state of a stretch: the first and the last of the steps that count are in states of
    /// their own, and so are those of a segment.
    int64_t until(int64_t sequence, int64_t step, const Stretch &now) const {
        if (!now.state.counts) return end(sequence, step, now.stop);
        if (!now.state.arrives || !now.state.leaves) return step + 1;
        // The last step is in another state: it ends the stretch one step early.
        int64_t last = end(sequence, step, std::min(now.stop + 1, sizes.time));
        if (starts) last = step + 1 + find_marked(starts + at(sequence, step) + 1, last - step - 1);
        return std::min(last - 1, now.stop);
    }

    Sizes sizes;                    // inner: lanes of one sequence
    const uint8_t *valid;           // (outer, time) marks, or null
    const uint8_t *starts;          // of each step, or null
    const int64_t *lengths;         // of each sequence, or null: where there are no marks
    int64_t outer;                  // sequences
    std::vector<int64_t> unpacked;  // lengths of packed rows
    std::vector<int64_t> offsets;   // of packed rows: where a time step begins
    int64_t rows = 0;               // that count
};

}  // namespace
