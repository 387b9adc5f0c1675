"""Proof of the tests: each mutant is one wrong place in the code, and some test must fail on it.

    python -m tests.mutants [FILTER [TESTS...]]    # only the mutants whose line of the table has FILTER in it
    TRITON_INTERPRET=1 python -m tests.mutants [FILTER [TESTS...]]    # the mutants of the Triton kernels

The tests are the folders of the code's room, or TESTS, which are folders or files. They must pass on the code as it is.
This process collects them and forks for each mutant, whose code the functions get there. A mutant elsewhere (in a
constant, in a kernel), or one that has survived, is written into a copy of the checkout, in which pytest runs anew.

Triton's interpreter runs one program after the other, so faults that only a GPU shows (barriers, streams, caches) have
no mutant here, nor have lines that no result depends on.
"""

from __future__ import annotations

import gc
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from hashlib import sha256
from importlib import import_module
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from types import CodeType, FunctionType
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
COPIED = ["fastreg", "kernels", "tests", "bench", "pyproject.toml"]
CORES, FORK = os.cpu_count() or 1, get_context("fork")
CHOSEN = "not repeats_bitwise"  # which take long, and other tests find the same faults
# The folder of the code -> the folders of its tests: its own first, and those whose code calls it
ROOMS = {
    "kernels": ("tests/kernels", "tests/call"),
    "fastreg/call": ("tests/call", "tests/attach", "tests/kernels"),
    "fastreg/attach": ("tests/attach", "tests/call"),
    "fastreg": ("tests/adapters",),
}
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
LIMIT = 1800 if INTERPRET else 600  # seconds after which a mutant hangs: all of its tests take less
MARKS = "not gpu and not more and not triton" + INTERPRET * " and not slow"
OPTIONS = ["-x", "-q", "--tb=short", "-p", "no:cacheprovider", "-k", CHOSEN, "-m", MARKS]
OPTIONS += ["-W", "error:fastreg runs the plain formula on CPUs"]  # else an old library would hide a mutant

# file -> mutants: a function or class, the fault, a text that occurs there exactly once, and its replacement
CODE: dict[str, list[tuple[str, str, str, str]]] = {
    "kernels/ar_tar.py": [
        ("ar_tar_kernel", "halo row dropped", "load_row(raw_rows, tile.start - 1,", "load_row(raw_rows, tile.start,"),
        ("ar_tar_kernel", "halo row after dropped", "stop = time if AHEAD else", "stop = tile.stop if AHEAD else"),
        ("ar_tar_kernel", "leaving change off by one", "into[i + AHEAD]", "into[i]"),
        ("ar_tar_kernel", "the first change of a run left out", "tl.where(joined, first - last, 0.0)", "0 * first"),
        ("ar_tar_kernel", "sign of the change from a step flipped", "change_to - change)", "change_to + change)"),
        ("ar_tar_kernel", "AR left out where raw is dropped", "current if AR_OF_RAW else kept", "kept"),
        ("ar_tar_kernel", "AR left out of the gradient of raw", "tl.fma(ar_factor, current, own) if", "own if"),
        ("ar_tar_kernel", "alpha and beta exchanged", "own = ar_factor * kept", "own = tar_factor * kept"),
        ("ar_tar_kernel", "raw at dropped's time stride", "tile, raw_outer, raw_time", "tile, raw_outer, dropped_time"),
        ("ar_tar_kernel", "what arrives at raw's stride", "arrived_outer, arrived_time,", "arrived_outer, raw_time,"),
        ("ar_tar_kernel", "padding not 0 where the factor is inf", "bits is not None:  # exactly", "False:  #"),
        ("ar_tar_kernel", "padding not filled", "gradient, inside[i])", "gradient, there[i])"),
        ("ar_tar_kernel", "padding not dropped out", "inside if DROPS else there, AHEAD", "there, AHEAD"),
        ("ar_tar_kernel", "padding counted in AR", "tl.where(there[i], squared, 0.0)", "squared"),
        ("ar_tar_kernel", "AR in padding", "tl.where(there[i], ar_factor * kept, 0.0)", "ar_factor * kept"),
        ("ar_tar_kernel", "only the first item of a program", "items, tl.num_programs(0))", "program + 1)"),
        ("ar_tar_kernel", "upstream gradient ignored", "used = tl.load(upstream)", "used = tl.full((), 1.0, ACC)"),
        ("ar_tar_kernel", "one program writes anew", "not differ(tl.load(partials + program), used)", "program > 0"),
        ("ar_tar_kernel", "what a program expected not stored", "tl.store(partials + program, used)", "pass"),
        ("ar_tar_kernel", "what is expected not kept", "tl.store(expected, used, mask=program == 0)", "pass"),
        ("ar_tar_kernel", "TAR of dropped", "                    last = raws[i]", "                    last = kept"),
        ("ar_tar_kernel", "AR of what is not rounded", "kept = kept.to(ACC)", "kept = current * mask_row"),
        ("ar_tar_kernel", "mask left out", "own + through * mask_row", "own + through"),
        ("ar_tar_kernel", "an infinite mask spoils TAR", "None or MASKED_AR:", "None or mask is not None:"),
        ("_arguments", "coefficients of numbers ignored", "(None, beta) if", "(None, 1.0) if"),
        ("launch_of", "LOCKED always", "view.time == 1 or mask.time == 0", "True"),
        ("differ", "numbers compared, not bits", "x.to(BITS, bitcast=True) != y.to(BITS, bitcast=True)", "x != y"),
        ("launch_of", "float64 summed in float32", "Tiling(view, spec.dtype)", "Tiling(view, torch.float32)"),
    ],
    "kernels/steps.py": [
        ("steps_kernel", "padding counts", "now &= step < length", "pass"),
        ("steps_kernel", "changes from padding", "into = now & before", "into = before"),
        ("steps_kernel", "changes from a step that does not count", "valid + at - 1", "valid + at"),
        ("steps_kernel", "changes from another sequence", "inside & (step > 0)", "inside"),
        ("steps_kernel", "changes into starts", "into &= tl.load(starts + at, mask=into, other=0) == 0", "pass"),
        ("steps_kernel", "lengths of the first sequence", "lengths + at // time", "lengths + 0 * at"),
        ("steps_kernel", "only the first steps", "range(begin, end, AT_ONCE)", "range(begin, begin + 1, AT_ONCE)"),
        ("steps_kernel", "shares that overlap", "tl.minimum(begin + share, total)", "total"),
        ("Encoder", "steps behind the last share", "ceil_div(ceil_div(total, programs), AT_ONCE) * AT_ONCE", "AT_ONCE"),
    ],
    "kernels/reduction.py": [
        ("is_last", "ticket not put back", "tl.atomic_add(ticket, 0 - programs", "tl.atomic_add(ticket, 1"),
        ("is_last", "tickets from 0 alone", "+ 1) % programs == 0", "+ 1) == programs"),
        ("finish", "only the first chunk", "range(0, programs, CHUNK)", "range(0, CHUNK, CHUNK)"),
        ("finish", "float64 finished in float32", "dtype: tl.constexpr = ar.dtype", "dtype: tl.constexpr = tl.float32"),
        ("weighted", "an infinite term of no weight", "coefficient == 0", "coefficient == -1"),
        ("coefficients", "coefficient in memory ignored", "weights.beta_at is not None", "False"),
        ("coefficients", "coefficient in memory rounded", "(weights.beta_at)", "(weights.beta_at).to(tl.float32)"),
        ("factors", "factor 2 missing in AR", "(2 * alpha * ", "(alpha * "),
        ("factors", "upstream gradient left out of TAR", "tar_factor * upstream", "tar_factor"),
        ("scales", "as many changes as steps", "tl.load(weights.counts + 1)", "tl.load(weights.counts)"),
        ("one_over", "nothing divided by 0", "tl.maximum(count, 1)", "tl.maximum(count, 0)"),
    ],
    "kernels/tiling.py": [
        ("tile_of", "one lane too few", "tl.cast(lanes, INDEX) * ALIGN", "tl.cast(lanes, INDEX) * ALIGN - 1"),
        ("tile_of", "sequence in 32 bits", "tl.cast(lane // width, tl.int64)", "lane // width"),
        ("select", "a change into the first step", "counted & within(tile, 0, step) if FIRST else counted", "counted"),
        ("select", "changes where steps count", "(loaded & 2) != 0", "(loaded & 1) != 0"),
        ("select", "marks of the first sequence", "sequence * selection.time", "0 * sequence"),
        ("row_behind", "rows of one step alone", "(behind * rows.ALIGN)", "rows.ALIGN"),
        ("load_row", "computed in the input's dtype", "other=0.0).to(ACC)", "other=0.0)"),
        ("Tiling", "ALIGN of inner alone", "16, inner, *strides)", "16, inner)"),
        ("Tiling", "runs as long as they come", "ceil_div(time, LONGEST_RUN))", "1)"),
        ("Tiling", "runs never shorter", "SHORT_RUN if blocks", "SHORTEST_RUN if blocks"),
        ("Tiling", "INDEX always 32 bits", "tl.int64 if outer", "tl.int32 if outer"),
    ],
    "kernels/cpu_rows.h": [
        ("over_lanes", "the rest of a row left out", "if (rest == 0) break;", "if (rest <= 1) break;"),
        ("over_lanes", "summed in float32 from row to row", "double ar = 0, tar = 0;", "float ar = 0, tar = 0;"),
        ("over_lanes", "summed in float32 over a whole row", "CHUNK = 64 * GROUP", "CHUNK = 1 << 30"),
        ("Tail", "no zeros behind the end of a row", "std::memset(to, 0, group);", ""),
        ("Tail", "the end of a gradient is not written", "if (out) std::memcpy(out, written, bytes);", ""),
        ("formula", "AR of raw left out of the gradient", "? gradient + value * ar_factor :", "? gradient :"),
        ("formula", "dropped not rounded", "rounded<A, T>(value * mask)", "(value * mask)"),
        ("formula", "an infinite mask spoils TAR", "if (flags & MASKED && (flags & ARRIVED || masked_ar)) through",
         "if (flags & MASKED) gradient += through * mask; if (flags & MASKED) through"),
        ("formula", "AR of dropped for that of raw", "if (flags & AR_OF_RAW) kept = value;", ""),
        ("RowCode", "the first row is among others", "GRAD_TAR) && rows.previous)", "GRAD_TAR))"),
    ],
    "kernels/cpu_work.h": [
        ("run", "sums in the order in which programs finish", "++i) partials[i] = program(i);",
         "++i) { const Partials own = program(i); _Pragma(\"omp critical\") sums += own; }"),
        ("along_time", "padding not filled", "!state.counted && !out.base", "!state.counted"),
        ("along_time", "padding beside other sequences not filled", "span.counted || out.base", "span.counted"),
        ("visit", "vectors streamed to any address", "bits_of<std::uintptr_t>(to) % ALIGNED == 0", "true"),
        ("Tiling", "last lanes left out", "ceil_div(sizes.inner, BLOCK)", "std::max<int64_t>(sizes.inner / BLOCK, 1)"),
    ],
    "kernels/cpu_steps.h": [
        ("encode_sequence", "lengths not clamped", "std::clamp<int64_t>(length, 0, time)", "std::min(length, time)"),
        ("encode_sequence", "only bytes of 1 are marks", "valid[step] != 0", "valid[step] == 1"),
        ("encode_sequence", "changes into starts", "!(starts && starts[step])", "1"),
        ("encode_sequence", "changes from a step that does not count", "bits[step] & bits[step - 1]", "bits[step]"),
        ("encode_sequence", "no change into the last step", "= length - 1; step > 0", "= length - 2; step > 0"),
        ("Steps", "no mean of no elements", "[1] * sizes.inner, 1)", "[1] * sizes.inner, 0)"),
        ("Steps", "sequences beside each other all alike", " && state(tile.sequence + past, step) == found", ""),
        ("Steps", "the first step is among others", "!now.state.arrives || !now.state.leaves", "false"),
        ("Steps", "the last step is among others", "sizes.time)) - 1, now.stop)", "sizes.time)), now.stop)"),
        ("Steps", "eight steps compared as one", "if (eight != same) break;", "if ((eight ^ same) & 0xff) break;"),
        ("Steps", "a sequence that a tile begins with left out", "+ tile.lane /", "+ (tile.lane + tile.lanes - 1) /"),
        ("Steps", "sequences apart taken for neighbours", "strides.outer != sizes.inner", "false"),
    ],
    "kernels/cpu_vectors.h": [
        ("rounded", "ties away from even", "bits + 0x7fff + (bits >> 16 & 1);", "bits + 0x8000;"),
        ("rounded", "NaN rounded to infinity", "value == value ? ordered : 0x7e00", "ordered"),
        ("write", "dropped as it was before rounding", "bits_of<Vector<float>>(first & UPPER)", "x.first"),
        ("floats", "subnormal numbers taken for normal ones", "magnitude < 0x400 ?", "magnitude < 0 ?"),
    ],
    "kernels/cpu.cpp": [
        ("backward", "an upstream gradient of 0 for one of -0",
         " && std::signbit(expected) == std::signbit(upstream)", ""),
        ("backward", "compared in part", "expected == upstream &&", "(int)expected == (int)upstream &&"),
        ("walk", "padding of dropout has the terms' gradient", "always, by)", "always | terms, by)"),
        ("factors", "factor 2 missing", "(2 * memory.beta /", "(memory.beta /"),
        ("factors", "a NaN of any bits", 'return x == x ? x : std::nan("");', "return x;"),
        ("weighted", "an infinite term of no weight", "coefficient == 0 ? 0 :", ""),
    ],
    "kernels/cpu.py": [
        ("runnable", "the processor is not asked", "min(_allowed_level(), processor_level())", "_allowed_level()"),
        ("runnable", "PyTorch is not asked", "min(_allowed_level(), processor_level())", "processor_level()"),
        ("Forward", "coefficients exchanged", "alpha, beta, *steps = values", "beta, alpha, *steps = values"),
    ],
    "kernels/view.py": [
        ("switches", "a measured AR has a gradient", "writes and spec.by_ar,", "writes and ar,"),
        ("switches", "a measured TAR has a gradient", "writes and spec.by_tar,", "writes and tar,"),
        ("View", "as many changes as rows", "(steps - self.outer)", "steps"),
        ("View", "sums divided", 'if reduction == "sum":', "if False:"),
        ("allocator", "memory filled before a kernel writes it",
         "return partial(_unfilled, layout)", "return _new(layout)"),
    ],
    "kernels/prediction.py": [
        ("OnHost", "a new plan expects 1", "self.gradient = OnHost.latest =", "self.gradient ="),
        ("OnDevice", "a forward draws", "if latest is None or", "if True or"),
        ("OnDevice", "a captured forward reads another plan's",
         "latest is None or is_captured(self.key[0])", "latest is None"),
        ("OnDevice", "more is allocated for each plan", "if self.key not in self._cells:", "if True:"),
        ("OnDevice", "all plans share memory", "= next(", "= self._latest.get(self.key) or next("),
        ("Ahead", "forwards alone form gradients for ever", "self.prediction.lost += 1", "pass"),
        ("Ahead", "gradients that were taken count as lost", "if self.gradients is not None:", "if True:"),
    ],
    "fastreg/call/penalty.py": [
        ("_sum_of_layers", "mixed lists in float32", "_tensors_of(activations)", "_tensors_of(activations)[:1]"),
        ("_sum_of_layers", "layers of other sizes", "check_like_first(i, pair, layers[0], axis)", "pass"),
        ("_sum_of_layers", "a message without its layer", r"\1[{i}]", r"\1"),
        ("penalize", "coefficients of any value",
         "[*map(checked_coefficient, (\"alpha\", \"beta\"), coefficients)]", "coefficients"),
        ("penalize", "packed rows that are not checked",
         "check_packed(raw, dropped", "str((raw, dropped)); (raw, dropped"),
        ("PenaltyPlan", "a measured term has a gradient", "spec.by_tar or (spec.by_ar and spec.ar_of_raw)", "True"),
        ("PenaltyPlan", "gradients where there are none", "torch.is_grad_enabled()", "True"),
        ("PenaltyPlan", "hooks on saved tensors", " and hooks_on_saved(False) is None", ""),
        ("PenaltyPlan", "activations that no term reads", "first if is_on(beta) else None", "first"),
        ("PenaltyPlan", "no gradients ahead after a backward", "self.forward.prediction.lost = 0", "pass"),
    ],
    "fastreg/call/fold.py": [
        ("Fold", "order of axes kept anyway", "stride if self.fits(stride) else", "stride if True else"),
        ("Fold", "axes with gaps", "pairwise([*self.inner, -1])", "pairwise(self.inner)"),
        ("Fold", "a repeated time step copied again and again", "if x.stride(self.time) == 0 and", "if False and"),
        ("Fold", "a repeated time step that needs a gradient", " and not x.requires_grad:", ":"),
        ("Fold", "rows at the stride of time", "(self.time, *self.outer)[-1]", "self.time"),
        ("Fold", "elements apart", "x if x.stride(2) == 1 else x.contiguous()", "x"),
        ("Fold", "gaps in a gradient", "strides != (1, *accumulate(sizes[:-1], mul))", "False"),
        ("fold_of", "sequences of padding folded", "if is_whole else folds[1:2]", ""),
        ("fold_of", "few steps in a row read as they lie", "x.shape[time] >= NARROW", "True"),
        ("fold_of", "steps apart read as they lie", "max([y.stride[time] for y in present]) <= 1", "True"),
        ("fold_of", "all copied", "[fold.fits(y.stride) for y in present].count(False)", "1"),
        ("fold_of", "the first cut that comes", "copies.index(min(copies))", "0"),
    ],
    "fastreg/call/torch_state.py": [
        ("level_of_caller", "a warning of our own line", "in (\"fastreg\", \"torch\")", "in ()"),
        ("untraced", "Dynamo compiles in hooks", "return _outside(run, function, args)", "return function(*args)"),
        ("observed", "under dispatch modes", "_count_modes() > 0", "False"),
        ("observed", "under forward mode", "or forward_ad._current_level >= 0  # forward", "or False  # forward"),
        ("keepable", "inference tensors kept", "return x.clone()", "return x"),
    ],
    "fastreg/call/arguments.py": [
        ("_expect", "errors of values alone", "raise error(", "raise ValueError("),
        ("check_range", "lengths or marks that are too large", " or greatest > most", ""),
        ("check_range", "marks as large as lengths", 'else (1, "0 or 1")', 'else (time, "0 or 1")'),
        ("_check_batch_sizes", "sizes that grow", " and values == sorted(values)[::-1]", ""),
        ("check_like_first", "layers of other sizes", "sizes_of(x, axis) == sizes_of(first, axis)", "True"),
        ("check_packed", "batch sizes of a subclass", "plain(x.batch_sizes)", "x.batch_sizes"),
        ("_check_packed_alike", "other batch sizes", "not sizes.equal(others)", "False"),
        ("check_packed", "any axis of packed rows", "time_dim in (None, 0, -2)", "True"),
        ("_check_axes", "two axes of any meaning", "_expect(dims == 3,", "_expect(dims in (2, 3),"),
        ("_check_axes", "an axis too far", "-dims <= time_dim < dims", "-dims <= time_dim <= dims"),
        ("check_selectors_of", "one row of marks for all sequences", " and axes_of(x, time_dim)[1] is None", ""),
        ("time_axis_of", "a flag for an axis", " and not isinstance(time_dim, bool)", ""),
    ],
    "fastreg/call/operation.py": [
        ("compute", "coefficients of any value", "and 0 <= alpha < inf and 0 <= beta < inf", ""),
        ("compute", "an option without a hash", "except TypeError:", "except ZeroDivisionError:"),
        ("compute", "whether all steps count",
         "inputs if selectors is None else (*inputs, *selectors.given)", "inputs"),
        ("Plan", "AR of dropped, which is raw", "options.ar_of_raw or raw is dropped", "options.ar_of_raw"),
        ("Plan", "an axis from the front", "axis = time_axis.number() % x.dim() - x.dim()", "axis = -2"),
        ("Plan", "raw always saved", "x if is_saved else None for x, is_saved", "x for x, is_saved"),
        ("compute", "sums divided", 'counts if options.reduction == "mean" else None', "counts"),
        ("Plan", "moved tensors not restored", "map(self.fold.restored, others)", "others"),
        ("Node", "zeros for an output without a gradient", "materialize_grads(False)", "materialize_grads(True)"),
        ("Node", "terms differentiable", "ctx.mark_non_differentiable(results[-1])", "pass"),
        ("Node", "gradients handed out twice", 'vars(ctx).pop("ahead",', 'vars(ctx).get("ahead",'),
        ("Node", "coefficients changed in place",
         "arguments.check_unchanged(ctx.versions, versions_of(values))", "pass"),
        ("Node", "coefficients of a penalty without a gradient", "plan.in_memory and upstream[-1] is not None:  #",
         "plan.in_memory:  #"),
        ("Node", "no double backward", "None if torch.is_grad_enabled() or", "None if"),
        ("Node", "batched gradients not left to the formula", "(*saved, *upstream)", "saved"),
        ("Node", "what hooks have changed", "[: len(plan.facts)] != plan.facts", "[:0] != []"),
        ("differentiate_formula", "one tensor of two layers counted twice", ".view_as(x)", ""),
        ("differentiate_formula", "halves subtracted in half", ".to(dtype).view_as", ".view_as"),
        ("differentiate_formula", "no graph of the gradients", "create_graph=again", "create_graph=False"),
        ("differentiate_formula", "no gradients to differentiate", "if pairs:", "if True:"),
        ("differentiate_formula", "saved tensors without a graph", "x if x.requires_grad else ", ""),
    ],
    "fastreg/call/key.py": [
        ("facts_of", "no shape", "facts += x.shape, x.stride()", "facts += x.dim(), x.stride()"),
        ("facts_of", "no alignment", "address % 16 == 0, ", "0, "),
        ("facts_of", "whether a gradient is needed left out", "% 16 == 0, x.requires_grad", "% 16 == 0, 0"),
        ("facts_of", "tensors that are no memory", "(address := x.data_ptr())", "((address := x.data_ptr()) or True)"),
        ("facts_of", "a negated tensor to the kernels", " and not x.is_neg()", ""),
        ("facts_of", "a coefficient of 0 like another", "x != 0", "True"),
        ("facts_of", "no dtype of coefficients", "x.dtype, x.device", "x.dtype if x.dim() else 0, x.device"),
        ("keep", "plans without end", "len(PLANS) >= SIZE", "False"),
        ("key_of", "tensors that are the same or not", "inputs[0] is inputs[1], ", ""),
        ("key_of", "not in deterministic mode", ", is_deterministic()", ""),
        ("key_of", "no options", "*options, *map", "*map"),
        ("key_of", "True is 1", ", *map(type, options)", ""),
        ("key_of", "no grad mode", "torch.is_grad_enabled(), ", ""),
        ("key_of", "no hooks on saved tensors", "hooks_on_saved(False) is None, ", ""),
    ],
    "fastreg/call/selectors.py": [
        ("Selectors", "steps of another layer", "if self.encoded_for != layer:", "if self.encoded_for is None:"),
        ("Selectors", "selectors that are not checked", "arguments.check_selectors(*self.given)", "pass"),
        ("_brought", "lengths with gaps to the kernels", "non_blocking=True).contiguous()", "non_blocking=True)"),
        ("_brought", "pinned memory that the caller refills", "elif x.is_pinned()", "elif False"),
        ("_brought", "marks with gaps in memory", "return x.contiguous()", "return x"),
    ],
    "fastreg/call/dropout.py": [
        ("drop_and_penalize", "a mask with p of 0 ignored", "(mask is None and p == 0)", "p == 0"),
        ("drop_and_penalize", "dropped in evaluation", "not training or (", "("),
        ("DropoutPlan", "one backward for all", "self.backwards.get(key)", "next(iter(self.backwards.values()), None)"),
        ("DropoutPlan", "the penalty's gradient where there is none", "if grad is not None else", "if True else"),
        ("DropoutPlan", "mask and raw swapped", "(raw, mask), gradient", "(mask, raw), gradient"),
        ("DropoutPlan", "backwards without end", "if len(self.backwards) < BACKWARDS:", "if True:"),
        ("DropoutPlan", "any alignment of a gradient", "arrived.data_ptr() % 16 == 0", "0"),
        ("DropoutPlan", "a mask that is not checked", "check_mask(mask, raw, self.row)", "pass"),
        ("DropoutPlan", "dropped not rounded in a backward", "if dropped.dtype != mask.dtype:", "if False:"),
        ("DropoutPlan", "a gradient that is rounded twice", "- dropped).detach()", "- dropped)"),
    ],
    "fastreg/call/rnn_dropout.py": [
        ("FusedRNNDropout", "recomputation leaves a penalty", "or current() == -1:", "or True:"),
        ("FusedRNNDropout", "evaluation leaves the last penalty", "= self.formed, None", "= self.formed, self.formed"),
        ("FusedRNNDropout", "a penalty that can be taken twice", "(None, True), None", "(None, True), self.formed"),
        ("FusedRNNDropout", "penalty in copies", '"formed": None, ', ""),
        ("FusedRNNDropout", "warnings in copies", '"_warned": (), ', ""),
        ("FusedRNNDropout", "the axis of a sequence ignored", "(loan, loan.time_axis)", "(loan, self.time_axis())"),
        ("FusedRNNDropout", "a replica without coefficients", "is_on_itself or not self._is_said)", "is_on_itself)"),
        ("FusedRNNDropout", "a penalty without coefficients", " and not self._has_own():", " and False:"),
        ("FusedRNNDropout", "a loan not noted", "self._warned = (*self._warned, NO_COEFFICIENTS)", "pass"),
        ("FusedRNNDropout", "the first forward warns", "if self._ran_without:", "if True:"),
        ("FusedRNNDropout", "samples warn", "elif torch.is_grad_enabled() and", "elif"),
        ("FusedRNNDropout", "coefficients of 0 warn", "is_on_itself or self._is_said or", "is_on_itself or"),
        ("FusedRNNDropout", "one coefficient ignored", "alpha is None and beta is", "alpha is None or beta is"),
        ("FusedRNNDropout", "AR of raw ignored", 'self.ar_of == "raw")', "False)"),
        ("FusedRNNDropout", "p of the call ignored", "self.p if p is None else p", "self.p"),
        ("FusedRNNDropout", "own coefficients where attached", "if loan is None else (loan,", "if True else (loan,"),
        ("FusedRNNDropout", "the regularizer's coefficients compiled", "loan = Loan(0.0, 0.0, loan.time_axis)", "pass"),
        ("FusedRNNDropout", "a penalty to take where attached", "elif torch.compiler.is_", "if torch.compiler.is_"),
        ("FusedRNNDropout", "a penalty without a gradient warns", " and untaken[0].penalty.requires_grad", ""),
        ("FusedRNNDropout", "a penalty that is off warns", "if is_on_itself and untaken", "if untaken"),
        ("FusedRNNDropout", "a take without gradients warns", "torch.is_grad_enabled() and not grad", "not grad"),
        ("FusedRNNDropout", "a warning comes again", "self._warned = (*self._warned, message)", "pass"),
    ],
    "fastreg/attach/attachment.py": [
        ("Hook", "copies in evaluation", ' or "forward" in vars(module)', ""),
        ("Attachment", "a removed handle in a cycle", "self.owner = lambda: None", "pass"),
        ("Hook", "copied hooks", 'getattr, (nullcontext(self.handles), "__exit__")', "object.__reduce_ex__(self, 4)"),
        ("Hook", "ids of hooks in a pickle", "nullcontext(self.handles)", "nullcontext(())"),
        ("Hook", "hooks that another module shares", "        if module is self.module:", "        if True:"),
        ("Hook", "an error in evaluation", "(module.training or", "(True or"),
        ("Hook", "an error of removed hooks", "self.attachment is not None and (module", "True and (module"),
        ("Hook", "hooks stay", "        for handle in self.handles:\n            handle.remove()", "        pass"),
        ("Hook", "hooks that Dynamo does not see", 'vars(module).setdefault("forward", self.forward)', "pass"),
        ("Hook", "the forward of another module", "if self.forward.__func__ is not type(", "if False and type("),
        ("Hook", "the forward stays", "del self.module.forward", "pass"),
        ("Hook", "a forward of others goes", 'vars(self.module).get("forward") == self.forward', "True"),
        ("Hook", "hooks before those added later", ".move_to_end(self.handles[0].id)", ""),
        ("attachments_of", "removed hooks", " and x.attachment is not None", ""),
        ("Call", "a call that is saved with raw", "return OrderedDict, ()", "return object.__reduce_ex__(self, 4)"),
        ("Attachment", "hooks of a regularizer that is gone", "lambda _: self.shown and self.remove())", "None)"),
        ("Attachment", "a regularizer that nothing keeps", "self.shown and self.remove())", "self.remove())"),
        ("Attachment", "its hooks stay", "self.remove()\n            return", "return"),
        ("Attachment", "calls without gradients", "return self._note(NO_GRADIENTS)", "return None"),
        ("Attachment", "a run before another call", "max(self.called, kind), 0", "kind, 0"),
        ("Attachment", "losses before a call", "max(self.called, kind), 0", "kind, self.tally.losses"),
        ("Attachment", "a frozen stage", "self.tally.ran = kind == RUN", "self.tally.ran = True"),
        ("Attachment", "a validation after a run", "            self.tally.ran = kind == RUN", "            pass"),
        ("Attachment", "a module that is frozen", "return self._note(FROZEN)", "return None"),
        ("Attachment", "a frozen run that is lost", "            run.number = 0", "            pass"),
        ("Attachment", "raw that got to no dropout", "self.waiting += run is not None", "pass"),
        ("Attachment", "raw that waits on", "self.waiting -= run is not None", "pass"),
        ("Attachment", "a hook that changes a fused output", " or loan.version != version_of(dropped)", ""),
        ("Attachment", "another output than the fused one", "loan.dropped is not dropped or", "False or"),
        ("Attachment", "a lost recomputation", "if again and not recomputes():", "if False:"),
        ("Attachment", "recomputation that is not reentrant", " and not recomputes()", ""),
        ("Attachment", "runs in evaluation", "if not source.module.training:", "if False:"),
        ("Attachment", "runs under a transform", "if transformed():", "if False:"),
        ("Attachment", "a recomputation taken for a run", "None if again else self.runs", "self.runs"),
        ("Attachment", "inputs taken for outputs", "[*at.values(), *map(", "[*at.values()] or [*map("),
        ("Attachment", "a link between views cut", " or memory.count(at[i]) > 1", ""),
        ("Attachment", "states that nobody may reset", "x is rows or memory.count(at[i]) > 1", "True"),
        ("Attachment", "states without marks", "if x.requires_grad and (is_", "if x is rows and (is_"),
        ("Attachment", "raw that has no place", "if is_dropped and id(rows) not in tensors:", "if False:"),
        ("Attachment", "a loan of packed rows", "call.packed is not None and self.source.dropout.training", "False"),
        ("Attachment", "the dropout's own masks", "if given.get(name) is not None}", "if False}"),
        ("Attachment", "a run that is cleared", "run is not None and not run.is_held:", "False:"),
        ("Attachment", "a run that raw keeps", "        call.run = None", "        pass"),
        ("Attachment", "a dropout of the same raw", "if run is None and current() == -1:", "if False:"),
        ("Attachment", "a dropout that a recomputation runs", "run is None and current() == -1", "run is None"),
        ("Attachment", "changes in place", "if version_of(raw) != call.version:", "if False:"),
        ("Attachment", "packed dropped", "return dropped if result is rows else", "return dropped if True else"),
        ("Attachment", "raw of another module", " and call.attachment is self", ""),
        ("Attachment", "a block that returns its input", " and found.source.module in module.modules():", ":"),
        ("Attachment", "raw of the last step", " and found.source.module is not module and", " and"),
        ("Attachment", "raw of a module inside", "and found.source.module in module.modules():", "and False:"),
        ("Attachment", "raw that waits for its dropout", "call.attachment if call else rows.grad_fn", "rows.grad_fn"),
        ("Attachment", "raw that is marked", "rows.grad_fn.run.attachment if is_marked(rows) else None", "None"),
        ("Attachment", "a penalty that no loss finds", "elif not dropped.requires_grad", "elif False"),
        ("Attachment", "AR of raw ignored", "and dropout.ar_of == \"raw\" else", "and False else"),
        ("Attachment", "one sequence for a packed one", "[call.packed._replace(data=x) for x in pair]", "pair"),
        ("Attachment", "packed runs of one time step", "else len(call.packed.batch_sizes)", "else 2"),
        ("Attachment", "a batch of one", "and not is_batch", ""),
        ("Attachment", "a time step of a batch", " and raw.dim() != 3", ""),
        ("Attachment", "a batch of one with TAR", " and not is_on(call.coefficients[1])", ""),
        ("Attachment", "another axis of one",
         "time_axis.time_dim == 0 and raw", "time_axis.time_dim is not None and raw"),
        ("described", "axes in a wrong order", '{time: "time", batch: "batch"}', '{0: "batch", 1: "time"}'),
    ],
    "fastreg/attach/captures.py": [
        ("check_output", "any output", "is_list(output) and len(output) == 3 and _are", "_are"),
        ("check_layout", "a stated layout refused", "if not is_said and batch", "if batch"),
        ("check_layout", "rows of one sequence", " and batch != 1", ""),
        ("check_layout", "as many sequences as steps", " and batch != time:", ":"),
        ("check_layout", "scores of the other layout", "if rows or scores:", "if rows:"),
        ("check_layout", "states for activations", "size != batch for size in shape", "False for size in shape"),
        ("check_layout", "states with a warning", "    if not is_said:\n        raise", "    if False:\n        raise"),
    ],
    "fastreg/attach/outputs.py": [
        ("mapped", "named tuples", "if isinstance(result, tuple) else None", "if False else None"),
        ("mapped", "sparse states", "if result.layout is torch.strided else", "if True else"),
        ("mapped", "items of the model's own dictionary", "made = copy(result)", "made = result"),
        ("mapped", "attributes of a model output", "elif own:", "elif False:"),
        ("mapped", "items that are attributes", "if own is result:", "if False:"),
        ("address_of", "a view at another address", " - x.storage_offset() * x.itemsize", ""),
    ],
    "fastreg/attach/runs.py": [
        ("report", "warnings that are errors", "if case not in WARNINGS:", "if True:"),
        ("report", "a warning that comes again", " and not attachments[0].tally.is_first(case)", " and False"),
        ("Tally", "a note that is never old", "self.notes.add(note)", "pass"),
        ("Tally", "the first gradient is never seen", "self.patience == AT_FIRST or", "False or"),
        ("Tally", "later gradients are never seen", " or self.begun >= self.settled + HOOKED", ""),
        ("Run", "a penalty taken twice", ", self.terms, self.is_held = self.terms, None, False", " = self.terms"),
        ("Run", "lost runs", "tally.lost += self.number > tally.settled and not self.is_lost", "pass"),
        ("Run", "runs lost twice", " and not self.is_lost", ""),
        ("Run", "runs before a gradient", "self.number > tally.settled", "self.number > 0"),
        ("stamps_of", "coefficients changed in place", "(id(x), version_of(x))", "id(x)"),
        ("stamps_of", "coefficients in another tensor", "(id(x), version_of(x))", "version_of(x)"),
        ("Runs", "many lost penalties", "if tally.lost >= tally.patience:", "if False:"),
        ("Runs", "a list that grows", "if len(self.runs) % 1000 == 0:", "if False:"),
        ("Runs", "coefficients of 0 are warned of", "needs_gradient and any(map(is_on, given))", "needs_gradient"),
        ("Runs", "runs whose numbers are the same", "        tally.begun += can_be_lost", "        tally.begun = 1"),
        ("Runs", "losses of frozen modules", "if x.tally.losses > PATIENCE and", "if False and"),
        ("Runs", "modules that are left out", " and not x.tally.ran:", ":"),
        ("Runs", "losses without gradients", "x.tally.losses += loss.requires_grad", "x.tally.losses += 1"),
        ("Runs", "a handle that says nothing", "x.say(repr(x))", "pass"),
        ("Runs", "a handle that says it again", ' and x.tally.is_first("said"):', ":"),
        ("Runs", "a handle that has nothing to say", "and x.shown and", "and"),
        ("Runs", "a gradient that nobody sees", "terms.penalty.register_hook(partial(settle, tallies))", "pass"),
        ("Runs", "a gradient of a penalty of 0", "for run in counted if run.number > 0}", "for run in counted}"),
        ("Runs", "calls before the last loss", "            x.called = min(x.called, BEFORE)", "            pass"),
        ("Runs", "modules that no loss knows", "   x.called = min(x.called, BEFORE)", "   x.called = NEVER"),
        ("Runs", "frozen modules alone", "calls != {FROZEN} and", "True and"),
        ("Runs", "a frozen module that hides a lost penalty", "calls != {FROZEN} and", "FROZEN not in calls and"),
        ("Runs", "a loss without gradients", " and not loss.requires_grad\n", "\n"),
        ("Runs", "a detached loss", "RUN not in calls and not loss", "not loss"),
        ("Runs", "a loss of nothing", "bool(calls) and RUN", "RUN"),
        ("Runs", "a module in evaluation", "if training and calls", "if calls"),
        ("Runs", "coefficients of the loss", "if run.stamps != stamps:", "if False:"),
        ("Runs", "runs of one time step", "count > 3 and is_on", "False and is_on"),
        ("Runs", "three runs of one time step", "count > 3 and", "count > 2 and"),
        ("Runs", "four runs without TAR", " and is_on(given[1])", ""),
        ("Runs", "one run of one time step", "if count > 1:", "if count:"),
        ("Runs", "a warning before an error", "Counter(single).most_common()", "Counter(single).items()"),
        ("Runs", "cleared runs that are lost", "            run.number = 0", "            pass"),
        ("Runs", "runs that are cleared", "            run.end()", "            pass"),
        ("Runs", "what is known after clear", "x.waiting, x.called = 0", "_, x.called = 0"),
        ("Runs", "calls before clear", "x.waiting, x.called = 0, min(x.called, BEFORE)", "x.waiting = 0"),
        ("Runs", "runs that are taken", " and run.is_held and", " and"),
        ("Runs", "runs of a removed handle", " and run.attachment in left]", "]"),
        ("settle", "a gradient that is None", "for x in tallies if gradient is not None else ():", "for x in tallies:"),
        ("settle", "the patience of the start", ", x.patience = x.begun, 0, PATIENCE", " = x.begun, 0"),
        ("settle", "lost runs that stay", "x.lost, x.patience = x.begun, 0,", "_, x.patience = x.begun, 0,"),
        ("total", "the first penalty alone", "for x in formed]", "for x in [*formed][:1]]"),
    ],
    "fastreg/attach/mark.py": [
        ("FastregAttach", "runs that a kept loss keeps", "        ctx.run.lose()", "        pass"),
        ("FastregAttach", "no view", "x.view_as(x) if as_view else x.detach()", "x.detach()"),
        ("FastregAttach", "views alone", "x.view_as(x) if as_view else x.detach()", "x.view_as(x)"),
        ("is_marked", "never", "type(x.grad_fn) is FastregAttach._backward_cls", "False"),
        ("reached", "runs that the loss does not depend on", "return found", "return [*found, *left]"),
        ("_WithPenalty", "scale ignored", "gradient, *ctx.saved_tensors,", "gradient, torch.ones(()),"),
        ("_WithPenalty", "no gradient of x", "return gradient,", "return torch.zeros_like(gradient),"),
        ("_WithPenalty", "a copy of x", "x.view_as(x)", "x.clone()"),
        ("with_penalty", "a view where gradients are off", "torch.is_grad_enabled() and ", ""),
        ("with_penalty", "a view for a penalty without a gradient", " and penalty.requires_grad", ""),
        ("with_penalty", "a scale that changes later", "torch.ones_like(penalty.detach()).mul_(", "torch.as_tensor("),
        ("with_penalty", "x that cannot have a gradient", "not check_tensor(\"x\"", "None is check_tensor(\"x\""),
        ("with_penalty", "a penalty with an axis", ".dim() != 0", ".numel() != 1"),
        ("with_penalty", "any scale", "check_coefficient(\"scale\", scale)", "pass"),
    ],
    "fastreg/attach/paths.py": [
        ("Swap", "a dropout left in training", "own.train(fused.training)", "own"),
        ("Swap", "a dropout that is always in training", ".train(own.training)", ""),
        ("Paths", "modules detached at once", "return attached.pop_all()", "return attached"),
        ("Paths", "a stated layout ignored", "if batch_first is None and self", "if self"),
        ("Paths", "a layout beside a stated axis", "self.time_dim is None and layout", "layout"),
        ("Paths", "the axis of time not passed on", '"time_dim": self.time_dim}', '"time_dim": None}'),
        ("Paths", "a function of no module", "if not self.pairs and", "if False and"),
        ("Paths", "a layout of captures ignored", "begin(output, batch_first=self.batch_first,", "begin(output,"),
        ("Paths", "a mask of more steps than raw", "mask[:, -steps:]", "mask"),
        ("Paths", "axes shown in each step", "self.is_said = True", "pass"),
        ("Paths", "an option that is not checked", "    time_axis_of(self.batch_first, self.time_dim)", "    pass"),
        ("Paths", "a warning in each step", "self.is_warned = True", "pass"),
        ("_module_at", "the first module on the path", "        module = child", "        return child"),
        ("_module_at", "the children of the model", "module.named_children()", "model.named_children()"),
        ("paths_of_learner", "no fused dropout", "(fused if dropout else {})", "{}"),
        ("paths_of_learner", "a layout that is overridden", "if dropout and (paths", "if False and (paths"),
        ("coefficients_of_learner", "no coefficients", "if rnn is not None and all", "if False and all"),
        ("check_options_of_fuse", "lengths", 'if "lengths" in options:', "if False:"),
        ("paths_of_learner", "an empty path", "None if dropout is False else dropout", "dropout or None"),
        ("pairs_of", "a module taken for a path", "not isinstance(path, str) or not path", "not path"),
        ("pairs_of", "the model itself", "or not path:", "or False:"),
        ("pairs_of", "a path twice", "not rnns or len({*rnns}) < len(rnns)", "not rnns"),
    ],
    "fastreg/adapter.py": [
        ("of_regularizer", "a coefficient that changes nothing", "setattr(self.regularizer, name, x)", "None"),
        ("Adapter", "sums that go on", "self.sums = torch.zeros(3)\n        return", "return"),
        ("Adapter", "terms counted once", "self.sums.to(summed.device) + summed", "summed"),
        ("Adapter", "warned in one fit only", "paths.is_warned = False", "pass"),
        ("Adapter", "no warning", "self.paths.warn_of_evaluation(", "str("),
    ],
    "fastreg/lightning.py": [
        ("ActivationRegularization", "the batch gone before its backward", "lambda: [step.batch]", "lambda: [None]"),
        ("ActivationRegularization", "no penalty", "else loss + penalty", "else loss"),
        ("ActivationRegularization", "hooks off after another trainer", "step.trainer is trainer or", "True or"),
        ("ActivationRegularization", "hooks of a fit cut off", 'step.trainer.state.status != "running"', "False"),
        ("_RegularizedStep", "only the first callback", "in self.callbacks:", "in self.callbacks[:1]:"),
    ],
    "fastreg/transformers.py": [
        ("RegularizedTrainer", "a wrong path found late", "self._attached().close()", "pass"),
        ("RegularizedTrainer", "warned in each step", "self._is_masked = False", "pass"),
        ("RegularizedTrainer", "a column taken out", '"attention_mask" in columns', "False"),
        ("_collated", "masks of examples not seen", "is_masked.fill_(True)", "pass"),
        ("RegularizedTrainer", "the sum of batches", " / self.current_gradient_accumulation_steps", ""),
        ("RegularizedTrainer", "no batch for masks", "lambda: [batch]", "lambda: [None]"),
        ("RegularizedTrainer", "no error without a penalty", "        if not passed:", "        if False:"),
        ("RegularizedTrainer", "the model of PEFT", "_inner(self.model), l", "self.model, l"),
        ("RegularizedTrainer", "a backward wrapped twice", "accelerator.backward = backward", "pass"),
    ],
    "fastreg/fastai.py": [
        ("RNNRegularizer", "paths from the wrapper of DDP", "model = get_model(model)", "pass"),
        ("RNNRegularizer", "no paths in a copy", "copy(self.paths),", "type(self)().paths,"),
        ("RNNRegularizer", "the learner of the original", "deepcopy(self.learn, memo)", "self.learn"),
        ("RNNRegularizer", "no bptt in a copy", "self.beta, self.bptt), memo", "self.beta), memo"),
        ("RNNRegularizer", "warned in one fit only", "ExitStack(), False", "ExitStack(), self.paths.is_warned"),
        ("RNNRegularizer", "columns of a validation", "if self._own_metrics is not None:  # nothing", "if None:  #"),
        ("RNNRegularizer", "a validation ends the fit", "if self._own_metrics is not None:  # the end", "if None:  #"),
        ("RNNRegularizer", "terms in the validation", "and not self.learn.training):", "and None):"),
        ("RNNRegularizer", "no warning", "self.paths.warn_of_evaluation(", "str("),
        ("RNNRegularizer", "no batch for masks", "lambda: self.learn.xb", "lambda: [self.learn.yb[0]]"),
        ("RNNRegularizer", "hooks of another learner", "LAST.get(id(model), self)._leave()", "self._leave()"),
        ("RNNRegularizer", "an RNNCallback beside paths", "captures == 0 and self.paths.pairs", "self.paths.pairs"),
        ("unfuse", "a callback that finds nothing", "        if captures:", "        if True:"),
        ("unfuse", "no warning", "warnings.warn(UNFUSED, stacklevel=2)", "pass"),
    ],
    "fastreg/fastai1.py": [
        ("RNNTrainer", "warned in one fit only", "self.paths.is_warned = False", "pass"),
        ("RNNTrainer", "no warning", "self.paths.warn_of_evaluation(", "str("),
        ("RNNTrainer", "output taken apart", "bool(self.paths.pairs) and", "False and"),
        ("unfuse", "no warning", "warnings.warn(UNFUSED, stacklevel=2)", "pass"),
        ("_stock", "a callback that takes output apart", "None if cb.returns_decoded() else", ""),
    ],
    "fastreg/attach/source.py": [
        ("Source", "one time step taken for a sequence", "if not is_told and", "if False and"),
        ("Source", "one sequence with the axis of a batch",
         "ONE_SEQUENCE if is_one else self.time_axis", "self.time_axis"),
        ("Source", "an axis that was said ignored", "self.time_axis.time_dim is None and", ""),
        ("Source", "raw not picked", 'call("output", self.output, result)', "result"),
        ("Source", "a dropout of another layout", "(its := self.dropout.time_axis()) != time_axis", "False"),
        ("Source", "time_dim beside batch_first", "RNNBase) and self.time_dim is not None:", "RNNBase) and None:"),
        ("Source", "a forward of the dropout's own", "is not FusedRNNDropout.forward", "is None"),
        ("Masks", "no batch", "call(name, function, *batch())", "function(*_)"),
        ("Masks", "a mask without axes", " and mask.dim() > 0", ""),
        ("Masks", "anything for a mask", "if mask is not None and not", "if False and not"),
        ("batch_first_of", "layout of the module ignored", "return own", "return True"),
        ("batch_first_of", "layout inside ignored", "list(inside or [default]) == [True]", "inside or default"),
        ("batch_first_of", "a layout for what is inside", "inside or [default]", "[default] if default else inside"),
        ("call", "an error with two notes", "and not any(", "and not all("),
        ("call", "an error without a note", "            add_note(", "            str("),
        ("Source", "no note on an error in output", 'call("output", self.output, result)', "self.output(result)"),
        ("_check_module", "modules whose hooks do not run", "in REFUSED.items()", "in []"),
    ],
    "fastreg/attach/regularizer.py": [
        ("KnownAttributes", "a misspelt attribute", "if self.is_made and", "if False and"),
        ("RNNRegularizer", "no attributes of subclasses", "is_made = type(self) is RNNRegularizer", "is_made = 1"),
        ("RNNRegularizer", "a reset that needs arguments", " and not _needs_arguments(reset)", ""),
        ("RNNRegularizer", "a module that is named reset", " and not isinstance(reset, nn.Module)", ""),
        ("RNNRegularizer", "first layer for last", "raw[-1], dropped[-1]", "raw[0], dropped[0]"),
        ("RNNRegularizer", "captures stay after an error", "self.clear()\n            raise", "raise"),
        ("RNNRegularizer", "clear leaves hooks' captures", "        self._runs.clear()", "        pass"),
        ("RNNRegularizer", "captures in copies", '"_given": None, ', ""),
        ("RNNRegularizer", "two regularizers of a module", "elif attachment.source.module is module:", "elif False:"),
        ("RNNRegularizer", "layers that attach ignores", "        if self.layers is not None:", "        if False:"),
        ("RNNRegularizer", "a regularizer that is gone", "if attachment.owner() is None:", "if False:"),
        ("RNNRegularizer", "a lost capture", "if self._given is not None and any(", "if False and any("),
        ("RNNRegularizer", "a capture that nothing loses", "x.requires_grad for given", "True for given"),
        ("RNNRegularizer", "a warning about captures again", "self._warned.add(kind)", "pass"),
        ("RNNRegularizer", "warnings in copies", '"_warned": set(), ', ""),
        ("_scaled_lr", "lr not restored", 'group["lr"] = lr', "pass"),
        ("_scaled_lr", "tensor not restored", "lr.copy_(value)", "pass"),
    ],
    "fastreg/call/problem.py": [
        ("axes_of", "sequences without an axis", "1 if len(x.shape) > 2 else None", "None"),
    ],
    "fastreg/call/packed.py": [
        ("by_sequence", "one tensor selected twice",
         "{id(y): y for y in given if y is not None}.values()", "[x for x in given if x is not None]"),
        ("Selected", "the gradient in the order of sequences",
         "ctx.orders = inverse, order", "ctx.orders = order[: len(x)], inverse"),
        ("_known_orders", "a plan for each number of rows", "(1 << max(len(order).bit_length() - 5, 0))", "1"),
        ("orders_of", "changes between sequences", "inverse, step == 0", "inverse, step < 0"),
    ],
    "fastreg/call/reference.py": [
        ("ar_tar", "the formula's terms not detached", "mean.detach()", "mean"),
        ("_divisors", "pairs as many as steps", "(time - 1))", "time)"),
        ("_divisors", "nothing divided by 0", "= _at_least_1(x.shape[spec", "= (x.shape[spec"),
        ("_divisors", "elements of the last axis alone", "elements // _at_least_1(bits.numel())", "x.shape[-1]"),
        ("_counted_changes", "TAR across all sequences", "dim=time_dim", "dim=0"),
        ("_counted_changes", "2 steps are special in an export", " and not is_exporting()", ""),
        ("_counted_changes", "TAR across sequences", "x.roll(1, dim)", "x.roll(1, 0)"),
        ("_counted_changes", "changes where steps count", "time_dim, CHANGE)", "time_dim)"),
        ("encoded", "starts ignored", "into & ~starts", "into"),
        ("encoded", "changes from a step that does not count", "inside & inside.roll(1, 1)", "inside"),
        ("encoded", "a change into the first step from the last", " & (step > 0)", ""),
        ("encoded", "lengths ignored beside valid", "inside & (step < lengths", "(step < lengths"),
        ("_counted", "marks across sequences", "else inside.transpose(0, 1)", "else inside"),
        ("_weighted", "coefficients of tensors in float32", "torch.float64 if has_float64(total.device) else ", ""),
        ("_weighted", "an infinite term of no weight", "coefficient == 0", "coefficient == -1"),
    ],
}  # fmt: skip


def codes(code: CodeType) -> list[CodeType]:
    """List the code of a module, and of the classes and functions in it."""
    return [code, *(inner for x in code.co_consts if isinstance(x, CodeType) for inner in codes(x))]


class Mutant(NamedTuple):
    """One wrong place."""

    file: str
    where: str
    what: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.file} {self.where}: {self.what}"

    @property
    def interpreted(self) -> bool:
        """Whether the tests run it through the kernels: also a mutant elsewhere that says it is for them."""
        return "kernels" in str(self) and "cpu" not in self.file

    @property
    def tests(self) -> tuple[str, ...]:
        """The folders of tests, one of whose tests must fail."""
        return ROOMS["kernels" if self.interpreted else os.path.dirname(self.file)]

    def source(self) -> str:
        """The whole file with the wrong place in it."""
        text = part = (ROOT / self.file).read_text()
        if self.file.endswith(".py"):
            (part,) = re.findall(rf"(?ms)^(?:def|class) {self.where}\b.*?(?=\n\n\n|\Z)", text)
        if part.count(self.old) != 1:
            raise LookupError(f"{self}: expected {self.old!r} once, found {part.count(self.old)} times")
        return text.replace(part, part.replace(self.old, self.new))

    def swap(self) -> bool:
        """Give the functions of the imported module the mutant's code; return whether any has other code now."""
        text, mutated = (ROOT / self.file).read_text(), self.source()
        if not self.file.endswith(".py") or f"@triton.jit\ndef {self.where}(" in text:  # compiled from the file
            return False
        before, after = (codes(compile(x, self.file, "exec", dont_inherit=True)) for x in (text, mutated))
        if [(x.co_name, x.co_freevars) for x in before] != [(x.co_name, x.co_freevars) for x in after]:
            return False
        swaps = {old: new for old, new in zip(before, after, strict=True) if old != new}
        functions = [x for x in gc.get_objects() if type(x) is FunctionType and x.__code__ in swaps]
        for function in functions:
            function.__code__ = swaps[function.__code__]
        return functions != []


MUTANTS = [Mutant(file, *mutant) for file, mutants in CODE.items() for mutant in mutants]
Task = tuple[Mutant | None, tuple[str, ...]]  # a mutant, or none for the code as it is, and folders or files of tests


def build(kernels: Path) -> None:
    """Build the C++ kernels in a copy, quickly, without the libraries of the unchanged code."""
    for library in kernels.glob("*.so"):
        library.unlink()
    sources = b"".join(file.read_bytes() for file in (kernels / "cpu.cpp", *sorted(kernels.glob("cpu_*.h"))))
    options = ["-std=c++17", "-O1", "-w", "-fopenmp", "-ffp-contract=off", "-fvisibility=hidden", "-shared", "-fPIC"]
    options.append(f"-DSOURCES=0x{sha256(sources).hexdigest()[:16]}")  # as in setup.py
    subprocess.run(["g++", *options, "cpu.cpp", "-o", "_cpu.abi3.so"], cwd=kernels, check=True)


class Job:
    """A process with a folder of its own, which runs the tests of a task."""

    def __init__(self, task: Task, test: Callable[[Task, Path], str]):
        self.task, self.folder = task, tempfile.TemporaryDirectory()
        self.process = FORK.Process(target=self.run, args=(test, Path(self.folder.name)))
        self.process.start()

    def run(self, test: Callable[[Task, Path], str], folder: Path) -> None:
        """Write the first failure to the folder, and what the tests print."""
        os.setsid()  # the processes that tests start end with this one
        signal.alarm(LIMIT if self.task[0] else 10 * LIMIT)
        for stream in (1, 2):
            os.dup2(os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        if not INTERPRET:  # a search without end fills 4 GB; interpreted tests reserve more
            resource.setrlimit(resource.RLIMIT_DATA, (2**32, 2**32))
        (folder / "outcome").write_text(test(self.task, folder))
        os._exit(0)  # without waiting for threads of tests

    def outcome(self) -> str:
        """Return the first failure, or "" if all tests passed."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # pyright: ignore[reportArgumentType]
        with self.folder as folder:
            if Path(folder, "outcome").exists():
                return Path(folder, "outcome").read_text()
            if (status := self.process.exitcode or 0) < 0:
                return signal.Signals(-status).name
            raise RuntimeError(f"{self.task[0]}: {Path(folder, 'output').read_text()[-3000:]}")


class Runner:
    """A plugin of pytest that runs the tests it has collected on the code as it is, and then on each mutant."""

    def __init__(self, tasks: list[Task], folders: list[str]) -> None:
        self.tasks, self.folders, self.survived = tasks, folders, 0
        self.kills: Counter[str] = Counter()  # of tests and of their files: those with the most run first
        self.failed = ""  # the first test that failed in this process

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed = self.failed or report.nodeid * report.failed

    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        if session.testsfailed:  # in imports: pytest goes on, and says so
            return None
        unmutated: list[Task] = [(None, (folder,)) for folder in self.folders]
        for mutant, failed in (result for tasks in (unmutated, self.tasks) for result in self.run_all(tasks, session)):
            if mutant is None and failed:
                pytest.exit(f"the code as it is fails: {failed}", 1)
            if mutant is not None:
                self.kills.update([failed, failed.partition("::")[0]])
                self.survived += not failed
                print(f"{mutant!s:75} {f'killed by {failed}' if failed else 'SURVIVED'}", flush=True)
        return True

    def run_all(self, tasks: Iterable[Task], session: pytest.Session) -> Iterator[tuple[Mutant | None, str]]:
        """Run a job on each core at a time."""
        waiting, running, test = iter(tasks), [], partial(self.test, session)
        while running := [*running, *(Job(task, test) for task in islice(waiting, CORES - len(running)))]:
            wait([job.process.sentinel for job in running])
            for job in [x for x in running if x.process.exitcode is not None]:
                running.remove(job)
                yield job.task[0], job.outcome()

    def test(self, session: pytest.Session, task: Task, folder: Path) -> str:
        """Return the first failure, with the mutant's code in the functions, or in a copy of the checkout."""
        mutant, tests = task
        items = [item for each in tests for item in session.items if item.nodeid.startswith(each)]
        files = sorted({item.nodeid.partition("::")[0]: 0 for item in items}, key=lambda file: -self.kills[file])
        if mutant is None or mutant.swap():
            items.sort(key=lambda item: (-self.kills[item.nodeid], "slow" in item.keywords))
            for item, following in zip(items, [*items[1:], None], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if self.failed:
                    return self.failed
        subprocess.run(["cp", "-a", *(ROOT / name for name in COPIED), folder], check=True)
        if mutant is not None:
            (folder / mutant.file).write_text(mutant.source())
            if mutant.file.endswith((".cpp", ".h")):
                build(folder / "kernels")
        command = [sys.executable, "-m", "pytest", *OPTIONS, *files]
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True)
        if done.returncode < 0:
            return signal.Signals(-done.returncode).name
        if done.returncode > pytest.ExitCode.INTERRUPTED:
            raise RuntimeError(done.stdout)
        return re.findall(r"(?m)^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout)[0] if done.returncode else ""


def main(chosen: str = "", *tests: str) -> str:
    """Run the mutants of this setting, print the table, and return a message if tests or the list must be seen to."""
    if not any(chosen in str(mutant) for mutant in MUTANTS):
        return f"no mutant has {chosen!r} in its line"
    mutants = [x for x in MUTANTS if chosen in str(x) and x.interpreted == INTERPRET]
    began = time.monotonic()
    print(f"{len(mutants)} mutants, {'with' if INTERPRET else 'without'} Triton's interpreter", flush=True)
    for mutant in mutants:
        mutant.source()  # which fails where the list is stale
    os.environ["OMP_NUM_THREADS"] = "1"
    import_module("torch._dynamo")  # slow to import, and not tested: imported once, before the forks
    tasks: list[Task] = [(mutant, tests or mutant.tests) for mutant in mutants]
    folders = [*dict.fromkeys(folder for _, each in tasks for folder in each)]
    runner = Runner(tasks, folders)
    status = pytest.main([*OPTIONS, "-s", *folders], [runner])
    print(f"{time.monotonic() - began:.0f} s", flush=True)
    return f"pytest ends with {status!r}" if status else f"{runner.survived} survived" if runner.survived else ""


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) or 0)
