"""The executor of PTX: the code it refuses, and the faults it finds in a kernel."""

from __future__ import annotations

import re
import shutil
import sys
from typing import Any

import pytest
import torch

from fastreg.kernels import ar_tar
from tests.exact import check_penalty
from tests.kernels.ptx.decoder import Decoder
from tests.kernels.ptx.driver import Executor, PTXError, executed

pytestmark = [
    pytest.mark.triton,
    pytest.mark.compiled,
    pytest.mark.skipif(shutil.which("gcc") is None or sys.platform != "linux", reason="the machine needs gcc on Linux"),
]

KERNEL = """
.visible .entry hand_written(.param .u64 .ptr .global .align 1 p_0)
{{
    .reg .pred %p<4>;
    .reg .b32 %r<8>;
    .reg .b32 %lane;
    .reg .b64 %d<8>;
    .reg .b64 %base0;
    ld.param.b64 %base0, [p_0];
    mov.u32 %lane, %tid.x;
{}
    ret;
}}
"""
AT_LANE = "mad.wide.u32 %d0, %lane, 4, %base0;"
MINE = "shl.b32 %r2, %lane, 2;"
NEXT = "xor.b32 %r3, %r2, 128;"  # the value of a thread of the next warp


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sin.approx.f32 %r1, %r2;", "cannot run `sin.approx.f32 %r1, %r2`"),
        ("ld.volatile.global.b32 %r1, [%base0];", r"cannot run `ld.volatile.global.b32 %r1, \[%base0\]`"),
        ("add.s32 %r1, %d1, 1;", "%d1 has 8 bytes where 4 are expected"),
        (f"{AT_LANE} ld.global.b32 %r1, [%d0+-4];", "outside of the tensors .* thread (0|32)"),
        ("mov.b32 %r2, 64; ld.shared.b32 %r1, [%r2];", "outside of shared memory: `ld.shared.b32 %r1, "),
        ("ld.global.v2.b32 {%r1, %r2}, [%base0+4];", "a misaligned access: `ld.global.v2.b32"),
        ("setp.lt.s32 %p1, %lane, 40; @%p1 bra $L; $L:", "a divergent branch: .* program 0, thread 32"),
        ("setp.lt.s32 %p1, %lane, 40; @%p1 bar.sync 0;", "a divergent barrier: lanes of one warp"),
        ("setp.lt.s32 %p1, %lane, 32; @%p1 bra $L; bar.sync 0;\n$L:", "a divergent barrier: part of the warps ended"),
        (
            "setp.lt.s32 %p1, %lane, 32; @%p1 bra $L; bar.sync 0; bra $M;\n$L:\nbar.sync 0;\n$M:",
            "a divergent barrier: other warps wait at another one",
        ),
        ("setp.lt.s32 %p1, %lane, 40; @%p1 ret;", "a divergent return"),
        ("st.global.b32 [%base0], %lane;", "a race: overwrites what another thread wrote: .*; the other: program 0"),
        (
            f"{MINE} {NEXT} st.shared.b32 [%r2], 1; bar.sync 0; ld.shared.b32 %r1, [%r3]; st.shared.b32 [%r2], 2;",
            "a race: (overwrites what another thread read|reads what another thread wrote)",
        ),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_code_that_it_does_not_know_and_faults_are_refused(body: str, message: str, seed: int) -> None:
    """In the body of a kernel of two warps that has 64 numbers at %base0."""
    executor, code = Executor(), KERNEL.format(body.replace("; ", ";\n"))
    executor.random.seed(seed)
    with pytest.raises((PTXError, NotImplementedError), match=message):
        executor.launch(Decoder(code), 256 if "a race" in message else 64, 1, 2, [("*", torch.zeros(64))])


class Edited(Executor):
    """Runs PTX in which a pattern is replaced."""

    def __init__(self, pattern: str, replacement: Any):
        super().__init__()
        self.pattern, self.replacement = pattern, replacement

    def load_binary(self, name: str, ptx: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        edited = re.sub(self.pattern, self.replacement, ptx.decode())
        return super().load_binary(name, edited.encode(), shared, device)


MUTANTS: dict[str, tuple[str, Any, str]] = {
    "of_one_program": (r"atom\.global\.gpu", "atom.global.cta", "a race: reads what"),
    "acquire_alone": ("acq_rel", "acquire", "a race: reads what another thread"),
    "release_alone": ("acq_rel", "release", "a race: reads what another thread"),
    "no_barrier_before_the_ticket": (
        r"(?s)st\.global(?:(?!st\.global).)*atom\.global",
        lambda code: code[0].replace("bar.sync", "// bar.sync"),
        r"a race: .*\.py:\d+\).* the other: program \d+, (thread \d+|several threads)",
    ),
    "no_barrier_after_the_ticket": (r"(?s)(atom\.global.*?)bar\.sync\s+0;", r"\1", "a race: .*(ld|st).shared"),
    "a_mask": (r"@%p\d+ (ld\.global\.v4)", r"\1", "outside of the tensors"),
}


@pytest.mark.parametrize(("pattern", "replacement", "message"), MUTANTS.values(), ids=MUTANTS)
def test_a_mutant_of_the_penalty_is_refused(pattern: str, replacement: Any, message: str) -> None:
    """Several programs share the activations."""
    raw, dropped = torch.randn(2, 4, 40, 600, generator=torch.Generator().manual_seed(0)).unbind()
    with executed(Edited(pattern, replacement), ar_tar.ar_tar_kernel), pytest.raises(PTXError, match=message):
        check_penalty(raw.requires_grad_(), dropped.requires_grad_())
