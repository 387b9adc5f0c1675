"""Proof of the tests: each mutant is one wrong place in a copy of the code, and some test must fail on it.

    python -m tests.mutants [FILTER]    # only the mutants whose line of the table has FILTER in it

One process imports PyTorch and forks for each mutant, whose tests run in the order in which they are expected to fail.
Kernels are run by Triton's interpreter, one program after the other: faults that only a GPU shows (barriers, streams,
caches) have no mutant here, nor have lines that no result depends on.
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from hashlib import sha256
from importlib import import_module
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
COPIED = ["fastreg", "kernels", "tests", "pyproject.toml"]
CORES, FORK = os.cpu_count() or 1, get_context("fork")
CHOSEN = "not repeats_bitwise"  # which take long, and other tests find the same faults
# file -> tests/test_*.py
TESTS = {
    "kernels/ar_tar.py": ["kernels", "plans", "prediction", "padding", "penalty", "dropout", "addition"],
    "kernels/steps.py": ["steps", "kernels"],
    "kernels/reduction.py": ["kernels", "coefficients", "padding", "penalty"],
    "kernels/tiling.py": ["kernels", "padding", "penalty", "axes", "sizes"],
    "fastreg/penalty.py": ["plans", "prediction", "coefficients", "padding", "penalty", "derivatives", "torch"],
    "fastreg/dropout.py": ["plans", "prediction", "padding", "dropout", "axes", "attachment", "derivatives"],
    "fastreg/rnn_dropout.py": ["coefficients", "rnn_dropout", "attachment", "dropout", "saved"],
    "fastreg/source.py": ["source", "attachment"],
    "fastreg/capture.py": ["capture", "in_backward", "attachment", "sequences"],
    "fastreg/addition.py": ["addition", "capture", "attachment"],
    "fastreg/carry.py": ["capture", "rnn_dropout", "regularizer", "in_backward", "coefficients", "attachment"],
    "fastreg/attachment.py": ["capture", "in_backward", "attachment", "rnn_dropout", "compiled_attach"],
    "fastreg/regularizer.py": ["regularizer", "rnn_dropout", "attachment", "capture"],
    "fastreg/reference.py": ["steps", "padding", "axes", "coefficients", "derivatives", "dropout", "penalty", "torch"],
    "fastreg/problem.py": ["padding", "axes", "coefficients", "derivatives", "penalty"],
    "fastreg/arguments.py": ["layout", "plans", "prediction", "padding", "penalty", "dropout"],
    "fastreg/view.py": ["view", "prediction", "axes", "penalty", "padding", "dropout", "torch"],
    "fastreg/plans.py": ["plans", "penalty", "coefficients", "torch"],
    "fastreg/operation.py": ["plans", "prediction", "coefficients", "addition", "capture"],
    "fastreg/prepare.py": ["layout", "steps", "plans", "padding", "axes", "penalty", "dropout", "prediction"],
    "fastreg/torch_state.py": ["capture", "in_backward", "coefficients", "penalty", "derivatives", "torch"],
    **{
        f"kernels/{name}": ["steps", "cpu", "coefficients", "prediction", "padding", "axes", "dropout", "penalty"]
        for name in ("cpu.cpp", "cpu_rows.h", "cpu_steps.h", "cpu_vectors.h", "cpu_work.h")
    },
    "kernels/cpu.py": ["prediction", "cpu", "penalty"],
}
# The tests of interpreted mutants outside of kernels/: few, as the interpreter is slow
INTERPRETED = {
    "fastreg/dropout.py": ["prediction", "dropout", "plans"],
    "fastreg/plans.py": ["coefficients", "plans"],
}

# file -> mutants: a function or class, the fault, a text that occurs there exactly once, and its replacement
CODE: dict[str, list[tuple[str, str, str, str]]] = {
    "kernels/ar_tar.py": [
        ("ar_tar_kernel", "halo row dropped", "raw_rows, tile.start - 1, edge, 0", "raw_rows, tile.start, edge, 1"),
        ("ar_tar_kernel", "halo row after dropped", "stop = time if AHEAD else", "stop = tile.stop if AHEAD else"),
        ("ar_tar_kernel", "leaving change off by one", "into[i + AHEAD]", "into[i]"),
        ("ar_tar_kernel", "the first change of a run left out", "tl.where(joined, first - last, 0.0)", "0 * first"),
        ("ar_tar_kernel", "sign of the change from a step flipped", "change_to - change)", "change_to + change)"),
        ("ar_tar_kernel", "AR left out where raw is dropped", "current if AR_OF_RAW else kept", "kept"),
        ("ar_tar_kernel", "AR left out of the gradient of raw", "tl.fma(ar_factor, current, own) if", "own if"),
        ("ar_tar_kernel", "alpha and beta exchanged", "own = ar_factor * kept", "own = tar_factor * kept"),
        ("ar_tar_kernel", "raw at dropped's time stride", "tile, raw_outer, raw_time", "tile, raw_outer, dropped_time"),
        ("ar_tar_kernel", "grad_raw at raw's stride", "grad_raw_outer, grad_raw_time,", "grad_raw_outer, raw_time,"),
        ("ar_tar_kernel", "mask at its outer stride", "mask_outer, mask_time,", "mask_outer, mask_outer,"),
        ("ar_tar_kernel", "what arrives at raw's stride", "arrived_outer, arrived_time,", "arrived_outer, raw_time,"),
        ("ar_tar_kernel", "padding not 0 where the factor is inf", "steps is not None:  # exactly", "False:  #"),
        ("ar_tar_kernel", "padding not 0 in the gradient of dropped", "steps is not None:  # as above", "False:"),
        ("ar_tar_kernel", "padding not filled", "gradient, inside[i])", "gradient, there[i])"),
        ("ar_tar_kernel", "padding not dropped out", "inside if DROPS else there, AHEAD", "there, AHEAD"),
        ("ar_tar_kernel", "padding counted in AR", "tl.where(there[i], squared, 0.0)", "squared"),
        ("ar_tar_kernel", "AR in padding", "tl.where(there[i], ar_factor * kept, 0.0)", "ar_factor * kept"),
        ("ar_tar_kernel", "only the first item of a program", "items, tl.num_programs(0))", "program + 1)"),
        ("ar_tar_kernel", "upstream gradient ignored", "came = tl.load(upstream)", "came = tl.full((), 1.0, ACC)"),
        ("ar_tar_kernel", "one program writes anew", "not differ(tl.load(records + program), came)", "program > 0"),
        ("ar_tar_kernel", "the assumption not recorded", "tl.store(records + program, assumed)", "pass"),
        ("ar_tar_kernel", "what is expected not kept", "tl.store(expected, came, mask=program == 0)", "pass"),
        ("ar_tar_kernel", "TAR of dropped", "                    last = raws[i]", "                    last = kept"),
        ("ar_tar_kernel", "AR of what is not rounded", "kept = kept.to(ACC)", "kept = current * keep"),
        ("ar_tar_kernel", "sign of what arrives flipped", "through = arriving[i] if", "through = -arriving[i] if"),
        ("ar_tar_kernel", "mask left out", "through * keep if mask is not None", "through if mask is not None"),
        ("ar_tar_kernel", "an infinite mask spoils TAR", "None or MASKED_AR:", "None or mask is not None:"),
        ("_launch", "a measured TAR has a gradient", "writes and terms.by_tar", "writes and terms.tar"),
        ("_launch", "scales exchanged", "in terms.divisors]", "in terms.divisors[::-1]]"),
        ("_read", "coefficients of numbers ignored", "(None, beta) if", "(None, 1.0) if"),
        ("_launch", "LOCKED always", "view.time == 1 or mask.time == 0", "True"),
        ("differ", "numbers compared, not bits", "x.to(BITS, bitcast=True) != y.to(BITS, bitcast=True)", "x != y"),
        ("Forward", "float64 summed in float32", "Tiling(view, terms.dtype)", "Tiling(view, torch.float32)"),
    ],
    "kernels/steps.py": [
        ("steps_kernel", "padding counts", "now &= step < length", "pass"),
        ("steps_kernel", "pairs with padding", "into = now & before", "into = before"),
        ("steps_kernel", "pairs with a step before that does not count", "valid + at - 1", "valid + at"),
        ("steps_kernel", "pairs of two sequences", "inside & (step > 0)", "inside"),
        ("steps_kernel", "changes into starts", "into &= tl.load(starts + at, mask=into, other=0) == 0", "pass"),
        ("steps_kernel", "lengths of the first sequence", "lengths + at // time", "lengths + 0 * at"),
        ("steps_kernel", "only the first steps", "range(begin, end, STEPS)", "range(begin, begin + STEPS, STEPS)"),
        ("steps_kernel", "shares that overlap", "tl.minimum(begin + share, total)", "total"),
        ("steps_kernel", "pairs in the place of steps", "partials + i * programs", "partials + programs"),
        ("Marker", "steps behind the last share", "ceil_div(ceil_div(total, programs), STEPS) * STEPS", "STEPS"),
    ],
    "kernels/reduction.py": [
        ("is_last", "ticket not put back", "tl.atomic_add(ticket, 0 - programs", "tl.atomic_add(ticket, 1"),
        ("is_last", "ticket set to 0", "atomic_add(ticket, 0 - programs", "atomic_xchg(ticket, 0"),
        ("is_last", "tickets from 0 alone", "+ 1) % programs == 0", "+ 1) == programs"),
        ("finish", "only the first chunk", "range(0, programs, CHUNK)", "range(0, CHUNK, CHUNK)"),
        ("finish", "last program's sums left out", "columns < programs", "columns < programs - 1"),
        ("finish", "float64 finished in float32", "dtype: tl.constexpr = ar.dtype", "dtype: tl.constexpr = tl.float32"),
        ("finish", "sign of beta flipped", "+ weighted(beta", "- weighted(beta"),
        ("weighted", "an infinite term of no weight", "coefficient == 0", "coefficient == -1"),
        ("coefficients", "coefficient in memory ignored", "weights.beta_at is not None", "False"),
        ("factors", "factor 2 missing in AR", "(2 * alpha * ", "(alpha * "),
        ("factors", "upstream gradient left out of TAR", "tar_factor * upstream", "tar_factor"),
        ("scales", "pairs as many as steps", "tl.load(weights.counts + 1)", "tl.load(weights.counts)"),
        ("scales", "steps for elements", "tl.load(weights.counts) * weights.hidden", "tl.load(weights.counts)"),
        ("one_over", "nothing divided by 0", "tl.maximum(count, 1)", "tl.maximum(count, 0)"),
    ],
    "kernels/tiling.py": [
        ("place", "one lane too few", "tl.cast(lanes, INDEX) * ALIGN", "tl.cast(lanes, INDEX) * ALIGN - 1"),
        ("place", "sequence in 32 bits", "tl.cast(lane // width, tl.int64)", "lane // width"),
        ("mark", "the first step is paired", "counts & within(tile, 0, step) if FIRST else counts", "counts"),
        ("mark", "changes where steps count", "(loaded & 2) != 0", "(loaded & 1) != 0"),
        ("mark", "marks of the first sequence", "sequence * marks.time", "0 * sequence"),
        ("mark", "packed sequences that go on", "packed[i + 1] - packed[i]", "packed[1] - packed[0]"),
        ("mark_turn", "marks of one step alone", "turn + i, packed", "turn + 1, packed"),
        ("begins", "rows of the step before", "tl.maximum(step + i, 0)", "tl.maximum(step + i - 1, 0)"),
        ("row_behind", "rows of one step alone", "(behind * rows.ALIGN)", "rows.ALIGN"),
        ("within", "one step too few", ") < stop", ") < stop - 1"),
        ("load_row", "computed in the input's dtype", "other=0.0).to(ACC)", "other=0.0)"),
        ("Tiling", "ALIGN of inner alone", "16, inner, *strides)", "16, inner)"),
        ("Tiling", "runs as long as they come", "max(runs, ceil_div(time, LONGEST_RUN))", "max(runs, 1)"),
        ("Tiling", "INDEX always 32 bits", "tl.int64 if outer", "tl.int32 if outer"),
    ],
    "kernels/cpu_rows.h": [
        ("over_lanes", "the rest of a row left out", "if (rest == 0) break;", "if (rest <= 1) break;"),
        ("over_lanes", "summed in float32 from row to row", "double ar = 0, tar = 0;", "float ar = 0, tar = 0;"),
        ("over_lanes", "summed in float32 over a whole row", "CHUNK = 64 * STEP", "CHUNK = 1 << 30"),
        ("over_lanes", "half of the sums left out", "STEP / 2; left;", "STEP / 2; left > 1;"),
        ("Tail", "no zeros behind the end of a row", "std::memset(to, 0, step);", ""),
        ("Tail", "the end of a gradient is not written", "if (out) std::memcpy(out, written, bytes);", ""),
        ("formula", "sign of the change from a step flipped", "(arriving - leaving)", "(arriving + leaving)"),
        ("formula", "AR of raw left out of the gradient", "? gradient + value * ar_factor :", "? gradient :"),
        ("formula", "dropped not rounded", "rounded<A, T>(value * keep)", "(value * keep)"),
        ("formula", "an infinite mask spoils TAR", "if (flags & MASKED && (flags & ARRIVED || masked_ar)) through",
         "if (flags & MASKED) gradient += through * keep; if (flags & MASKED) through"),
        ("formula", "AR of dropped for that of raw", "if (flags & AR_OF_RAW) kept = value;", ""),
        ("formula", "sign of what arrives flipped", "is_own ? through + gradient :", "is_own ? gradient - through :"),
        ("RowCode", "the first row is among others", "GRAD_TAR) && rows.previous)", "GRAD_TAR))"),
    ],
    "kernels/cpu_work.h": [
        ("along_time", "padding not filled", "!state.counts && !fill", "!state.counts"),
        ("along_time", "padding beside other sequences not filled", "if (span.counts || fill)", "if (span.counts)"),
        ("visit", "vectors streamed to any address", "bits_of<std::uintptr_t>(to) % ALIGNED == 0", "true"),
        ("Tiling", "last lanes left out", "ceil_div(sizes.inner, BLOCK)", "std::max<int64_t>(sizes.inner / BLOCK, 1)"),
    ],
    "kernels/cpu_steps.h": [
        ("mark_sequence", "lengths not clamped", "std::clamp<int64_t>(length, 0, time)", "std::min(length, time)"),
        ("mark_sequence", "lengths beyond the last step", "clamp<int64_t>(length, 0, time)", "max<int64_t>(length, 0)"),
        ("mark_sequence", "only bytes of 1 are marks", "valid[step] != 0", "valid[step] == 1"),
        ("mark_sequence", "changes into starts", "!(starts && starts[step])", "1"),
        ("mark_sequence", "steps before that do not count are paired", "steps[step] & steps[step - 1]", "steps[step]"),
        ("mark_sequence", "the last step is not paired", "step = length - 1; step > 0", "step = length - 2; step > 0"),
        ("mark_sequence", "pairs as many as steps", "counts[1] += steps[step] >> 1;", "counts[1] += steps[step] & 1;"),
        ("Counted", "no mean of no elements", "[1] * sizes.inner, 1)", "[1] * sizes.inner, 0)"),
        ("Counted", "sequences beside each other all alike", " && state(tile.sequence + past, step) == found", ""),
        ("Counted", "sequences of a tile all alike", "state(i, step) == found.state ?", "true ?"),
        ("Counted", "padded sequences that never grow", "offsets ? std::max", "true ? std::max"),
        ("Counted", "the first step is among others", "!now.state.arrives || !now.state.leaves", "false"),
        ("Counted", "the last step is among others", "sizes.time)) - 1, now.stop)", "sizes.time)), now.stop)"),
        ("Counted", "a packed sequence goes on past its end", "step < stop && sequence < size(step)", "step < stop"),
        ("Counted", "packed rows that no sequence has", "offsets && sequence >= size(step)", "false"),
        ("Counted", "eight steps compared as one", "if (eight != same) break;", "if ((eight ^ same) & 0xff) break;"),
        ("Counted", "a sequence that a tile begins with left out", "+ tile.lane /", "+ (tile.lane + tile.lanes - 1) /"),
        ("Counted", "sequences apart taken for neighbours", "strides.outer != sizes.inner", "false"),
    ],
    "kernels/cpu_vectors.h": [
        ("rounded", "ties away from even", "bits + 0x7fff + (bits >> 16 & 1);", "bits + 0x8000;"),
        ("rounded", "NaN rounded to infinity", "value == value ? ordered : 0x7e00", "ordered"),
        ("write", "dropped as it was before rounding", "bits_of<Vector<float>>(first & UPPER)", "x.first"),
        ("floats", "subnormal numbers taken for normal ones", "magnitude < 0x400 ?", "magnitude < 0 ?"),
    ],
    "kernels/cpu.cpp": [
        ("backward", "compared in part", "memory->upstream, bytes_of(plan->compute_dtype))", "memory->upstream, 2)"),
        ("walk", "padding of dropout has the terms' gradient", "always, by)", "always | terms, by)"),
        ("factors", "factor 2 missing", "(2 * memory.beta /", "(memory.beta /"),
        ("factors", "a NaN of any bits", 'return x == x ? x : std::nan("");', "return x;"),
        ("weighted", "an infinite term of no weight", "coefficient == 0 ? 0 :", ""),
        ("finish", "terms exchanged", "store(memory.terms, 0, ar, dtype);", "store(memory.terms, 0, tar, dtype);"),
    ],
    "kernels/cpu.py": [
        ("runnable", "the processor is not asked", "min(_allowed_level(), processor_level())", "_allowed_level()"),
        ("runnable", "PyTorch is not asked", "min(_allowed_level(), processor_level())", "processor_level()"),
        ("Expected", "the prediction changed in place", "upstream.detach().clone()", "self.gradient.copy_(upstream)"),
        ("_plan", "a measured AR has a gradient", "else (terms.by_ar,", "else (terms.ar,"),
        ("Forward", "coefficients exchanged", "alpha, beta, steps = values", "beta, alpha, steps = values"),
        ("Backward", "coefficients exchanged", "alpha, beta, steps = values", "beta, alpha, steps = values"),
        ("Expected", "the prediction is the user's tensor", "upstream.detach().clone()", "upstream.detach()"),
    ],
    "fastreg/penalty.py": [
        ("by_formula", "the formula's terms not detached", "ar.detach(), tar.detach()", "ar, tar"),
        ("launched", "the first layer alone", "else penalty + sums.penalty", "else penalty"),
        ("Layer", "a measured term has a gradient", "terms.by_tar or (terms.by_ar and terms.ar_of_raw)", "True"),
        ("Layer", "gradients where there are none", "torch.is_grad_enabled()", "True"),
        ("Layer", "gradients ahead where memory is low", "written if fills else (None, None)", "written"),
        ("PenaltyPlan", "one tensor is read twice", " or dropped is raw:", ":"),
        ("PenaltyPlan", "a decorated tensor beside kernels", "[plain(x) for", "[x for"),
        ("PenaltyPlan", "activations that no term reads", "raw if by_tar else None", "raw"),
        ("_Penalty", "a layer without gradients by the formula", "True in layer.needs", "True"),
        ("_Penalty", "zeros for the terms' gradients", "set_materialize_grads(False)", "set_materialize_grads(True)"),
        ("_Penalty", "raw always saved", "x if need else None for x, need", "x for x, need"),
        ("_Penalty", "the buffers handed out twice", 'vars(ctx).pop("ahead",', 'vars(ctx).get("ahead",'),
        ("_Penalty", "the tensors of the first layer", "grad, raw, dropped, values", "grad, *saved[:2], values"),
    ],
    "fastreg/view.py": [
        ("Fold", "order of axes kept anyway", "found = self._readable(torch.empty_like(_meta(x)))",
         "found = torch.empty_like(_meta(x))"),
        ("Fold", "axes with gaps", "pairwise([*inner, -1])", "pairwise(inner)"),
        ("Fold", "all read as it lies", "self._read if self.copies else tuple", "tuple"),
        ("Fold", "a repeated time step copied again and again", "if x.stride(self.time) == 0:", "if False:"),
        ("Fold", "outer stride for time", "stride[self.rows], stride[self.time]", "*[stride[self.rows]] * 2"),
        ("Fold", "rows at the stride of time", "(self.time, *outer)[-1]", "self.time"),
        ("Fold", "sequences folded where not all of their steps count", "return not self.is_whole and",
         "return False and"),
        ("Fold", "few steps in a row read as they lie", "self.shape[self.time] >= NARROW", "True"),
        ("Fold", "steps apart read as they lie", "max([stride[self.time] for stride in strides]) <= 1", "True"),
        ("Fold", "all copied", "copies = sum([not self._fits(stride, cut) for stride in strides])", "copies = 0"),
        ("Fold", "always one sequence", "{x.outer for x in operands if x is not None} == {inner}", "True"),
    ],
    "fastreg/torch_state.py": [
        ("level_of_caller", "a warning of our own line", "in (\"fastreg\", \"torch\")", "in ()"),
        ("untraced", "Dynamo compiles in hooks", "return _outside(run, function, args)", "return function(*args)"),
        ("observed", "never", "return (", "return False and ("),
        ("observed", "under dispatch modes", "_count_modes() > 0", "False"),
        ("observed", "under forward mode", "forward_ad._current_level >= 0", "False"),
        ("keepable", "inference tensors kept", "return x.clone()", "return x"),
    ],
    "fastreg/arguments.py": [
        ("_expect", "errors of values alone", "raise error(", "raise ValueError("),
        ("check_range", "lengths or marks that are too large", " or greatest > most", ""),
        ("check_range", "lengths or marks below 0", "least < 0 or", "False or"),
        ("check_range", "marks as large as lengths", 'else (1, "0 or 1")', 'else (time, "0 or 1")'),
        ("_check_batch_sizes", "sizes below 1", "min(values, default=0) > 0", "True"),
        ("_check_batch_sizes", "sizes that grow", " and values == sorted(values)[::-1]", ""),
        ("check_layer", "layers of other sizes", "sizes_of(x, time_dim) == sizes_of(y, time_dim)", "True"),
        ("_check_packed_alike", "other batch sizes", "not sizes.equal(others)", "False"),
        ("check_packed_options", "any axis of packed rows", "time_dim in (None, 0, -2)", "True"),
        ("_check_axes", "an axis too far", "-dims <= time_dim < dims", "-dims <= time_dim <= dims"),
        ("check_steps_of", "one row of marks for all sequences", " and axes_of(x, time_dim)[1] is None", ""),
        ("check_time", "a flag for an axis", " and not isinstance(time_dim, bool)", ""),
        ("check_saved", "another dtype in the backward", '"shape", "dtype", "device"', '"shape", "device"'),
    ],
    "fastreg/prepare.py": [
        ("Plan", "AR of dropped, which is raw", "options.ar_of_raw or bool(is_same)", "options.ar_of_raw"),
        ("Plan", "hooks on saved tensors", " and not keeps_memory_low()", ""),
        ("Plan", "mixed lists in float32", "for layer in layers for x", "for layer in layers[:1] for x"),
        ("Plan", "an axis from the front", "place.axis() % x.dim() - x.dim(), arg", "-2, arg"),
        ("Plan", "layers that are not checked", "arguments.check_layer(", "str("),
        ("_offsets", "batch sizes are checked once", "packed, _ = arguments.check_layers(raw, dropped, Place())",
         "packed = next(y for x in tensors[:2] for y in (x if is_list(x) else [x]))"),
        ("_brought", "lengths with gaps to the kernels", "non_blocking=True).contiguous()", "non_blocking=True)"),
        ("_brought", "pinned memory that the caller refills", "elif given.is_pinned()", "elif False"),
        ("_steps", "sums divided", 'counts if reduction == "mean" else None', "counts"),
        ("_brought", "marks with gaps to the kernels", "return given.contiguous()", "return given"),
        ("_offsets", "batch sizes in few bits", "long().cumsum(0)", "cumsum(0, dtype=packed.batch_sizes.dtype)"),
    ],
    "fastreg/plans.py": [
        ("facts_of", "no shape", "facts += x.shape, x.stride()", "facts += x.dim(), x.stride()"),
        ("facts_of", "no strides", "x.shape, x.stride(), x.dtype", "x.shape, 0, x.dtype"),
        ("facts_of", "no dtype", "x.stride(), x.dtype, x.device", "x.stride(), 0, x.device"),
        ("facts_of", "no alignment", "address % 16 == 0, ", "0, "),
        ("facts_of", "whether a gradient is needed left out", "% 16 == 0, x.requires_grad", "% 16 == 0, 0"),
        ("facts_of", "tensors that are no memory", "(address := x.data_ptr())", "((address := x.data_ptr()) or True)"),
        ("facts_of", "a negated tensor to the kernels", " and not x.is_neg()", ""),
        ("facts_of", "a coefficient of 0 like another", "(x != 0,)", "(True,)"),
        ("facts_of_other", "no number of sequences", "view(-1)[:1].tolist()", "view(-1)[:0].tolist()"),
        ("facts_of_other", "no number of time steps", "x[:2]", "x[:1]"),
        ("facts_of", "kernels: no dtype of numbers", "x.dtype, x.device", "x.dtype if x.dim() else 0, x.device"),
        ("keep", "plans without end", "len(PLANS) >= SIZE", "False"),
    ],
    "fastreg/operation.py": [
        ("compute", "coefficients of any value", "and 0 <= alpha < inf and 0 <= beta < inf", ""),
        ("compute", "layers that are the same or not", "else are_same(first, second)", "else 0"),
        ("compute", "no options", "*options, *map", "*map"),
        ("compute", "True is 1", ", *map(type, options)", ""),
        ("compute", "no grad mode", "torch.is_grad_enabled(), ", ""),
        ("compute", "no hooks on saved tensors", "hooks_on_saved(False) is None, ", ""),
        ("save", "coefficients in memory not saved", "[x if isinstance(x, Tensor) else None for", "[None for"),
        ("unpack", "no double backward", "torch.is_grad_enabled() or ", ""),
        ("unpack", "batched gradients not left to the formula", "(*tensors, *upstream)", "tensors"),
        ("unpack", "what hooks have changed", "if facts[: len(plan.saved)] != plan.saved:", "if False:"),
        ("restored", "another shape in the backward", "check_saved(name, before, x)", "pass"),
        ("restored", "another layout in the backward", "layout_of(x) == before:", "True:"),
        ("restored", "a repeated step copied as many", "if stride == 0:", "if False:"),
    ],
    "fastreg/dropout.py": [
        ("drop_and_penalize", "a mask with p of 0 ignored", "(mask is None and p == 0)", "p == 0"),
        ("drop_and_penalize", "dropped in evaluation", "not training or (", "("),
        ("DropoutPlan", "one backward for all", "self.backward.get(key)", "next(iter(self.backward.values()), None)"),
        ("DropoutPlan", "kernels: the penalty's gradient where there is none", "grad is not None else", "True else"),
        ("_DropoutPenalty", "mask and raw swapped", "saved[0], saved[1], values", "saved[1], saved[0], values"),
        ("_DropoutPenalty", "zeros where there is no gradient", "grads(False)", "grads(True)"),
        ("_DropoutPenalty", "terms differentiable", "ctx.mark_non_differentiable(results[2])", "pass"),
        ("_gradient_formula", "mask left out", "else through_mask * mask, direct", "else through_mask, direct"),
    ],
    "fastreg/rnn_dropout.py": [
        ("FusedRNNDropout", "recomputation leaves a penalty", "torch._C._current_graph_task_id() == -1", "True"),
        ("FusedRNNDropout", "evaluation leaves the last penalty", "self.formed, None,", "self.formed, self.formed,"),
        ("FusedRNNDropout", "penalty in copies", '"formed": None, ', ""),
        ("FusedRNNDropout", "modules that 0.2.0 saved", "time_dim = formed = loan", "time_dim = loan"),
        ("FusedRNNDropout", "AR of raw ignored", 'self.ar_of == "raw"\n', "False\n"),
        ("FusedRNNDropout", "p of the call ignored", "self.p if p is None else p", "self.p"),
        ("FusedRNNDropout", "a penalty of another input", " or loan.raw is not raw", ""),
        ("FusedRNNDropout", "a penalty without a gradient warns", " and untaken.terms.penalty.requires_grad", ""),
        ("FusedRNNDropout", "a warning comes again", "self._warned = (*self._warned, message)", "pass"),
    ],
    "fastreg/attachment.py": [
        ("Hooked", "hooks stay", "hook.handle.remove()", "pass"),
        ("Hooked", "hooks that run on in a forward", "hook.function = nothing", "pass"),
        ("Hooked", "hooks that Dynamo does not see", 'vars(module).setdefault("forward", module.forward)', "None"),
        ("Hooked", "the forward of another module", "if module is not self.module or (", "if False and ("),
        ("Hooked", "the forward stays", "del self.module.forward", "pass"),
        ("Hooked", "a forward of others goes", "own == MethodType(type(module).forward, module)", "True"),
        ("Hooked", "runs of replicas", 'REPLICA if "_is_replica" in vars(module)', "SHARED if True"),
        ("Hooked", "hooks before those added later", "hooks.move_to_end(own)", "pass"),
        ("Hook", "copied hooks", 'getattr, (nullcontext(self.handle), "__exit__")', "object.__reduce_ex__(self, 4)"),
        ("Hook", "ids of hooks in a pickle", "nullcontext(self.handle)", "nullcontext()"),
        ("Attachment", "runs in a backward", "if current() != -1 and source.scale is None:", "if False:"),
        ("Attachment", "reentrant recomputation", "if current() != -1 and source.scale is None", "if current() != -1"),
        ("Attachment", "a dropout that a recomputation runs", "(current() != -1 and run.grad_enabled)", "False"),
        ("Attachment", "terms of a recomputation", "if current() == -1:", "if True:"),
        ("Attachment", "all runs under a transform but one", "if self._unmarked > 1 and", "if False and"),
        ("Attachment", "in_backward under a transform", "if not marked and isinstance(run.guard, Always)", "if False"),
        ("Attachment", "a dropout of the same raw", "if run.dropped is not None and not (", "if False and not ("),
        ("Attachment", "runs under a dispatch mode", "not transformed()", "not observed()"),
        ("Attachment", "runs in evaluation", "if not module.training or", "if"),
        ("Attachment", "runs of another step", " if run in reached]", "]"),
        ("Attachment", "the latest run beside the loss's", "reached and latest.carriers and latest.marked", "False"),
        ("Attachment", "inputs taken for outputs", "and id(x) not in inputs]", "]"),
        ("Attachment", "raw closes a circle", "None if x.grad_fn in before else rows", "rows"),
        ("Attachment", "raw is not kept for a state", "None if x.grad_fn in before else rows", "None"),
        ("Attachment", "raw is not held for a state before it", "self._held += run, rows", "pass"),
        ("Attachment", "a loan of packed memory", " and not keeps_memory_low()", ""),
        ("Attachment", "a loan of another layout", "lends and is_same and", "lends and"),
        ("Attachment", "steps that do not count, in a dropout",
         "beta, run.valid, run.starts)", "beta, None, run.starts)"),
        ("Attachment", "starts, in a dropout", "beta, run.valid, run.starts)", "beta, run.valid, None)"),
        ("Attachment", "steps that a dropout gets itself",
         '_argument(args, kwargs, 2, "valid", run.valid)', "run.valid"),
        ("Attachment", "starts that a dropout gets itself",
         '_argument(args, kwargs, 3, "starts", run.starts)', "run.starts"),
        ("Attachment", "an attached dropout warns", "fused.formed = None", "pass"),
        ("Attachment", "penalty of packed rows", "(run.packed is run.raw.axis is None)", "(run.raw.axis is None)"),
        ("Attachment", "penalty of one time step", "(run.packed is run.raw.axis is None)", "(run.packed is None)"),
        ("Attachment", "AR of raw ignored", 'fused.ar_of == "raw"', "False"),
        ("Attachment", "runs without gradients", "not run.grad_enabled", "False"),
        ("Attachment", "dropout without gradients", "run.grad_enabled &= torch.is_grad_enabled()", "pass"),
        ("Attachment", "steps that are not joined", "and not self.source.stepwise and all", "and False and all"),
        ("Attachment", "the axis of a time step", "1 if rows.dim() == 2 and source.place.batch_first else 0", "0"),
        ("_tensors", "a structure that contains itself", "elif id(x) not in seen:", "else:"),
        ("_tensors", "fields that are not set", "getattr(x, field.name, None)", "getattr(x, field.name)"),
    ],
    "fastreg/capture.py": [
        ("Joined", "all parts of a joined gradient are the first", "part.__add__, part", "parts[0].__add__, part"),
        ("Joined", "detached parts", "all([x.requires_grad for x in found])", "False"),
        ("Captured", "a step without an axis of time", "add if axis is None else", "add if True else"),
        ("Captured", "gradients of a backward that failed", "self.due.pop(task, None)", "pass"),
        ("Captured", "one term alone at a tensor", "own(before(x))", "own(x)"),
        ("Mark", "hooks of others first", "if hooks is not None and len(hooks) > 1:", "if False:"),
        ("Mark", "no gradient to add to", "        if gradient is None:", "        if False:"),
        ("Mark", "gradients of a backward that failed",
         "self.captured.due.pop(current(), None)", "next(iter(self.captured.due.values()), None)"),
        ("Run", "changes in place", "if self.changed:", "if False:"),
        ("search", "any output of a node", "mark.number == number and ", ""),
        ("search", "a taken run counts again", " and mark.run in wanted", ""),
        ("search", "missed runs are waited for", " if not run.missed] or runs", "]"),
        ("search", "missed runs are not found", " or runs for x", " for x"),
        ("search", "runs that are passed over", "if run.missed]", "if False]"),
        ("Watch", "runs that are passed over", "if run.refused == task:", "if False:"),
        ("Watch", "a warning of the first backward", "if self.task is not None:", "if True:"),
        ("Watch", "a warning comes again", "            self.content = True", "            pass"),
        ("Watch", "a warning within one backward", " or self.task == task:", ":"),
        ("_marks_of_leaf", "leaves are not found", " or {}", " and {}"),
        ("nodes_before", "a node is not before itself", "set(), [node]", "set(), [x for x, _ in node.next_functions]"),
    ],
    "fastreg/carry.py": [
        ("_joined_marks", "marks of the steps of another run", "if tuple(x.shape) != shape:", "if False:"),
        ("penalty_of_runs", "joined runs held by the loss", "run.drop()  #", "pass  #"),
        ("_Carry", "runs that are passed over", "run.refused = task", "pass"),
        ("_Carry", "a penalty that is in no backward", "ctx.watch.content = True", "pass"),
        ("Always", "a gradient that is None", "if captured is None or gradient is None:", "if captured is None:"),
        ("_joined", "second derivatives of joined runs", "x.hooked and not x.tensor().requires_grad", "x.hooked"),
        ("Always", "a forward that is wrong",
         "if (fault := run.fault) is not None:\n            raise", "if False:\n            raise"),
        ("Always", "a run that is wrong", "return fault\n", "pass\n"),
        ("Always", "activations that were freed", "if run.raw.data is EMPTY:", "if False:"),
        ("Always", "activations stay", "run.drop()", "pass"),
        ("Always", "activations of dropped are freed first", "(captured is run.raw or not run.raw.needs)", "True"),
        ("Term", "changes of coefficients", "version_of(x) != version", "False"),
        ("Always", "second derivatives", "if torch.is_grad_enabled():", "if False:"),
        ("Always", "a loss of raw alone", "and self.tasks.get(squared) != task:", "and False:"),
        ("Always", "a dropout without AR is waited for", "and squared in self.terms and", "and"),
        ("Always", "runs of one time step", "if run.steps == 1:", "if False:"),
        ("Always", "one run of one time step", "before[:1] == (task,) and before[1]() is not run", "True"),
        ("Always", "a loss of the state alone", "if raw not in self.tasks:", "if False:"),
        ("Always", "the gradient of a state alone", "if following and not any", "if False and not any"),
        ("Step", "a sum that nothing may change in place", "if adds and type(loss) is not Tensor:", "if False:"),
        ("_Carry", "the upstream gradient of the loss itself", "own = upstream.clone()", "own = upstream"),
        ("_Carry", "the penalty is not added", "return loss + penalty if adds", "return loss.clone() if adds"),
        ("_Carry", "no gradient passes to the loss",
         "return None, grad, upstream, None", "return None, None, upstream, None"),
        ("_Carry", "no gradient passes to the penalty of a dropout",
         "return None, grad, upstream, None", "return None, grad, None, None"),
        ("_Carry", "no gradient passes for the penalty alone",
         "torch.zeros(shape, dtype=dtype, device=device)", "None"),
        ("_Carry", "second derivatives without a graph",
         "raw if torch.is_grad_enabled() else raw.detach()", "raw.detach()"),
        ("_of_dropout", "a penalty of other coefficients", " if run.fused.coefficients == coefficients else None", ""),
        ("_additions", "AR's gradient with TAR's", "(True, False, tar)", "(True, ar, tar)"),
        ("_joined_marks", "steps of a run without marks", "None else x for x, shape", "None else ~x for x, shape"),
    ],
    "fastreg/addition.py": [
        ("Addition", "derivatives of freed activations", "not call.raw.requires_grad", "False"),
        ("Addition", "the first strides", "self.backwards.get(layout)", "next(iter(self.backwards.values()), None)"),
        ("Addition", "the strides of saved activations", 'restored("raw", raw, self.layout)', "raw"),
        ("Addition", "an upstream gradient of another dtype", "if upstream.dtype != self.kind.dtype or", "if"),
    ],
    "fastreg/source.py": [
        ("Source", "one time step taken for a sequence", "raw.dim() == 2", "False"),
        ("Source", "raw not picked", "self.output(result)", "result"),
        ("Source", "modules detached at once", "return attached.pop_all()", "pass\n            return attached"),
        ("layout_of", "layout of the module ignored", "return own", "return True"),
        ("layout_of", "layout of what is inside ignored", "all(x.batch_first for x in inner) and", "True and"),
        ("layout_of", "a layout for what is inside", "if all(x.batch", "if default or all(x.batch"),
        ("Source", "a dropout of another layout", "self.dropout.place() != place", "False"),
        ("Source", "a dropout left in training", "own.train(fused.training)", "own"),
    ],
    "fastreg/regularizer.py": [
        ("RNNRegularizer", "first layer for last", "raw[-1], dropped[-1]", "raw[0], dropped[0]"),
        ("RNNRegularizer", "first attachment for last", "is self._attached[-1]", "is self._attached[0]"),
        ("RNNRegularizer", "batch first always", "Given(raw, dropped, place,", "Given(raw, dropped, Place(),"),
        ("RNNRegularizer", "captures stay", "attachment.settle(taken.get(attachment, ()))", "pass"),
        ("RNNRegularizer", "clear leaves hooks' captures", "            attachment.clear()", "            pass"),
        ("RNNRegularizer", "captures in copies", '"_given": None, ', ""),
        ("RNNRegularizer", "removed attachment counts", "self._attached.remove(attachment)", "pass"),
        ("_check_layout", "steps of one sequence for a batch", " and batch != 1", ""),
        ("_check_layout", "a layout that is right refused", "if batch == time:", "if False:"),
        ("_check_layout", "decoded of the other layout", "batch_first is None and (", "False and ("),
        ("_check_layout", "a stated layout refused", "batch_first is None and (", "True and ("),
        ("_scaled_lr", "lr not restored", 'group["lr"] = lr', "pass"),
        ("_scaled_lr", "tensor not restored", "lr.copy_(value)", "pass"),
    ],
    "fastreg/problem.py": [
        ("divisors", "pairs as many as steps", "(time - 1))", "time)"),
        ("divisors", "nothing divided by 0", "_at_least_1(x.shape[call.kind.time_dim])", "x.shape[call.kind.time_dim]"),
        ("divisors", "elements of the last axis alone", "elements // _at_least_1(marks.numel())", "x.shape[-1]"),
        ("axes_of", "sequences without an axis", "1 if len(x.shape) > 2 else None", "None"),
        ("terms_of", "a measured term has a gradient", "is_on(call.alpha), is_on(call.beta), call", "True, True, call"),
        ("terms_of", "divisors exchanged", "(int(elements), int(pairs))", "(int(pairs), int(elements))"),
    ],
    "fastreg/reference.py": [
        ("neighbours", "a sequence goes on past its end", "after < ends", "after <= ends"),
        ("neighbours", "before by the size of the same step", "(step - 1).clamp(min=0)", "step"),
        ("_counted_changes", "TAR across all sequences", "dim=call.kind.time_dim", "dim=0"),
        ("_counted_changes", "2 steps are special in an export", " and not is_exporting()", ""),
        ("changes", "TAR across sequences", "x.roll(1, dim)", "x.roll(1, 0)"),
        ("changes", "changes where steps count", "(change, call, CHANGE)", "(change, call)"),
        ("marked", "starts ignored", "into & ~starts", "into"),
        ("marked", "pairs with a step that does not count", "counts & counts.roll(1, 1)", "counts"),
        ("marked", "a change into the first step from the last", " & (step > 0)", ""),
        ("marked", "lengths ignored beside valid", "counts & (step < lengths", "(step < lengths"),
        ("counted", "marks across sequences", "else counts.transpose(0, 1)", "else counts"),
        ("ar_tar_gradients", "halves subtracted in half", "_inputs(call, grad.dtype)", "(call.raw, call.dropped)"),
        ("ar_tar_gradients", "factor 2 missing in TAR", "2 * _factor(call.beta", "_factor(call.beta"),
        ("ar_tar_gradients", "grad ignored in AR", "of_ar = counted(grad * (", "of_ar = counted(("),
    ],
}  # fmt: skip


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
    def tests(self) -> list[str]:
        """The names of the test files, one of whose tests must fail."""
        return INTERPRETED.get(self.file, TESTS[self.file]) if self.interpreted else TESTS[self.file]

    def source(self) -> str:
        """The whole file with the wrong place in it."""
        text = part = (ROOT / self.file).read_text()
        if self.file.endswith(".py"):
            (part,) = re.findall(rf"(?ms)^(?:def|class) {self.where}\b.*?(?=\n\n\n|\Z)", text)
        if part.count(self.old) != 1:
            raise LookupError(f"{self}: expected {self.old!r} once, found {part.count(self.old)} times")
        return text.replace(part, part.replace(self.old, self.new))


MUTANTS = [Mutant(file, *mutant) for file, mutants in CODE.items() for mutant in mutants]


def build(kernels: Path) -> None:
    """Build the C++ kernels in a copy, quickly, without the libraries of the unchanged code."""
    for library in kernels.glob("*.so"):
        library.unlink()
    sources = b"".join(file.read_bytes() for file in (kernels / "cpu.cpp", *sorted(kernels.glob("cpu_*.h"))))
    options = ["-std=c++17", "-O1", "-w", "-fopenmp", "-ffp-contract=off", "-fvisibility=hidden", "-shared", "-fPIC"]
    options.append(f"-DSOURCES=0x{sha256(sources).hexdigest()[:16]}")  # as in setup.py
    subprocess.run(["g++", *options, "cpu.cpp", "-o", "_cpu.abi3.so"], cwd=kernels, check=True)


class Order:
    """A plugin of pytest: the tests run first that fail fastest on a mutant, by the time and the failures of each."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.failed = ""  # the first test that failed in this process

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Sort the tests by the time that a failure of each is expected to take."""
        items.sort(key=lambda item: self.seconds[item.nodeid] / (0.01 + self.failures[item.nodeid]))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record the time of a test, and whether it is the first that failed."""
        self.seconds[report.nodeid] += report.duration
        self.failed = self.failed or report.nodeid * report.failed


class Job:
    """Tests that run on a mutant, or on the unchanged code, in a process and a copy of the checkout of their own."""

    def __init__(self, names: list[str], mutant: Mutant | None, order: Order):
        self.names, self.mutant = [f"tests/test_{name}.py" for name in names], mutant
        usual = sum(seconds for test, seconds in order.seconds.items() if test.startswith(tuple(self.names)))
        self.ends = math.inf if mutant is None else time.monotonic() + 120 + 10 * usual
        self.copy = tempfile.TemporaryDirectory()
        subprocess.run(["cp", "-a", *(ROOT / name for name in COPIED), self.copy.name], check=True)
        self.process = FORK.Process(target=self.run, args=(order,))
        self.process.start()

    def run(self, order: Order) -> None:
        """Run the tests in the copy, and write the first failure and the time of each test there."""
        os.setsid()  # the processes that tests start end with this one
        os.chdir(copy := self.copy.name)
        sys.path[0] = copy
        del sys.modules["tests"]  # that of the checkout
        options = ["-x", "-q", "--tb=short", "-p", "no:cacheprovider", "-k", CHOSEN]
        options += ["-W", "error:fastreg runs the plain formula on CPUs"]  # else an old library would hide a mutant
        with Path("output").open("w") as output, redirect_stdout(output), redirect_stderr(output):
            if self.mutant is not None:
                if not self.mutant.interpreted:  # a search without end fills 4 GB; interpreted tests reserve more
                    resource.setrlimit(resource.RLIMIT_DATA, (2**32, 2**32))
                Path(self.mutant.file).write_text(self.mutant.source())
                if self.mutant.file.endswith((".cpp", ".h")):
                    build(Path(copy, "kernels"))
            status = pytest.main([*options, *self.names], [order])
        failed = "the import of a test" if status == pytest.ExitCode.INTERRUPTED else order.failed
        if status == pytest.ExitCode.OK or failed:
            Path("outcome").write_text(json.dumps([failed, order.seconds]))
        os._exit(0)  # without waiting for threads of tests

    def outcome(self) -> tuple[str, dict[str, float]]:
        """End the process; return the first failure, or "" if all tests passed, and the time of each test."""
        status = self.process.exitcode
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        with self.copy as copy:
            if Path(copy, "outcome").exists():
                return tuple(json.loads(Path(copy, "outcome").read_text()))
            if status is None or status < 0:
                return "hanging" if status is None else f"a crash with signal {-status}", {}
            raise RuntimeError(f"{self.names}, {self.mutant}: {Path(copy, 'output').read_text()[-3000:]}")


def run_all(jobs: Iterable[tuple[list[str], Mutant | None]], order: Order) -> Iterator[tuple[Mutant | None, str]]:
    """Run a job on each core at a time; return each mutant with the first failure, or with "" if all tests passed."""
    waiting, running = iter(jobs), []
    while running := [*running, *(Job(*job, order) for job in islice(waiting, CORES - len(running)))]:
        wait([job.process.sentinel for job in running], timeout=5)
        for job in [x for x in running if x.process.exitcode is not None or time.monotonic() > x.ends]:
            running.remove(job)
            failed, seconds = job.outcome()
            if job.mutant is None:
                order.seconds |= Counter(seconds)
            order.failures[failed] += 1
            yield job.mutant, failed.removeprefix("tests/")


def run_mutants(mutants: list[Mutant], interpret: bool) -> None:
    """Run mutants by the kernels' interpreter or without, and print the table; exit with a message about survivors."""
    os.environ |= {"TRITON_INTERPRET": str(int(interpret)), "OMP_NUM_THREADS": "1"}
    import_module("torch._dynamo")  # slow to import, and not tested: imported once, before the forks
    order, began = Order(), time.monotonic()
    names = sorted({name for mutant in mutants for name in mutant.tests})
    if failed := [test for _, test in run_all([([name], None) for name in names], order) if test]:
        sys.exit(f"the code as it is fails: {', '.join(failed)}")
    print(f"the code as it is passes, {time.monotonic() - began:.0f} s", flush=True)
    survivors = 0
    for mutant, killer in run_all([(mutant.tests, mutant) for mutant in mutants], order):
        survivors += not killer
        print(f"{mutant!s:75} {f'killed by {killer}' if killer else 'SURVIVED'}", flush=True)
    print(f"{len(mutants)} mutants in {time.monotonic() - began:.0f} s", flush=True)
    sys.exit(f"{survivors} survived" if survivors else 0)


def main(chosen: str = "") -> int | str:
    """Run the mutants; return 0, or a message if the tests or the list must be seen to."""
    mutants = [mutant for mutant in MUTANTS if chosen in str(mutant)]
    if not mutants:
        return f"no mutant has {chosen!r} in its line"
    for mutant in mutants:
        mutant.source()  # which fails where the list is stale
    status = 0
    for interpret in (False, True):  # in processes of their own, as Triton is imported for one of both
        if own := [mutant for mutant in mutants if mutant.interpreted == interpret]:
            process = FORK.Process(target=run_mutants, args=(own, interpret))
            process.start()
            process.join()
            status |= process.exitcode
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
