// The structures that cpu.py fills, field by field like its own, and the numbers that a launch reads and writes.

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

/// The divisors of the sums, and the form of the lengths.
struct Steps {
    double ar_divisor, tar_divisor;  // 0: the elements and the changes that count
    int64_t packed;                  // rows of a PackedSequence: lengths are its batch sizes, and outer is unused
};

/// The metadata of a penalty, the same in every call.
struct Penalty {
    Sizes sizes;
    Strides raw, dropped, grad_raw, grad_dropped;
    Steps steps;
    double alpha, beta;
    int32_t raw_dtype, dropped_dtype, compute_dtype;
    int32_t ar_of_raw;
    int32_t adds;  // the penalty and its terms are added to the values in memory
};

/// Its memory. A null pointer is a term that is off, a gradient that is not needed, or a value that is not asked for.
struct PenaltyMemory {
    const void *raw, *dropped;
    void *grad_raw, *grad_dropped;
    const void *grad;          // () in the dtype of the computation: the upstream gradient
    const void *assumed;       // () like grad: the upstream gradient that a forward assumed, writing gradients
    const int64_t *lengths;    // (outer,), or batch sizes (time,), or null
    const uint8_t *valid;      // (outer, time), not 0 where a step counts, or null; with neither all steps count
    const uint8_t *starts;     // (outer, time), not 0 where no change leads to a step, or null; with valid alone
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
    const void *raw, *mask;  // in a backward no mask, where `dropped` is a gradient that arrives at raw
    void *dropped, *grad_raw;
    const void *grad;          // () in the dtype of the computation, or null: the penalty has no gradient
    const int64_t *lengths;    // this and the rest as in the penalty
    const uint8_t *valid, *starts;
    const void *alpha, *beta;
    void *penalty, *terms;
};

enum Dtype : int32_t { FLOAT16, BFLOAT16, FLOAT32, FLOAT64 };

inline int64_t bytes_of(int32_t dtype) { return dtype == FLOAT64 ? 8 : dtype == FLOAT32 ? 4 : 2; }

/// Read a number in the dtype of the computation.
inline double number(const void *from, int32_t dtype, int64_t i = 0) {
    return dtype == FLOAT64 ? static_cast<const double *>(from)[i] : static_cast<const float *>(from)[i];
}

inline void store(void *to, int64_t i, double value, int32_t dtype) {
    if (dtype == FLOAT64)
        static_cast<double *>(to)[i] = value;
    else
        static_cast<float *>(to)[i] = static_cast<float>(value);
}

}  // namespace
