// Vectors in the compiler's notation, because it does not vectorize all loops by itself, and the dtypes of memory.

#pragma once

#if defined(__AVX2__) && defined(__F16C__)
#define X86_64_V3
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define X86_64_V4
#endif
#endif
#ifdef __SSE2__
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

#pragma GCC diagnostic ignored "-Wpsabi"  // no function that takes vectors is called from outside

#define INLINE __attribute__((always_inline))  // vectors stay in registers

namespace {

using std::int32_t, std::int64_t, std::uint16_t, std::uint32_t;

enum class Half : uint16_t {};
enum class BFloat : uint16_t {};

// A vector has as many floats as the processor computes at once; ON(name) is the instruction for all of them.
#if defined(X86_64_V4)
constexpr int64_t LANES = 16;
#define ON(name) _mm512_##name
using Floats = __m512;
using Integers = __m512i;
using Halves = __m256i;
#elif defined(X86_64_V3)
constexpr int64_t LANES = 8;
#define ON(name) _mm256_##name
using Floats = __m256;
using Integers = __m256i;
using Halves = __m128i;
#else
constexpr int64_t LANES = 4;
#ifdef __SSE2__
#define ON(name) _mm_##name
using Floats = __m128;
using Integers = __m128i;
#endif
#endif
constexpr int64_t PAIR = 2 * LANES;
constexpr int64_t ALIGNED = LANES * sizeof(float);  // bytes of a vector that is streamed, and its alignment

template <class T>
struct VectorOf {
    using Element = std::conditional_t<std::is_enum_v<T>, uint16_t, T>;
    typedef Element type __attribute__((vector_size(LANES * sizeof(T))));
};
template <class T>
using Vector = typename VectorOf<T>::type;

template <class To, class From>
inline INLINE To bits_of(const From &from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

/// Two vectors of the dtype of the computation, float or double, which are read and written together.
template <class A>
struct Pair {
    Vector<A> first, second;

    INLINE Pair operator+(const Pair &other) const { return {first + other.first, second + other.second}; }
    INLINE Pair operator-(const Pair &other) const { return {first - other.first, second - other.second}; }
    INLINE Pair operator*(const Pair &other) const { return {first * other.first, second * other.second}; }
    INLINE Pair operator*(A factor) const { return {first * factor, second * factor}; }
    INLINE void operator+=(const Pair &other) { *this = *this + other; }
    INLINE void operator*=(const Pair &other) { *this = *this * other; }
};

template <class To, class From>
inline INLINE Pair<To> converted(const Pair<From> &x) {
    return {__builtin_convertvector(x.first, Vector<To>), __builtin_convertvector(x.second, Vector<To>)};
}

template <class V>
inline INLINE V load(const char *from) {
    V x;
    std::memcpy(&x, from, sizeof(x));
    return x;
}

/// Write a vector; with `streams`, write it past the caches. Then it must be aligned, and `fence` must follow.
template <class V>
inline INLINE void save(char *to, const V &x, bool streams) {
#ifdef __SSE2__
    if constexpr (sizeof(V) == ALIGNED)
        if (streams) return ON(stream_ps)(reinterpret_cast<float *>(to), bits_of<Floats>(x));
#endif
    std::memcpy(to, &x, sizeof(x));
}

/// Let other threads see streamed stores before all later stores.
inline void fence() {
#ifdef __SSE2__
    _mm_sfence();
#endif
}

// ---- the dtypes of memory: reading, writing, and rounding to the nearest, ties to even

/// float and double
template <class T>
struct Memory {
    using Near = T;                         // values are converted from and to this dtype
    static constexpr bool is_split = false;  // see bfloat16

    static INLINE Pair<T> read(const char *from) {
        return {load<Vector<T>>(from), load<Vector<T>>(from + sizeof(Vector<T>))};
    }
    static INLINE Pair<T> write(char *to, const Pair<T> &x, bool streams) {
        save(to, x.first, streams);
        save(to + sizeof(x.first), x.second, streams);
        return x;
    }
    static INLINE Pair<T> rounded(const Pair<T> &x) { return x; }
};

/// bfloat16: two elements are read as the halves of 32 bits. The first vector of a pair has the elements at even
/// positions, and the second vector has the elements at odd positions. So no instruction has to move elements from lane
/// to lane.
template <>
struct Memory<BFloat> {
    using Near = float;
    static constexpr bool is_split = true;

    static INLINE Pair<float> read(const char *from) {
        const auto both = load<Vector<uint32_t>>(from);
        return {bits_of<Vector<float>>(both << 16), bits_of<Vector<float>>(both & UPPER)};
    }
    static INLINE Pair<float> write(char *to, const Pair<float> &x, bool streams) {
        const Vector<uint32_t> first = nearest(x.first), second = nearest(x.second) & UPPER;
        save(to, first >> 16 | second, streams);
        return {bits_of<Vector<float>>(first & UPPER), bits_of<Vector<float>>(second)};
    }
    static INLINE Pair<float> rounded(const Pair<float> &x) {
        return {bits_of<Vector<float>>(nearest(x.first) & UPPER), bits_of<Vector<float>>(nearest(x.second) & UPPER)};
    }

  private:
    static constexpr uint32_t UPPER = 0xffff0000;  // the bits of a float that a bfloat16 keeps

    /// Round in the upper bits; the lower bits are unspecified. A NaN keeps its upper bits: it comes from an element of
    /// 16 bits, from a factor or from an operation. All of these leave the lower bits 0, so nothing is carried.
    static INLINE Vector<uint32_t> nearest(Vector<float> value) {
        const auto bits = bits_of<Vector<uint32_t>>(value);
        return bits + 0x7fff + (bits >> 16 & 1);
    }
};

// Subnormal numbers of float16 are kept even if the processor flushes subnormal numbers of float32 to 0
// (`torch.set_flush_denormal`): F16C ignores that mode, and the other code computes with no subnormal float.

template <>
struct Memory<Half> {
    using Near = float;
    static constexpr bool is_split = false;

    static INLINE Pair<float> read(const char *from) {
        return {floats(load<Vector<uint16_t>>(from)), floats(load<Vector<uint16_t>>(from + sizeof(Vector<uint16_t>)))};
    }
    static INLINE Pair<float> write(char *to, const Pair<float> &x, bool streams) {
        const Vector<uint16_t> first = halves(x.first), second = halves(x.second);
        save(to, first, streams);
        save(to + sizeof(first), second, streams);
        return {floats(first), floats(second)};
    }
    static INLINE Pair<float> rounded(const Pair<float> &x) {
        return {floats(halves(x.first)), floats(halves(x.second))};
    }

  private:
#ifdef X86_64_V3
    static INLINE Vector<float> floats(Vector<uint16_t> half) {
        return bits_of<Vector<float>>(ON(cvtph_ps)(bits_of<Halves>(half)));
    }
    static INLINE Vector<uint16_t> halves(Vector<float> value) {
        return bits_of<Vector<uint16_t>>(ON(cvtps_ph)(bits_of<Floats>(value), _MM_FROUND_TO_NEAREST_INT));
    }
#else
    static INLINE Vector<float> floats(Vector<uint16_t> halves) {
        const auto half = __builtin_convertvector(halves, Vector<int32_t>);
        const Vector<int32_t> magnitude = half & 0x7fff;
        const Vector<float> subnormal = __builtin_convertvector(magnitude, Vector<float>) * 0x1p-24f;
        Vector<int32_t> bits = (magnitude << 13) + (112 << 23);  // the biases of the exponents differ by 112
        bits |= (magnitude >= 0x7c00) & 0x7f800000;              // infinity and NaN
        bits = magnitude < 0x400 ? bits_of<Vector<int32_t>>(subnormal) : bits;
        return bits_of<Vector<float>>(bits | (half & 0x8000) << 16);
    }
    static INLINE Vector<uint16_t> halves(Vector<float> value) {
        const auto bits = bits_of<Vector<int32_t>>(value);
        const Vector<int32_t> magnitude = bits & 0x7fffffff;
        // Below 2 ** -14 a half is a multiple of 2 ** -24, as a float between 0.5 and 1 is.
        const auto small = bits_of<Vector<int32_t>>(bits_of<Vector<float>>(magnitude) + 0.5f) - bits_of<int32_t>(0.5f);
        const Vector<int32_t> nearest = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112 << 23)) >> 13;
        const Vector<int32_t> normal = nearest < 0x7c00 ? nearest : 0x7c00;
        const Vector<int32_t> ordered = magnitude < 113 << 23 ? small : normal;
        const Vector<int32_t> half = value == value ? ordered : 0x7e00;
        return __builtin_convertvector(half | (bits >> 16 & 0x8000), Vector<uint16_t>);
    }
#endif
};

/// Return the position in memory of an element of a pair.
template <class T>
constexpr int64_t position(int64_t vector, int64_t lane) {
    return Memory<T>::is_split ? 2 * lane + vector : vector * LANES + lane;
}

/// Read the pair of vectors that begins at `lane` of a row, as A, the dtype of the computation.
template <class A, class T>
inline INLINE Pair<A> read(const char *row, int64_t lane) {
    return converted<A>(Memory<T>::read(row + lane * sizeof(T)));
}

/// Round results as `write` does.
template <class A, class T>
inline INLINE Pair<A> rounded(const Pair<A> &results) {
    return converted<A>(Memory<T>::rounded(converted<typename Memory<T>::Near>(results)));
}

/// Write a pair of vectors, with `streams` past the caches; return the values after rounding.
template <class A, class T>
inline INLINE Pair<A> write(char *row, int64_t lane, const Pair<A> &results, bool streams) {
    using Near = typename Memory<T>::Near;
    return converted<A>(Memory<T>::write(row + lane * sizeof(T), converted<Near>(results), streams));
}

}  // namespace
