// Masks of elementwise dropout, which are drawn from a seed, as draws.py draws them on GPUs.
//
// Philox4x32 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011) turns a counter of 128 bits and a key
// of 64 bits into 4 random words of 32 bits. The key is the seed. The counter has the number of a lane and that of a
// group of 8 time steps, so a mask does not depend on tiles, threads or the width of vectors. docs/kernels.md fixes the
// mapping.

#pragma once

#include "cpu_structures.h"
#include "cpu_vectors.h"

namespace {

constexpr int ROUNDS = 7;               // the fewest that pass all tests of BigCrush
constexpr int64_t STEPS_DRAWN = 8;      // time steps of a group, one for each half of the 4 words
constexpr int64_t BLOCK_DRAWN = 1024;   // lanes that are drawn at once: a group of them takes 32 KB in float32

/// The seed and the probability of a mask that is drawn.
struct Draw {
    bool on = false;
    uint32_t low = 0, high = 0;  // the halves of the seed
    int32_t threshold = 0;       // an element is dropped if its random number of 16 bits is below
    double scale = 0;            // of elements that are kept

    Draw() = default;
    /// Read the seed; there is none if the threshold is negative.
    Draw(const void *seed, int64_t threshold) : on(threshold >= 0), threshold(static_cast<int32_t>(threshold)) {
        if (!on) return;
        const auto key = load<std::uint64_t>(static_cast<const char *>(seed));
        low = static_cast<uint32_t>(key);
        high = static_cast<uint32_t>(key >> 32);
        scale = 65536.0 / static_cast<double>(65536 - threshold);
    }
};

/// A vector of half as many numbers: the lower 32 bits of each are a word, and the upper 32 bits are unspecified.
typedef std::uint64_t Words __attribute__((vector_size(LANES * 4)));
constexpr std::uint64_t WORD = 0xffffffff;

/// Multiply words by a factor; return products of 64 bits.
inline INLINE Words product(Words x, uint32_t factor) {
#ifdef __SSE2__
    return bits_of<Words>(ON(mul_epu32)(bits_of<Integers>(x), bits_of<Integers>(Words{} + factor)));
#else
    return (x & WORD) * factor;
#endif
}

/// Compute the 4 random words of lanes for a group of time steps.
inline INLINE void philox(Words lanes, uint32_t group, const Draw &draw, Words (&words)[4]) {
    Words x = lanes, y = Words{} + group, z = lanes >> 32, w{};
    uint32_t low = draw.low, high = draw.high;
#pragma GCC unroll ROUNDS
    for (int round = 0; round < ROUNDS; ++round, low += 0x9E3779B9, high += 0xBB67AE85) {
        const Words first = product(x, 0xD2511F53), second = product(z, 0xCD9E8D57);
        x = (second >> 32) ^ y ^ (Words{} + low);
        y = second;
        z = (first >> 32) ^ w ^ (Words{} + high);
        w = first;
    }
    words[0] = x, words[1] = y, words[2] = z, words[3] = w;
}

/// Draws rows of a mask in one dtype of memory.
template <class T>
class Drawer {
  public:
    explicit Drawer(const Draw &draw) : draw(draw) {
        using Near = typename Memory<T>::Near;
        char kept[PAIR * sizeof(T)];
        Memory<T>::write(kept, Pair<Near>{Vector<Near>{} + static_cast<Near>(draw.scale), {}}, false);
        std::memcpy(&scale, kept, sizeof(T));
    }

    /// Write the rows of a group of time steps, one behind the other, for `lanes` lanes from `lane` on.
    void rows(int64_t lane, int64_t lanes, uint32_t group, char *to) const {
        const int64_t whole = lanes / PAIR * PAIR, rest = lanes - whole, stride = lanes * sizeof(T);
        for (int64_t i = 0; i < whole; i += PAIR) pair(lane + i, group, to + i * sizeof(T), stride);
        if (rest == 0) return;
        char tail[STEPS_DRAWN * PAIR * sizeof(T)];
        pair(lane + whole, group, tail, PAIR * sizeof(T));
        for (int64_t step = 0; step < STEPS_DRAWN; ++step)
            std::memcpy(to + step * stride + whole * sizeof(T), tail + step * PAIR * sizeof(T), rest * sizeof(T));
    }

  private:
    /// A mask in memory is the scale's bits where an element is kept, and 0 elsewhere. Two elements of 16 bits are
    /// written as the halves of 32 bits.
    static constexpr bool IS_SPLIT = sizeof(T) == 2;
    using Bits = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

    /// Write a pair of vectors of each row; rows are `stride` bytes apart.
    INLINE void pair(int64_t lane, uint32_t group, char *to, int64_t stride) const {
        Vector<uint32_t> words[2][4];
#pragma GCC unroll 2
        for (int64_t vector = 0; vector < 2; ++vector) {
            Words even[4], odd[4];
            philox(numbers(vector, 0) + static_cast<std::uint64_t>(lane), group, draw, even);
            philox(numbers(vector, 1) + static_cast<std::uint64_t>(lane), group, draw, odd);
#pragma GCC unroll 4
            for (int64_t i = 0; i < 4; ++i)
                words[vector][i] = bits_of<Vector<uint32_t>>((even[i] & WORD) | odd[i] << 32);
        }
#pragma GCC unroll STEPS_DRAWN
        for (int64_t step = 0; step < STEPS_DRAWN; ++step)
            store(to + step * stride, kept(words[0][step / 2], step), kept(words[1][step / 2], step));
    }

    /// Return the positions in memory, from the first lane of a pair on, of every other lane of a vector.
    static INLINE Words numbers(int64_t vector, int64_t first) {
        Words found;
        for (int64_t i = 0; i < LANES / 2; ++i) {
            const int64_t lane = 2 * i + first;
            found[i] = IS_SPLIT ? 2 * lane + vector : vector * LANES + lane;
        }
        return found;
    }

    /// Return which lanes are kept in a step of the group: all bits of a lane, or none. Even steps have the lower halves.
    INLINE Vector<int32_t> kept(Vector<uint32_t> words, int64_t step) const {
        return bits_of<Vector<int32_t>>(step % 2 ? words >> 16 : words & 0xffff) >= draw.threshold;
    }

    INLINE void store(char *to, Vector<int32_t> first, Vector<int32_t> second) const {
        if constexpr (IS_SPLIT) {
            save(to, (first & static_cast<int32_t>(scale)) | (second & static_cast<int32_t>(scale << 16)), false);
        } else {
            const auto bits = static_cast<Bits>(scale);
            save(to, __builtin_convertvector(first, Vector<Bits>) & bits, false);
            save(to + sizeof(Vector<Bits>), __builtin_convertvector(second, Vector<Bits>) & bits, false);
        }
    }

    const Draw &draw;
    std::uint64_t scale = 0;  // its bits in memory
};

/// Draw the rows of a mask in a dtype, for `lanes` lanes from `lane` on and some groups of time steps.
inline void draw_rows(const Draw &draw, int32_t dtype, int64_t lane, int64_t lanes, int64_t group, int64_t groups,
                      char *to) {
    const auto rows = [&](auto element) {
        const Drawer<decltype(element)> drawer(draw);
        for (int64_t i = 0; i < groups; ++i)
            drawer.rows(lane, lanes, static_cast<uint32_t>(group + i), to + i * STEPS_DRAWN * lanes * sizeof(element));
    };
    switch (dtype) {
        case FLOAT16: return rows(Half());
        case BFLOAT16: return rows(BFloat());
        case FLOAT32: return rows(float());
        default: return rows(double());
    }
}

}  // namespace
