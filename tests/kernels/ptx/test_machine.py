"""The executor of PTX: the code it refuses, and the faults it finds in a kernel."""

from __future__ import annotations

import gc
import re
import shutil
import sys
from typing import Any

import pytest
import torch

from fastreg.kernels.ar_tar import ar_tar_kernel
from tests.exact import check_penalty
from tests.kernels.ptx.driver import Executor, PTXError, executed

pytestmark = [
    pytest.mark.triton,
    pytest.mark.compiled,
    pytest.mark.skipif(shutil.which("gcc") is None or sys.platform != "linux", reason="the machine needs gcc on Linux"),
]


def before_barriers(code: str, lanes: int = 40) -> tuple[str, str]:
    """Put code before each barrier; in it, %p1 is true for the first lanes of a program."""
    return "bar.sync", rf"mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, {lanes}; {code}\nbar.sync"


TO, FROM = r"(ld\.global\S*\.v4\.\w+ {[^}]*}, ", r"\[ *%rd\d+)[ +\d]*\]"  # of a wide load
MUTANTS: dict[str, tuple[str, Any, str]] = {
    "an_unknown_instruction": (*before_barriers("sin.approx.f32 %r1, %r2;"), "cannot run `sin.approx.f32 %r1, %r2`"),
    "an_unknown_access": (r"ld\.global\.", "ld.volatile.global.", "cannot run `.*ld.volatile.global"),
    "another_size": (*before_barriers("add.s32 %r1, %rd1, 1;"), "%rd1 has 8 bytes where 4 are expected"),
    "a_mask": (r"@%p\d+ (ld\.global\.v4)", r"\1", "outside of the tensors"),
    "before_the_tensors": (TO + FROM, rf"\1+-{2**30}]", "outside of the tensors"),
    "misaligned": (TO + FROM, r"\1+4]", "a misaligned access"),
    "shared": (*before_barriers("mov.b32 %r1, 65536; ld.shared.b32 %r2, [%r1];"), "outside of shared memory: `ld"),
    "a_branch": (*before_barriers("@%p1 bra $MINE;\n$MINE:"), "a divergent branch: "),
    "a_return": (*before_barriers("@%p1 ret;"), "a divergent return"),
    "some_lanes": (*before_barriers("@%p1 bar.sync 0;"), "a divergent barrier: lanes of one warp"),
    "one_warp": (*before_barriers("@%p1 ret;", 32), "a divergent barrier: part of the warps ended"),
    "another_barrier": (
        *before_barriers("@%p1 bra $MINE;\nbar.sync 0; bra $END;\n$MINE:\nbar.sync 0;\n$END:", 32),
        "a divergent barrier: other warps wait at another one",
    ),
    "two_writes": (*before_barriers("mov.b32 %r1, 0; st.shared.b32 [%r1], 1;"), "a race: overwrites .* wrote"),
    "a_read_and_a_write": (
        *before_barriers("bar.sync 0; mov.b32 %r1, 0; ld.shared.b32 %r2, [%r1]; @%p1 st.shared.b32 [%r1], 1;", 1),
        "a race: overwrites what another thread read",
    ),
    "of_one_program": (r"atom\.global\.gpu", "atom.global.cta", "a race: reads what"),
    "acquire_alone": ("acq_rel", "acquire", "a race: reads what another thread"),
    "release_alone": ("acq_rel", "release", "a race: reads what another thread"),
    "no_barrier_before_the_ticket": (
        r"(?s)st\.global(?:(?!st\.global).)*atom\.global",
        lambda code: code[0].replace("bar.sync", "// bar.sync"),
        r"a race: .*\.py:\d+\).* the other: program \d+, (thread \d+|several threads)",
    ),
    "no_barrier_after_the_ticket": (r"(?s)(atom\.global.*?)bar\.sync\s+0;", r"\1", "a race: .*(ld|st).shared"),
}


@pytest.mark.parametrize(("pattern", "replacement", "message"), MUTANTS.values(), ids=MUTANTS)
def test_a_mutant_of_the_penalty_is_refused(
    pattern: str, replacement: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several programs share the activations."""
    raw, dropped = torch.randn(2, 4, 40, 600).unbind()
    executor = Executor()
    load = executor.load_binary
    edited = lambda ptx: re.sub(pattern, replacement, ptx.decode()).encode()  # noqa: E731
    monkeypatch.setattr(executor, "load_binary", lambda name, ptx, *rest: load(name, edited(ptx), *rest))
    with executed(executor, ar_tar_kernel):
        with pytest.raises((PTXError, NotImplementedError), match=message):
            check_penalty(raw.requires_grad_(), dropped.requires_grad_())
        gc.collect()  # the driver that has loaded the code frees it
