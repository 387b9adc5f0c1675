// The time steps that count, and streaks of consecutive steps in one state.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu_structures.h"

namespace {

constexpr int64_t LONGEST = 1024;  // steps of a streak at most, so that finding all streaks takes linear time

/// Encode the time steps of one sequence: bit 0 is set if the step counts, bit 1 if the change into it counts. Count
/// both.
inline void encode_sequence(int64_t length, const uint8_t *valid, const uint8_t *starts, uint8_t *bits, int64_t time,
                          int64_t *counts) {
    length = std::clamp<int64_t>(length, 0, time);
    std::memset(bits, 1, length);
    std::memset(bits + length, 0, time - length);
    if (valid)
        for (int64_t step = 0; step < length; ++step) bits[step] = valid[step] != 0;
    for (int64_t step = length - 1; step > 0; --step)
        bits[step] |= (bits[step] & bits[step - 1] & !(starts && starts[step])) << 1;
    for (int64_t step = 0; step < length; ++step) {
        counts[0] += bits[step] & 1;
        counts[1] += bits[step] >> 1;
    }
}

/// An item of work: a block of lanes of one sequence over a stretch of time steps.
struct Tile {
    int64_t sequence, lane, lanes, start, stop;
};

/// Whether a time step of a sequence counts, and whether the changes into it and out of it count.
struct State {
    bool counted, into, from;

    bool operator==(const State &other) const {
        return counted == other.counted && into == other.into && from == other.from;
    }
};

/// A state, and the step before which it ends; this is the first step itself if the sequences of a tile differ.
struct Streak {
    State state;
    int64_t stop;
};

/// Some lanes of a time step in one state, or all lanes of several consecutive steps in one state.
struct Span : State {
    int64_t step, lane, lanes;
};

/// The time steps that count: all steps, or the steps that `bits` encodes.
class Steps {
  public:
    Steps(const Metadata &metadata, const Addresses &memory)
        : ar_divisor(metadata.ar_divisor),
          tar_divisor(metadata.tar_divisor),
          sizes(metadata.sizes),
          bits(memory.bits) {
        if (!memory.counts) return;
        ar_divisor = std::max<int64_t>(memory.counts[0] * sizes.inner, 1);  // the mean of no elements is 0
        tar_divisor = std::max<int64_t>(memory.counts[1] * sizes.inner, 1);
    }

    /// Find the state of all sequences of a tile from a time step on; the streak is empty if the sequences differ.
    Streak streak(const Tile &tile, int64_t step) const {
        const int64_t first = tile.sequence + tile.lane / sizes.inner;
        const int64_t last = tile.sequence + (tile.lane + tile.lanes - 1) / sizes.inner;
        Streak found{state(first, step), bits ? std::min(tile.stop, step + LONGEST) : tile.stop};
        for (int64_t i = first; i <= last && found.stop > step; ++i)
            found.stop = state(i, step) == found.state ? until(i, step, found) : step;
        return found;
    }

    /// Find the lanes of a tile, from `lane` on, whose sequences are in one state at a time step.
    Span alike(const Tile &tile, int64_t step, int64_t lane) const {
        const int64_t end = tile.lane + tile.lanes, first = lane / sizes.inner;
        const State found = state(tile.sequence + first, step);
        int64_t past = first + 1;
        while (past * sizes.inner < end && state(tile.sequence + past, step) == found) ++past;
        return {found, step, lane, std::min(past * sizes.inner, end) - lane};
    }

    /// Return the sizes of a view of tensors with the given strides. If the sequences are adjacent at each time step,
    /// as in a batch with time first, they are viewed as one sequence of many lanes.
    template <size_t N>
    Sizes view(const Strides (&all)[N]) const {
        for (Strides strides : all)
            if (strides.outer != sizes.inner) return sizes;
        return {1, sizes.time, sizes.outer * sizes.inner};
    }

    /// Return the number of elements of a tensor.
    int64_t elements() const { return sizes.outer * sizes.time * sizes.inner; }

    double ar_divisor, tar_divisor;

  private:
    uint8_t bits_at(int64_t sequence, int64_t step) const {
        if (bits) return bits[sequence * sizes.time + step];
        return step > 0 ? 3 : 1;
    }

    State state(int64_t sequence, int64_t step) const {
        const uint8_t now = bits_at(sequence, step), next = step + 1 < sizes.time ? bits_at(sequence, step + 1) : 0;
        return {(now & 1) != 0, (now & 2) != 0, (next & 2) != 0};
    }

    /// Find where the steps with the bits of `step` end, at most `stop`.
    int64_t end(int64_t sequence, int64_t step, int64_t stop) const {
        if (!bits) return stop;
        const uint8_t *own = bits + sequence * sizes.time;
        const std::uint64_t same = own[step] * 0x0101010101010101u;
        for (std::uint64_t eight; step + 8 <= stop; step += 8) {
            std::memcpy(&eight, own + step, 8);
            if (eight != same) break;
        }
        return std::find_if(own + step, own + stop, [=](uint8_t x) { return x != (same & 0xff); }) - own;
    }

    /// Find where a sequence leaves the state of a streak; the first and the last step of a segment differ from the
    /// others.
    int64_t until(int64_t sequence, int64_t step, const Streak &now) const {
        if (!now.state.counted) return end(sequence, step, now.stop);
        if (!now.state.into || !now.state.from) return step + 1;
        return std::min(end(sequence, step, std::min(now.stop + 1, sizes.time)) - 1, now.stop);
    }

    Sizes sizes;           // inner: lanes of one sequence
    const uint8_t *bits;   // (outer, time), `EncodedSteps.bits`, or null
};

}  // namespace
