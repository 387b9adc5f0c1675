// The items of work, the walk over an item along time, and the programs that share the items.

#pragma once

#include <pthread.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu_structures.h"
#include "cpu_draws.h"
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
    int64_t block, blocks, stretch, stretches, items, programs;

    Tiling() = default;
    Tiling(Sizes given, bool draws) : sizes(given), block(draws ? BLOCK_DRAWN : BLOCK) {
        blocks = ceil_div(sizes.inner, block);
        stretches = ceil_div(sizes.time, std::max<int64_t>(ITEM / std::min(sizes.inner, block), 1));
        stretch = ceil_div(sizes.time, stretches);
        if (draws) {  // a counter serves one item
            stretch = ceil_div(stretch, STEPS_DRAWN) * STEPS_DRAWN;
            stretches = ceil_div(sizes.time, stretch);
        }
        items = sizes.outer * blocks * stretches;
        programs = std::min(items, PROGRAMS);
    }

    Tile tile(int64_t item) const {
        const int64_t lane = item % blocks * block, start = item / blocks % stretches * stretch;
        return {item / blocks / stretches, lane, std::min(block, sizes.inner - lane), start,
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

/// The rows of a mask for an item. If one row serves all time steps, it is repeated for a span of several steps. Rows that
/// are drawn are drawn for several groups of steps, in the order of time.
class MaskRows {
  public:
    MaskRows(const Rows &rows, const Draw &draw, const Tiling &tiling, const Tile &tile)
        : rows(rows), draw(draw), tile(tile), first(tile.sequence * tiling.sizes.inner + tile.lane) {}

    const char *of(const Span &span) {
        if (draw.on) {
            reach(span.step);
            return copies + ((span.step - begin) * tile.lanes + span.lane - tile.lane) * rows.itemsize;
        }
        const char *row = rows.row(tile.sequence, span.step, span.lane);
        if (!row || rows.strides.time || span.lanes <= tile.lanes) return row;
        for (; copied < span.lanes; copied += tile.lanes)
            std::memcpy(copies + copied * rows.itemsize, row, tile.lanes * rows.itemsize);
        return copies;
    }

    /// Return how many consecutive rows `of` can return at once, from a time step on.
    int64_t at_once(int64_t step) {
        if (draw.on) {
            reach(step);
            return end - step;
        }
        if (!rows.base || rows.strides.time) return tile.stop - step;
        return std::max<int64_t>(COPIES / tile.lanes, 1);
    }

  private:
    /// Draw the rows of a time step, and of the steps behind it for which there is room.
    void reach(int64_t step) {
        if (step < end) return;
        const int64_t group = step / STEPS_DRAWN, past = (tile.stop - 1) / STEPS_DRAWN + 1;
        const int64_t groups = std::min(BLOCK_DRAWN / tile.lanes, past - group);
        draw_rows(draw, rows.dtype, first, tile.lanes, group, groups, copies);
        begin = group * STEPS_DRAWN;
        end = std::min(begin + groups * STEPS_DRAWN, tile.stop);
    }

    const Rows &rows;
    const Draw &draw;
    const Tile &tile;
    const int64_t first;          // the number of the item's first lane among the lanes of all sequences
    int64_t begin = 0, end = 0;  // the time steps whose rows are drawn
    int64_t copied = 0;          // the lanes for which the row is repeated
    char copies[std::max(COPIES, BLOCK_DRAWN * STEPS_DRAWN) * sizeof(double)];
};

/// One walk over a tensor, and over the tensors that are read and written beside it.
struct Pass {
    Tiling tiling;
    Rows x, mask, upstream_dropped, out;  // x is raw, or dropped in a walk without raw
    Draw draw;                   // draws the mask, if there is a seed
    bool dense;                  // the rows of all tensors are adjacent
    bool streams = false;        // out is written past the caches
    RowCode code, padding;       // for rows that count, and for padding

    Pass() = default;
    Pass(const Steps &steps, const Rows &x, const Rows &mask, const Draw &draw, const Rows &upstream_dropped,
         const Rows &out)
        : x(x), mask(mask), upstream_dropped(upstream_dropped), out(out), draw(draw) {
        const auto or_x = [&](const Rows &rows) { return rows.base ? rows.strides : x.strides; };
        const Strides all[] = {x.strides, or_x(upstream_dropped), or_x(out), or_x(mask)};
        tiling = Tiling(steps.view(all), draw.on);
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
        MaskRows masks(mask, draw, tiling, tile);
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
                    count = dense ? std::min(masks.at_once(step), stop - step) : 1;
                    sums += visit(tile, Span{state, step, tile.lane, count * tile.lanes}, masks);
                }
            }
        }
        return sums;
    }

    Partials visit(const Tile &tile, const Span &span, MaskRows &masks) const {
        char *to = out.row(tile.sequence, span.step, span.lane);
        if (!span.counted && !(padding.flags & (MASKED | UPSTREAM))) {
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
