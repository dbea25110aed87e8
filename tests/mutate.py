"""Do the tests notice a wrong kernel?  One token at a time is changed in a copy of the tree.

    python tests/mutate.py                 all of it, a few minutes; writes tests/mutations.md
    python tests/mutate.py pairwise_tiles  the mutations of one file, printed only

Each mutation must make at least one test of its kernel fail.  One that does not ends the command
with 1: then the tests have a hole, or the token does nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "tests" / "mutations.md"
LSE = "tests/kernels/test_pairwise.py"
SIGMOID = "tests/kernels/test_sigmoid_fused.py tests/kernels/test_pairwise_sigmoid.py"
TOPK = "tests/kernels/test_topk_fused.py tests/kernels/test_topk.py"


class Mutation(NamedTuple):
    """`old`, which stands in the kernel once, becomes `new`."""

    kernel: str
    old: str
    new: str

    @property
    def file(self) -> str:
        return self.kernel.partition(".")[0]


TESTS = {
    "pairwise_tiles": (LSE, "tiles"),
    "pairwise_products": (LSE, "products"),
    "pairwise_torch": (LSE, "not tiles and not products"),
    "scores_fused": (LSE, "tiles or products"),
    "masks_fused": (LSE, "mask and tiles"),
    "sigmoid_fused": (SIGMOID, ""),
    "sigmoid_torch": (SIGMOID, ""),
    "topk_fused": (TOPK, ""),
}

MUTATIONS = [
    Mutation("pairwise_tiles._fwd", "tl.exp2(m - peak)", "tl.exp2(peak - m)"),
    Mutation("pairwise_tiles._fwd", "peak = tl.maximum(m, tl.max(s, 1))", "peak = tl.max(s, 1)"),
    Mutation("pairwise_tiles._fwd", "tl.exp2(s - peak[:, None])", "tl.exp2(s - m[:, None])"),
    Mutation("pairwise_tiles._fwd", "        m = peak\n", "        m = m\n"),
    Mutation("pairwise_tiles._fwd", "tl.store(STATS + row, m, row < M)", "tl.store(STATS + row, m, row < M - 1)"),
    Mutation("pairwise_tiles._bwd", "if FLIP and VECTOR:", "if VECTOR:"),
    Mutation("pairwise_tiles._bwd", "X_SIDE, Y_SIDE, M, N)", "Y_SIDE, X_SIDE, M, N)"),
    Mutation("pairwise_tiles._bwd", "sums += tl.sum(w, 1)", "sums = tl.sum(w, 1)"),
    Mutation("pairwise_tiles._bwd", "w *= 1 / tl.load(UNIT)", "w *= tl.load(UNIT)"),
    Mutation("pairwise_tiles._bwd", "y, u, PRECISION)", "y, 0 * u, PRECISION)"),
    Mutation("pairwise_products._summarise", "m = tl.maximum(tl.max(s, 1), LEAST)", "m = tl.maximum(tl.max(s, 1), 0.0)"),
    Mutation("pairwise_products._summarise", "tl.exp2(s - m_y[None, :])", "tl.exp2(s - m[:, None])"),
    Mutation("pairwise_products._summarise", "ROWS += tl.program_id(1)", "ROWS += tl.program_id(0) * 0"),
    Mutation("pairwise_products._summarise", "tl.store(COLS + j, m_y, j < C)", "tl.store(COLS + j, m_y, j < C - 1)"),
    Mutation("pairwise_products._summarise", "tl.sum(tl.exp2(s - m[:, None]), 1)", "tl.max(tl.exp2(s - m[:, None]), 1)"),
    Mutation("pairwise_products._weigh", "ROW_SIDE, COL_SIDE, M, N)", "COL_SIDE, ROW_SIDE, M, N)"),
    Mutation("pairwise_products._weigh", "tl.sum(w, 0), j < C)", "tl.max(w, 0), j < C)"),
    Mutation("pairwise_products._weigh", "w *= 1 / tl.load(UNIT)", "w *= tl.load(UNIT)"),
    Mutation("pairwise_products._weigh", "w.to(W.dtype.element_ty), inside)", "w.to(W.dtype.element_ty), i[:, None] < C)"),
    Mutation("pairwise_products._weigh", "SUMS + tl.program_id(0)", "SUMS + 0 * tl.program_id(0)"),
    Mutation("scores_fused.scored", "(tl.load(SCALE + x) * LOG2_E)[:, None]", "(tl.load(SCALE + x) * LN_2)[:, None]"),
    Mutation("scores_fused.scored", "s += (tl.load(BIAS + x) * LOG2_E)", "s -= (tl.load(BIAS + x) * LOG2_E)"),
    Mutation("scores_fused.scored", "s *= tl.load(SCALE) * LOG2_E", "s += tl.load(SCALE) * LOG2_E"),
    Mutation("scores_fused.scored", "ok = ok & kept", "ok = ok | kept"),
    Mutation("scores_fused.scored", "tl.where(ok, s, -float(\"inf\"))", "tl.where(ok, s, 0.0)"),
    Mutation("scores_fused.weighed", "tl.load(X_SIDE + M + x)", "tl.load(X_SIDE + x)"),
    Mutation("scores_fused.weighed", "tl.exp2(s - m_y[None, :]) * w_y[None, :]", "tl.exp2(s - m_y[None, :]) + w_y[None, :]"),
    Mutation("scores_fused.weighed", "w += tl.exp2(s - m_y", "w = tl.exp2(s - m_y"),
    Mutation("scores_fused.weighed", "tl.exp2(s - m_x[:, None])", "tl.exp2(m_x[:, None] - s)"),
    Mutation("scores_fused.weighed", "tl.load(Y_SIDE + N + y)", "tl.load(Y_SIDE + M + y)"),
    Mutation("masks_fused.kept", "keep = keep & RULES[t](j[None, :], i[:, None])", "keep = keep & RULES[t](i[:, None], j[None, :])"),
    Mutation("masks_fused.kept", "X_IDS + PLACES[t] * M", "X_IDS + PLACES[t] * N"),
    Mutation("masks_fused.kept", "keep = keep & RULES[t](i[:, None], j[None, :])", "keep = keep | RULES[t](i[:, None], j[None, :])"),
    Mutation("masks_fused.kept", "if PLACES[t] < 0", "if PLACES[t] <= 0"),
    Mutation("masks_fused.same_group", "return rows == cols", "return rows >= cols"),
    Mutation("pairwise_torch.statistics", "mirrored = both if not pairs.same else i != j", "mirrored = both if not pairs.same else i == j"),
    Mutation("pairwise_torch.statistics", "_fold(cols[:, j], s, 0)", "_fold(cols[:, i], s, 0)"),
    Mutation("pairwise_torch.statistics", "cols[1, j] += s.sum(0)", "cols[1, j] = s.sum(0)"),
    Mutation("pairwise_torch.bounded", "return bool(most <= SAFE)", "return bool(most <= 1000 * SAFE)"),
    Mutation("pairwise_torch._fold", "total.mul_((m - peak).exp_())", "total.mul_((peak - m).exp_())"),
    Mutation("pairwise_torch.gradients", "if pairs.same and i != j:", "if pairs.same:"),
    Mutation("pairwise_torch.gradients", "dbias[j] += w.sum(0)", "dbias[j] = w.sum(0)"),
    Mutation("pairwise_torch.gradients", "dk[j].addmm_(w.T, score.x[i])", "dk[j].addmm_(w.T, score.q[i])"),
    Mutation("pairwise_torch._finish", "(2 if same else 1)", "(1 if same else 1)"),
    Mutation("pairwise_torch._weigh", "s.mul_(row[1, :, None] + col[1])", "s.mul_(row[1, :, None] * col[1])"),
]


def survives(mutation: Mutation) -> str:
    """The mutation's line of the report; it ends in SURVIVED when no test failed."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        shutil.copytree(ROOT / "fastssl", tree / "fastssl")
        for top in ("kernels", "bench"):  # as setup.py maps them
            shutil.copytree(ROOT / top, tree / "fastssl" / top)
        shutil.copytree(ROOT / "tests", tree / "tests")
        shutil.copy(ROOT / "pyproject.toml", tree)
        path = tree / "fastssl" / "kernels" / f"{mutation.file}.py"
        source = path.read_text()
        start = source.index(f"def {mutation.kernel.partition('.')[2]}(")
        at = source.find(mutation.old, start)
        if at < 0:
            raise SystemExit(f"{mutation.kernel} has no {mutation.old!r}")
        path.write_text(source[:at] + mutation.new + source[at + len(mutation.old) :])
        files, only = TESTS[mutation.file]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command += ["--no-header", "--tb=no", *files.split(), "-k", only]
        environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    failed = [line for line in run.stdout.splitlines() if line.startswith("FAILED")]
    if run.returncode != 0 and not failed:  # a crash is noticed too, a missing file is not
        failed = [f"FAILED ended with {run.returncode}"] if run.returncode < 0 else []
    first = failed[0].split()[1].rpartition("::")[2] if failed else "SURVIVED"
    old, new = (" ".join(text.split()).replace("|", "\\|") for text in mutation[1:])
    return f"| `{mutation.kernel}` | `{old}` | `{new}` | {first} |"


def main() -> int:
    wanted = [m for m in MUTATIONS if len(sys.argv) < 2 or sys.argv[1] in m.kernel]
    lines = [
        "# Mutations",
        "",
        "Each line is one token of a kernel changed, and the first test that then fails, as",
        "`python tests/mutate.py` found them.",
        "",
        "| kernel | was | became | first failure |",
        "| --- | --- | --- | --- |",
    ]
    with ThreadPoolExecutor(2) as pool:
        for line in pool.map(survives, wanted):
            lines.append(line)
            print(line, flush=True)
    if len(sys.argv) < 2:
        REPORT.write_text("\n".join(lines) + "\n")
    survivors = sum(line.endswith("SURVIVED |") for line in lines)
    print(f"{len(wanted)} mutations, {survivors} survived")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
