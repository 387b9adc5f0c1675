// Vectors in the compiler's own notation, as it does not vectorize all loops by itself, and the dtypes of memory.

#pragma once

#if defined(__AVX2__) && defined(__F16C__)
#define X86_64_V3
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

#ifdef X86_64_V3
constexpr int64_t LANES = 8;  // of a vector: as many floats as the processor takes at once
#else
constexpr int64_t LANES = 4;
#endif

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

/// Convert 16 bits to 32 by one instruction; the compiler takes several.
inline INLINE Vector<uint32_t> widened(Vector<uint16_t> x) {
#ifdef X86_64_V3
    return bits_of<Vector<uint32_t>>(_mm256_cvtepu16_epi32(bits_of<__m128i>(x)));
#else
    return __builtin_convertvector(x, Vector<uint32_t>);
#endif
}

/// Convert 32 bits to 16, for numbers that 16 bits can hold.
inline INLINE Vector<uint16_t> narrowed(Vector<uint32_t> x) {
#ifdef X86_64_V3
    const auto bits = bits_of<__m256i>(x);
    return bits_of<Vector<uint16_t>>(_mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1)));
#else
    return __builtin_convertvector(x, Vector<uint16_t>);
#endif
}

// Conversions of float16 keep subnormal numbers even where the processor flushes those of float32 to 0
// (`torch.set_flush_denormal`): F16C ignores that mode, and the other code computes with no subnormal float.

/// Convert float16 to float32.
inline INLINE Vector<float> floats(Vector<uint16_t> halves) {
#ifdef X86_64_V3
    return bits_of<Vector<float>>(_mm256_cvtph_ps(bits_of<__m128i>(halves)));
#else
    const auto half = bits_of<Vector<int32_t>>(widened(halves));
    const Vector<int32_t> magnitude = half & 0x7fff;
    const Vector<float> subnormal = __builtin_convertvector(magnitude, Vector<float>) * 0x1p-24f;
    Vector<int32_t> bits = (magnitude << 13) + (112 << 23);  // the biases of the exponents differ by 112
    bits |= (magnitude >= 0x7c00) & 0x7f800000;              // infinity and NaN
    bits = magnitude < 0x400 ? bits_of<Vector<int32_t>>(subnormal) : bits;
    return bits_of<Vector<float>>(bits | (half & 0x8000) << 16);
#endif
}

/// Round float32 to float16.
inline INLINE Vector<uint16_t> halves(Vector<float> value) {
#ifdef X86_64_V3
    return bits_of<Vector<uint16_t>>(_mm256_cvtps_ph(bits_of<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
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
}

/// Convert elements to A, the dtype of the computation, float or double.
template <class A, class T>
inline INLINE Vector<A> wide(const Vector<T> &x) {
    if constexpr (std::is_same_v<T, BFloat>)
        return __builtin_convertvector(bits_of<Vector<float>>(widened(x) << 16), Vector<A>);
    else if constexpr (std::is_same_v<T, Half>)
        return __builtin_convertvector(floats(x), Vector<A>);
    else
        return __builtin_convertvector(x, Vector<A>);
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
        return halves(__builtin_convertvector(results, Vector<float>));
    } else {
        return __builtin_convertvector(results, Vector<T>);
    }
}

/// Read the vector of elements that begins at `lane` of a row.
template <class A, class T>
inline INLINE Vector<A> read(const char *row, int64_t lane) {
    Vector<T> x;
    std::memcpy(&x, row + lane * sizeof(T), sizeof(x));
    return wide<A, T>(x);
}

/// Write a vector; return the values as memory has them.
template <class A, class T>
inline INLINE Vector<A> write(char *row, int64_t lane, const Vector<A> &results) {
    const Vector<T> x = rounded<T, A>(results);
    std::memcpy(row + lane * sizeof(T), &x, sizeof(x));
    return wide<A, T>(x);
}

}  // namespace
