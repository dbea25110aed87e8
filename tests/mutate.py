"""Do the tests notice a wrong kernel?  One token at a time is changed in a copy of the tree.

    python tests/mutate.py                 all of it, a few minutes; writes tests/mutations.md
    python tests/mutate.py pairwise/lse_triton  the mutations of one file, printed only

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
MOMENTS = "tests/kernels/test_moments.py tests/kernels/test_moments_fused.py"
CORRELATION = "tests/kernels/test_correlation.py tests/kernels/test_correlation_mixed.py"
FUSED_CORRELATION = "tests/kernels/test_correlation_fused.py"
PATCHES = "tests/kernels/test_patches_fused.py tests/kernels/test_patches.py"
TOPK = "tests/kernels/test_topk_fused.py tests/kernels/test_topk.py"


class Mutation(NamedTuple):
    """The first `old` at or after a function of kernels/ becomes `new`."""

    kernel: str
    old: str
    new: str

    @property
    def file(self) -> str:
        return self.kernel.partition(".")[0]


TESTS = {
    "pairwise/lse_triton": (LSE, "tiles"),
    "pairwise/lse_gemm": (LSE, "products"),
    "pairwise/lse_torch": (LSE, "not tiles and not products"),
    "pairwise/scores_triton": (LSE, "tiles or products"),
    "pairwise/masks_triton": (LSE, "mask and tiles"),
    "pairwise/sigmoid_triton": (SIGMOID, ""),
    "pairwise/sigmoid_torch": (SIGMOID, ""),
    "pairwise/topk_triton": (TOPK, ""),
    "correlation/moments_triton": (MOMENTS, ""),
    "correlation/moments_torch": (MOMENTS, "not triton"),
    "correlation/gram_triton": (FUSED_CORRELATION, ""),
    "correlation/gradient_triton": (FUSED_CORRELATION, ""),
    "correlation/gram_torch": (CORRELATION, ""),
    "patches/patches_triton": (PATCHES, "not compiled and not trial"),
    "patches/patches_torch": ("tests/kernels/test_patches.py", "torch and not compiled"),
    "tokens/tokens_triton": ("tests/kernels/test_tokens.py", "triton and not compiles"),
    "tokens/bias": ("tests/kernels/test_bias.py", "triton and not compiles"),
    "regression/cosine": ("tests/kernels/test_scaled_cosine.py", "triton and not compiles"),
    "regression/chamfer": ("tests/kernels/test_chamfer.py", "triton and not compiles"),
    "correlation/plans": (CORRELATION + " tests/kernels/test_correlation_ranks.py", ""),
}

MUTATIONS = {  # function: (what stands in it or below, what it becomes)
    "pairwise/lse_triton._fwd": [
        ("tl.exp2(m - peak)", "tl.exp2(peak - m)"),
        ("peak = tl.maximum(m, tl.max(s, 1))", "peak = tl.max(s, 1)"),
        ("tl.exp2(s - peak[:, None])", "tl.exp2(s - m[:, None])"),
        ("        m = peak", "        m = m"),
        ("STATS + row, m, row < M", "STATS + row, m, row < M - 1"),
    ],
    "pairwise/lse_triton._bwd": [
        ("if TRANSPOSED and VECTOR:", "if VECTOR:"),
        ("X_SIDE, Y_SIDE, M, N)", "Y_SIDE, X_SIDE, M, N)"),
        ("sums += tl.sum(w, 1)", "sums = tl.sum(w, 1)"),
        ("w *= 1 / tl.load(FP16_SCALE)", "w *= tl.load(FP16_SCALE)"),
        ("y, u, PRECISION)", "y, 0 * u, PRECISION)"),
    ],
    "pairwise/lse_gemm._summarize": [
        ("tl.max(s, 1), LEAST)", "tl.max(s, 1), 0.0)"),
        ("tl.exp2(s - m_y[None, :])", "tl.exp2(s - m[:, None])"),
        ("ROWS += tl.program_id(1)", "ROWS += tl.program_id(0)"),
        ("COLS + j, m_y, j < C", "COLS + j, m_y, j < C - 1"),
        ("tl.sum(tl.exp2(s - m[:", "tl.max(tl.exp2(s - m[:"),
    ],
    "pairwise/lse_gemm._weigh": [
        ("ROW_SIDE, COL_SIDE, M, N)", "COL_SIDE, ROW_SIDE, M, N)"),
        ("tl.sum(w, 0), j < C)", "tl.max(w, 0), j < C)"),
        ("w *= 1 / tl.load(FP16_SCALE)", "w *= tl.load(FP16_SCALE)"),
        ("i.to(tl.int64)[:, None] * C", "i.to(tl.int64)[:, None] * R"),
        ("SUMS + tl.program_id(0)", "SUMS + 0 * tl.program_id(0)"),
    ],
    "pairwise/scores_triton.scored": [
        ("tl.load(SCALE + x) * LOG2_E", "tl.load(SCALE + x) / LOG2_E"),
        ("s += (tl.load(BIAS + x)", "s -= (tl.load(BIAS + x)"),
        ("s *= tl.load(SCALE)", "s += tl.load(SCALE)"),
        ("ok = ok & kept", "ok = ok | kept"),
        ("tl.where(ok, s, -float", "tl.where(ok, s, float"),
    ],
    "pairwise/scores_triton.weighed": [
        ("X_SIDE + M + x", "X_SIDE + x"),
        ("m_y[None, :]) * w_y", "m_y[None, :]) + w_y"),
        ("w += tl.exp2(s - m_y", "w = tl.exp2(s - m_y"),
        ("tl.exp2(s - m_x[:, None])", "tl.exp2(m_x[:, None] - s)"),
        ("Y_SIDE + N + y", "Y_SIDE + M + y"),
    ],
    "pairwise/masks_triton.kept": [
        ("RULES[t](j[None, :], i[:, None])", "RULES[t](i[:, None], j[None, :])"),
        ("X_IDS + PLACES[t] * M", "X_IDS + PLACES[t] * N"),
        ("keep & RULES[t](i", "keep | RULES[t](i"),
        ("PLACES[t] < 0", "PLACES[t] <= 0"),
        ("PLACES[t] * N + y", "PLACES[t] + y"),
    ],
    "pairwise/sigmoid_triton._sigmoid": [
        ("p * scale + bias", "p * scale - bias"),
        ("tl.where(positive, -s, s)", "tl.where(positive, s, -s)"),
        ("z > 0, 1.0, e", "z > 0, e, 1.0"),
        ("tl.maximum(z, 0.0)", "tl.maximum(s, 0.0)"),
        ("(positive, -w, w)", "(positive, w, -w)"),
    ],
    "pairwise/sigmoid_triton._tiles": [
        ("total += tl.sum(loss, 1)", "total = tl.sum(loss, 1)"),
        ("sum_wp += tl.sum(w * p, 1)", "sum_wp += tl.sum(w, 1)"),
        ("u *= scale / FP16_SCALE", "u *= 1 / FP16_SCALE"),
        ("row < M, total, 0.0", "row < M - 1, total, 0.0"),
        ("sum_w += tl.sum(w, 1)", "sum_w -= tl.sum(w, 1)"),
    ],
    "pairwise/sigmoid_triton._weigh": [
        ("[:, None] * C", "[:, None] * R"),
        ("x, y, ROW_IDS, COL_IDS", "y, x, ROW_IDS, COL_IDS"),
        ("tl.num_programs(1) + tl", "tl.num_programs(1) - tl"),
        ("tl.sum(tl.sum(w * p, 1), 0)", "tl.sum(tl.sum(w, 1), 0)"),
        ("(w * FP16_SCALE)", "(p * FP16_SCALE)"),
    ],
    "pairwise/topk_triton._topk": [
        ("first = tl.program_id(1) * share", "first = tl.program_id(1) * 0"),
        ("(best == worst[:, None]) &", "(best != worst[:, None]) &"),
        ("keys == top[:, None], DROPPED", "keys != top[:, None], DROPPED"),
        ("slot < n, empty, PAST", "slot < n - 1, empty, PAST"),
        ("| (s != s)", "| (s < s)"),
    ],
    "pairwise/lse_torch.statistics": [
        ("pairs.same else i != j", "pairs.same else i == j"),
        ("_fold(rows[:, i], s, 1)", "_fold(rows[:, i], s, 0)"),
        ("cols[1, j] += s.sum(0)", "cols[1, j] = s.sum(0)"),
        ("if bounded:", "if not bounded:"),
        ("rows[1, i] += s.sum(1)", "rows[0, i] += s.sum(1)"),
    ],
    "pairwise/lse_torch.gradients": [
        ("if pairs.same and i != j:", "if pairs.same:"),
        ("dbias[j] += w.sum(0)", "dbias[j] = w.sum(0)"),
        ("dk[j].addmm_(w.T, score.x", "dk[j].addmm_(w.T, score.q"),
        ("(2 if same", "(1 if same"),
        ("w = w + w.T", "w = w + w"),
    ],
    "correlation/moments_triton._measure": [
        ("k += 1.0", "k += 2.0"),
        ("1.0 - 1.0 / k", "1.0"),
        ("far * far * seen", "far * far"),
        ("mean += delta * (1.0 / k)", "mean += delta / n"),
    ],
    "correlation/moments_triton._forward": [
        ("first = tl.program_id(1) * share", "first = 0 * tl.program_id(1)"),
        ("PARTS + D + at, rest", "PARTS + D + at, shift"),
        ("(x - shift - rest) * scale", "(x - shift) * scale"),
        ("last - back, lane", "last + back, lane"),
    ],
    "correlation/moments_triton._backward": [
        ("total += more", "total = more"),
        ("tl.sum(dot, 0)", "tl.sum(total, 0)"),
        ("(stop - first).to", "(stop - first + 1).to"),
    ],
    "correlation/moments_triton._join_kernel": [
        ("tl.minimum(share, N - i * share)", "share"),
        ("part + 2 * D", "part + D"),
        ("shift = base + mean / n", "shift = base"),
        ("if ROOT else m2", "if not ROOT else m2"),
    ],
    "correlation/moments_torch.moments": [
        ("rest += rows.sum(0)", "rest = rows.sum(0)"),
        ("rest /= len(z)", "rest /= len(z) - 1"),
        ("m2 += rows", "m2 = rows"),
    ],
    "correlation/moments_torch.standardize": [
        ("if unbiased else 1.0", "if not unbiased else 1.0"),
        ("x - x[0].detach()", "x - x[0]"),
        ("<= FAR", ">= FAR"),
    ],
    "correlation/moments_torch.gradient": [
        ("value=-1", "value=1"),
        ("g_mean * inv_std", "g_mean * 1.0"),
    ],
    "correlation/gram_triton._dots": [
        ("k < K - start", "k <= K - start"),
        ("(col < M)[:, None] & ok", "(row < M)[:, None] & ok"),
    ],
    "correlation/gram_triton._put": [
        ("apart = i0 + shift - j0", "apart = i0 - j0"),
        ("w *= 1 / tl.load(FP16_SCALE)", "w *= 1.0"),
        ('if PART == "upper":', 'if PART == "above":'),
    ],
    "correlation/gram_triton._total": [
        ("place >= 0", "place > 1"),
        ("total *= 2", "total *= 1"),
    ],
    "correlation/gram_triton._tiles": [
        ("p // side + 1", "p // side"),
        ("start + (part + 1) // 2", "start + part // 2"),
    ],
    "correlation/gram_triton._settle": [("t = tl.load(T + at", "t = tl.load(S + at")],
    "correlation/gradient_triton._finish": [
        ("out *= tl.load(FP16_SCALE)", "out *= 1.0"),
        ("MINE + row * mine_row", "MINE + row * D"),
        ("out *= tl.load(FACTOR)", "out *= 1.0"),
    ],
    "correlation/gram_torch._symmetric": [
        ("out[i.stop :, i] = out[i, i.stop :].T", "out[i.stop :, i] = 0"),
        ("product(x[i], x[i.start :].T)", "product(x[i], x[i.start :].T) * 1.01"),
    ],
    "correlation/gram_torch.squared": [("c.diagonal().zero_()", "c.diagonal()")],
    "correlation/gram_torch.blend": [("in_q.expand_as", "in_p.expand_as")],
    "correlation/plans.ByGram": [
        ("rank(group) * len(a)", "0 * len(a)"),
        ("- diagonal.square().sum() if split", "if split"),
        ("g_diagonal - 2 * g * diagonal", "g_diagonal - g * diagonal"),
        ("b is None, ctx.group)", 'b is None, "local")'),
    ],
    "correlation/plans.Sharded": [
        ("mine = c if owner == here else mine", "mine = c"),
        ("weights = c * (2 * g)", "weights = c * g"),
        ("db += weighted", "db = weighted"),
    ],
    "patches/patches_triton._gather": [
        ("tl.program_id(1) * BLOCK_P", "tl.program_id(1) + BLOCK_P"),
        ("n[:, None] * P + p", "n[:, None] * BLOCK_P + p"),
        ("element_ty != OUT", "element_ty == OUT"),
        ("(n < N)[:, None] &", "(n < N - 1)[:, None] &"),
        ("(p < P)[None, :]", "(p < P - 1)[None, :]"),
    ],
    "patches/patches_triton._spread": [
        ("total += tl.load(G", "total = tl.load(G"),
        ("named > found[:, None]", "named >= K"),
        ("place = n - image * L", "place = n"),
        ("((t * PH + y) * PW + x) * C + c", "((t * PW + y) * PH + x) * C + c"),
        ("total *= tl.load(NORM + C", "total *= tl.load(NORM"),
    ],
    "patches/patches_triton._mse": [
        ("WIDE) - shift", "WIDE)"),
        ("/ (P - 1)", "/ P"),
        ("        x *= inv", "        x *= 1.0"),
        ("sums += tl.where(ok, x - shift", "sums = tl.where(ok, x - shift"),
        ("sums += tl.where(ok, x * x", "sums = tl.where(ok, x * x"),
    ],
    "patches/patches_triton._mse_grad": [
        ("k * g_k, n < N", "k, n < N"),
        ("(x - shift - mean)", "(x - mean)"),
        ("2 * n + 1, n < N", "2 * n, n < N"),
        ("0.0).to(tl.float32) - x", "0.0).to(tl.float32) + x"),
        ("n[:, None] * P + p[None", "n[:, None] * K + p[None"),
    ],
    "patches/patches_triton._within": [
        ("c = p - q * C", "c = p - q * PW"),
        ("x = q - r * PW", "x = q - r * PH"),
        ("t = r // PH", "t = r // PW"),
    ],
    "patches/patches_torch._normalized": [
        ("rows.sub_(rows[:, :1].clone())", "rows.sub_(0 * rows[:, :1])"),
        ("eps * share", "eps / share"),
    ],
    "patches/patches_torch._judged": [
        ("e.clamp(-1, 1)", "e.clamp(-1, 2)"),
        ("alpha=0.5", "alpha=1.0"),
    ],
    "tokens/tokens_triton._gather_rows": [
        ("(ids < limit)", "(ids <= limit)"),
        ("b = r // n", "b = r % n"),
        (
            "tl.where(shown[:, None], x, token[None, :])",
            "tl.where(shown[:, None], token[None, :], x)",
        ),
        ("(r % n)[:, None] * D", "(r // n)[:, None] * D"),
        ("ids, 0) * s_r", "ids, 0) * s_b"),
    ],
    "tokens/tokens_triton._added": [
        ("x -= lost", "x += lost"),
        ("(after - total) - x", "0.0 * x"),
    ],
    "tokens/tokens_triton._restore_rows": [
        ("(ids >= 0) & (ids < K)", "(ids >= 0) & (ids <= K)"),
        ("tl.where((ids >= K)", "tl.where((ids > K)"),
        (
            "first = tl.program_id(0).to(tl.int64) * share",
            "first = tl.program_id(0).to(tl.int64) * 0",
        ),
        ("(part * L + l)", "(0 * part + l)"),
        ("b * g_b + place", "b * g_r + place"),
    ],
    "tokens/tokens_triton._scatter_rows": [
        ("tl.max(stop - start, 0)", "tl.min(stop - start, 0)"),
        ("more = start + j < stop", "more = start + j <= stop"),
        ("ORDER + b * n + start", "ORDER + start"),
        ("k * x_r", "k * x_b"),
        ("start_b + l + 1", "start_b + l + 2"),
    ],
    "tokens/bias._pick": [
        ("(head % H) * b_h", "(head // H) * b_h"),
        ("b_i + q[None, :]", "b_i + p[None, :]"),
        ("head // H, i, K", "head % H, i, K"),
        ("(head * K + i)", "(head + i)"),
        ("p[:, None] * b_i", "p[:, None] * b_h"),
    ],
    "tokens/bias._unpick": [
        ("h * g_h", "h * g_i"),
        ("i[:, None] * g_i + j[None, :] * g_j", "i[:, None] * g_j + j[None, :] * g_i"),
        ("total = after", "total = g"),
        ("(tl.program_id(0).to(tl.int64) * H + h) * L", "h * L"),
        ("% blocks * BLOCK_I", "// blocks * BLOCK_I"),
    ],
    "regression/cosine._power": [
        ("gamma == 1.0, 1.0, 0.0", "gamma == 1.0, 0.0, 0.0"),
        ("gamma * slope", "slope"),
        ("2.0 * e", "e"),
    ],
    "regression/cosine._forward": [
        ("cos > 1.0, 0.0, 1.0 - cos", "cos > 1.0, 1.0, 1.0 - cos"),
        ("tt += t * t", "tt = t * t"),
        ("place * p_r", "place * p_k"),
        ("tl.maximum(p_norm, EPS)", "p_norm"),
        ("STATS + 2 * R + r, t_norm", "STATS + 2 * R + r, p_norm"),
    ],
    "regression/cosine._backward": [
        ("w = -slope", "w = slope"),
        ("p_norm > EPS, cos", "p_norm > EPS, 1.0"),
        ("dt = (p - along * t)", "dt = (t - along * p)"),
        ("(k * L + place)", "(k * n + place)"),
        ("(r % n) * g_r", "r * g_r"),
    ],
    "regression/chamfer._squares": [
        ("total += delta * delta", "total = delta * delta"),
        ("x[:, None] - y[None, :]", "x[:, None] + y[None, :]"),
    ],
    "regression/chamfer._nearest": [
        ("(total < best)", "(total <= best)"),
        ("g * x_g + n", "g * y_g + n"),
        ("& (m < M)[None, :]", "& (m <= M)[None, :]"),
        ("tl.where(best == least[:, None], places", "tl.where(best >= least[:, None], places"),
        ("tl.where(closer, m[None, :], places)", "tl.where(closer, start, places)"),
    ],
    "regression/chamfer._factor": [
        ("tl.where(total > 0, tl.div_rn", "tl.where(total < 0, tl.div_rn"),
        ("total.shape, 2.0", "total.shape, 1.0"),
    ],
    "regression/chamfer._pull": [
        ("back[None, :] == n[:, None]", "back[None, :] >= n[:, None]"),
        ("b * part", "a * part"),
        ("a * factor * delta", "b * factor * delta"),
        ("own += delta", "own = delta"),
        ("GRAD + g * grad_g", "GRAD + g"),
    ],
}


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
        at = source.find(mutation.old, source.index(f" {mutation.kernel.partition('.')[2]}("))
        if at < 0:
            raise SystemExit(f"{mutation.kernel} has no {mutation.old!r}")
        path.write_text(source[:at] + mutation.new + source[at + len(mutation.old) :])
        files, only = TESTS[mutation.file]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command += ["--no-header", "--tb=no", *files.split(), "-k", only]
        environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    lines = run.stdout.splitlines()  # an error before a test begins is one of what it starts with
    failed = [x for x in lines if x.startswith("FAILED") or x.startswith("ERROR") and "::" in x]
    if run.returncode != 0 and not failed:  # a crash is noticed too, a missing file is not
        failed = [f"FAILED ended with {run.returncode}"] if run.returncode < 0 else []
    test = failed[0].partition(" ")[2].partition(" - ")[0] if failed else "SURVIVED"
    first = test.rpartition("::")[2]
    old, new = (" ".join(text.split()).replace("|", "\\|") for text in mutation[1:])
    return f"| `{mutation.kernel}` | `{old}` | `{new}` | {first} |"


def main() -> int:
    every = [Mutation(name, *pair) for name, pairs in MUTATIONS.items() for pair in pairs]
    wanted = [m for m in every if len(sys.argv) < 2 or sys.argv[1] in m.kernel]
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
