// The items of work, the walk over an item along time, and the programs that share the items.

#pragma once

#include <pthread.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu_structures.h"
#include "cpu_rows.h"
#include "cpu_steps.h"

namespace {

constexpr int64_t BLOCK = 8192;         // lanes: a row, its neighbours and its gradient fit in a cache of 256 KB
constexpr int64_t ITEM = 1 << 16;       // elements: enough to hide the cost of fetching an item
constexpr int64_t COPIES = 2048;        // elements of a mask that is repeated for several short rows
constexpr int64_t PROGRAMS = 1024;      // the most programs for each tensor
constexpr int64_t SERIAL = 3 << 17;     // elements below which waking a second thread costs more than it saves
constexpr int64_t STREAMED = 1 << 23;   // bytes of all outputs from which they are written past the caches

/// The items of work of a view, and the number of programs that share them.
struct Tiling {
    Sizes sizes;
    int64_t blocks, stretch, stretches, items, programs;

    Tiling() = default;
    explicit Tiling(Sizes given) : sizes(given) {
        blocks = ceil_div(sizes.inner, BLOCK);
        stretches = ceil_div(sizes.time, std::max<int64_t>(ITEM / std::min(sizes.inner, BLOCK), 1));
        stretch = ceil_div(sizes.time, stretches);
        items = sizes.outer * blocks * stretches;
        programs = std::min(items, PROGRAMS);
    }

    Tile tile(int64_t item) const {
        const int64_t lane = item % blocks * BLOCK, start = item / blocks % stretches * stretch;
        return {item / blocks / stretches, lane, std::min(BLOCK, sizes.inner - lane), start,
                std::min(start + stretch, sizes.time)};
    }

    /// Return whether rows of this stride are adjacent, and an item has all lanes of each row.
    bool dense(Strides strides) const { return strides.time == sizes.inner && blocks == 1; }

  private:
    static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
};

/// The rows of a tensor viewed as (outer, time, inner).
struct Rows {
    char *base = nullptr;  // null if there is no tensor
    Strides strides{};
    int32_t dtype = FLOAT32;
    int64_t itemsize = 0;

    Rows() = default;
    Rows(const void *base, Strides strides, int32_t dtype)
        : base(static_cast<char *>(const_cast<void *>(base))),
          strides(strides),
          dtype(dtype),
          itemsize(bytes_of(dtype)) {}

    char *row(int64_t sequence, int64_t step, int64_t lane) const {
        if (!base) return nullptr;
        return base + (sequence * strides.outer + step * strides.time + lane) * itemsize;
    }
};

/// The rows of a mask. If one row serves all time steps, it is repeated for a span of several steps.
class MaskRows {
  public:
    MaskRows(const Rows &rows, const Tile &tile) : rows(rows), tile(tile) {}

    const char *of(const Span &span) {
        const char *row = rows.row(tile.sequence, span.step, span.lane);
        if (!row || rows.strides.time || span.lanes <= tile.lanes) return row;
        for (; copied < span.lanes; copied += tile.lanes)
            std::memcpy(copies + copied * rows.itemsize, row, tile.lanes * rows.itemsize);
        return copies;
    }

  private:
    const Rows &rows;
    const Tile &tile;
    int64_t copied = 0;
    char copies[COPIES * sizeof(double)];
};

/// One walk over a tensor, and over the tensors that are read and written beside it.
struct Pass {
    Tiling tiling;
    Rows x, mask, upstream_dropped, out;  // x is raw, or dropped in a walk without raw
    bool dense;                  // the rows of all tensors are adjacent
    bool streams = false;        // out is written past the caches
    RowCode code, padding;       // for rows that count, and for padding

    Pass() = default;
    Pass(const Steps &steps, const Rows &x, const Rows &mask, const Rows &upstream_dropped, const Rows &out)
        : x(x), mask(mask), upstream_dropped(upstream_dropped), out(out) {
        const auto or_x = [&](const Rows &rows) { return rows.base ? rows.strides : x.strides; };
        const Strides all[] = {x.strides, or_x(upstream_dropped), or_x(out), or_x(mask)};
        tiling = Tiling(steps.view(all));
        const auto is_dense = [&](Strides strides) { return tiling.dense(strides); };
        dense = std::all_of(all, all + 3, is_dense) && (!mask.strides.time || is_dense(all[3]));
    }

    /// Process a program's share of the items.
    Partials program(int64_t number, const Steps &steps) const {
        Partials sums;
        const int64_t stop = (number + 1) * tiling.items / tiling.programs;
        for (int64_t i = number * tiling.items / tiling.programs; i < stop; ++i)
            sums += along_time(tiling.tile(i), steps);
        if (streams) fence();
        return sums;
    }

  private:
    /// Walk an item along time, and process consecutive rows in one state together.
    Partials along_time(const Tile &tile, const Steps &steps) const {
        Partials sums;
        MaskRows masks(mask, tile);
        const int64_t merged = at_once(tile);
        for (int64_t step = tile.start; step < tile.stop;) {
            const auto [state, stop] = steps.streak(tile, step);
            if (stop == step) {
                for (int64_t lane = tile.lane, lanes; lane < tile.lane + tile.lanes; lane += lanes) {
                    const Span span = steps.alike(tile, step, lane);
                    lanes = span.lanes;
                    if (span.counted || out.base) sums += visit(tile, span, masks);
                }
                ++step;
            } else if (!state.counted && !out.base) {
                step = stop;
            } else {
                for (int64_t count; step < stop; step += count) {
                    count = std::min(merged, stop - step);
                    sums += visit(tile, Span{state, step, tile.lane, count * tile.lanes}, masks);
                }
            }
        }
        return sums;
    }

    /// Return how many rows may be processed together: a mask of one row has room for so many copies.
    int64_t at_once(const Tile &tile) const {
        if (!dense) return 1;
        if (!mask.base || mask.strides.time) return tile.stop - tile.start;
        return std::max<int64_t>(COPIES / tile.lanes, 1);
    }

    Partials visit(const Tile &tile, const Span &span, MaskRows &masks) const {
        char *to = out.row(tile.sequence, span.step, span.lane);
        if (!span.counted && !mask.base && !upstream_dropped.base) {
            std::memset(to, 0, span.lanes * out.itemsize);
            return {};
        }
        const Pointers rows{span.into ? x.row(tile.sequence, span.step - 1, span.lane) : nullptr,
                            x.row(tile.sequence, span.step, span.lane),
                            span.from ? x.row(tile.sequence, span.step + 1, span.lane) : nullptr,
                            masks.of(span),
                            upstream_dropped.row(tile.sequence, span.step, span.lane),
                            to,
                            streams && bits_of<std::uintptr_t>(to) % ALIGNED == 0};
        return (span.counted ? code : padding)(rows, span.lanes);
    }
};

// The threads of GNU OpenMP do not survive a fork, so a parallel region would wait for them forever.
bool forked = false;
[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });

/// Run all passes in one parallel region; return the sums, added up in the order of the programs.
inline Partials run(Pass *passes, int64_t count, const Steps &steps, int threads) {
    if (count == 0) return {};
    if (forked || count * steps.elements() <= SERIAL) threads = 1;
    int64_t written = 0;
    for (int64_t i = 0; i < count; ++i) written += passes[i].out.base ? steps.elements() * passes[i].out.itemsize : 0;
    for (int64_t i = 0; i < count; ++i) passes[i].streams = passes[i].out.base && written >= STREAMED;
    const int64_t first = passes[0].tiling.programs, programs = first + (count > 1 ? passes[1].tiling.programs : 0);
    const auto program = [&](int64_t i) {
        return i < first ? passes[0].program(i, steps) : passes[1].program(i - first, steps);
    };
    Partials sums;
    if (threads == 1) {  // a parallel region takes longer to set up than small tensors take
        for (int64_t i = 0; i < programs; ++i) sums += program(i);
        return sums;
    }
    Partials partials[2 * PROGRAMS];
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < programs; ++i) partials[i] = program(i);
    for (int64_t i = 0; i < programs; ++i) sums += partials[i];
    return sums;
}

}  // namespace
