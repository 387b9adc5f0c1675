// The structures that cpu.py fills, with the same fields as its own, and the numbers that a launch reads and writes.

#pragma once

#include <cstdint>

namespace {

using std::int32_t, std::int64_t, std::uint8_t;

struct Sizes {
    int64_t outer, time, inner;
};

struct Strides {  // in elements
    int64_t outer, time;
};

/// The metadata of an operation, which are the same in every call: a penalty, a dropout with it, or the gradients of
/// both.
struct Metadata {
    Sizes sizes;
    Strides raw, mask, upstream_dropped, dropped, grad_raw, grad_dropped;
    double ar_divisor, tar_divisor;  // the divisors of the sums, in calls without counts
    int32_t raw_dtype, dropped_dtype, compute_dtype;  // mask and upstream_dropped have raw's dtype
    int32_t sum_ar, sum_tar, grad_ar, grad_tar;       // whether each term is summed, and has a gradient
    int32_t ar_of_raw;                                // dropped is raw itself
};

/// The memory and the numbers of a call. A null pointer stands for a term that is off, for a gradient that is not
/// needed, or for a result that is not needed.
struct Addresses {
    const void *raw, *mask;        // or the seed of a mask that is drawn, () int64
    const void *upstream_dropped;  // the upstream gradient of dropped, in a call that has a mask
    void *dropped;                 // written in a forward that has a mask
    void *grad_raw, *grad_dropped;
    const void *upstream;      // () in the dtype of the computation: the gradient of the penalty
    const uint8_t *bits;       // (outer, time), `EncodedSteps.bits`; null if all steps count
    const int64_t *counts;     // (2,): the numbers of steps and changes that count; null if the divisors are known
    void *penalty, *terms;     // (), and (2,) ar and tar, like upstream; no penalty in a backward
    double alpha, beta;        // coefficients
    int64_t threshold;         // of the mask that is drawn, as in `Draw`; -1 if none is
};

/// The memory that `encode_steps` reads and writes.
struct Encoding {
    const int64_t *lengths;
    const uint8_t *valid, *starts;
    uint8_t *bits;
    int64_t *counts;
};

enum Dtype : int32_t { FLOAT16, BFLOAT16, FLOAT32, FLOAT64 };

inline int64_t bytes_of(int32_t dtype) { return dtype == FLOAT64 ? 8 : dtype == FLOAT32 ? 4 : 2; }

/// Read a number in the dtype of the computation.
inline double number(const void *from, int32_t dtype) {
    return dtype == FLOAT64 ? *static_cast<const double *>(from) : *static_cast<const float *>(from);
}

inline void store(void *to, int64_t i, double value, int32_t dtype) {
    if (dtype == FLOAT64)
        static_cast<double *>(to)[i] = value;
    else
        static_cast<float *>(to)[i] = static_cast<float>(value);
}

}  // namespace
