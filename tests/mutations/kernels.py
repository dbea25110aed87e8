"""Kernels: which tests look at a file, and the tokens that are changed in it."""

LSE = "tests/kernels/test_pairwise.py"
SIGMOID = "tests/kernels/test_sigmoid_fused.py tests/kernels/test_pairwise_sigmoid.py"
MOMENTS = "tests/kernels/test_moments.py tests/kernels/test_moments_fused.py"
CORRELATION = "tests/kernels/test_correlation.py tests/kernels/test_correlation_mixed.py"
FUSED_CORRELATION = "tests/kernels/test_correlation_fused.py"
PATCHES = "tests/kernels/test_patches_fused.py tests/kernels/test_patches.py"
TOPK = "tests/kernels/test_topk_fused.py tests/kernels/test_topk.py"

TESTS = {
    "kernels/pairwise/lse_triton": (LSE, "tiles"),
    "kernels/pairwise/lse_gemm": (LSE, "products"),
    "kernels/pairwise/lse_torch": (LSE, "not tiles and not products"),
    "kernels/pairwise/scores_triton": (LSE, "tiles or products"),
    "kernels/pairwise/masks_triton": (LSE, "mask and tiles"),
    "kernels/pairwise/sigmoid_triton": (SIGMOID, ""),
    "kernels/pairwise/sigmoid_torch": (SIGMOID, ""),
    "kernels/pairwise/topk_triton": (TOPK, ""),
    "kernels/correlation/moments_triton": (MOMENTS, ""),
    "kernels/correlation/moments_torch": (MOMENTS, "not triton"),
    "kernels/correlation/gram_triton": (FUSED_CORRELATION, ""),
    "kernels/correlation/gradient_triton": (FUSED_CORRELATION, ""),
    "kernels/correlation/gram_torch": (CORRELATION, ""),
    "kernels/patches/patches_triton": (PATCHES, "not compiled and not trial"),
    "kernels/patches/patches_torch": ("tests/kernels/test_patches.py", "torch and not compiled"),
    "kernels/tokens/tokens_triton": ("tests/kernels/test_tokens.py", "triton and not compiles"),
    "kernels/tokens/bias_triton": ("tests/kernels/test_bias.py", "triton and not compiles"),
    "kernels/regression/cosine_triton": (
        "tests/kernels/test_scaled_cosine.py",
        "triton and not compiles",
    ),
    "kernels/regression/chamfer_triton": (
        "tests/kernels/test_chamfer.py",
        "triton and not compiles",
    ),
    "kernels/correlation/plans": (CORRELATION + " tests/kernels/test_correlation_ranks.py", ""),
}

MUTATIONS = {  # function: (what stands in it or below, what it becomes)
    "kernels/pairwise/lse_triton._fwd": [
        ("tl.exp2(m - peak)", "tl.exp2(peak - m)"),
        ("peak = tl.maximum(m, tl.max(s, 1))", "peak = tl.max(s, 1)"),
        ("tl.exp2(s - peak[:, None])", "tl.exp2(s - m[:, None])"),
        ("        m = peak", "        m = m"),
        ("STATS + row, m, row < M", "STATS + row, m, row < M - 1"),
    ],
    "kernels/pairwise/lse_triton._bwd": [
        ("if TRANSPOSED and VECTOR:", "if VECTOR:"),
        ("X_SIDE, Y_SIDE, M, N)", "Y_SIDE, X_SIDE, M, N)"),
        ("sums += tl.sum(w, 1)", "sums = tl.sum(w, 1)"),
        ("w *= 1 / tl.load(FP16_SCALE)", "w *= tl.load(FP16_SCALE)"),
        ("y, u, PRECISION)", "y, 0 * u, PRECISION)"),
    ],
    "kernels/pairwise/lse_gemm._summarize": [
        ("tl.max(s, 1), LEAST)", "tl.max(s, 1), 0.0)"),
        ("tl.exp2(s - m_y[None, :])", "tl.exp2(s - m[:, None])"),
        ("ROWS += tl.program_id(1)", "ROWS += tl.program_id(0)"),
        ("COLS + j, m_y, j < C", "COLS + j, m_y, j < C - 1"),
        ("tl.sum(tl.exp2(s - m[:", "tl.max(tl.exp2(s - m[:"),
    ],
    "kernels/pairwise/lse_gemm._weigh": [
        ("ROW_SIDE, COL_SIDE, M, N)", "COL_SIDE, ROW_SIDE, M, N)"),
        ("tl.sum(w, 0), j < C)", "tl.max(w, 0), j < C)"),
        ("w *= 1 / tl.load(FP16_SCALE)", "w *= tl.load(FP16_SCALE)"),
        ("i.to(tl.int64)[:, None] * C", "i.to(tl.int64)[:, None] * R"),
        ("SUMS + tl.program_id(0)", "SUMS + 0 * tl.program_id(0)"),
    ],
    "kernels/pairwise/scores_triton.scored": [
        ("tl.load(SCALE + x) * LOG2_E", "tl.load(SCALE + x) / LOG2_E"),
        ("s += (tl.load(BIAS + x)", "s -= (tl.load(BIAS + x)"),
        ("s *= tl.load(SCALE)", "s += tl.load(SCALE)"),
        ("ok = ok & kept", "ok = ok | kept"),
        ("tl.where(ok, s, -float", "tl.where(ok, s, float"),
    ],
    "kernels/pairwise/scores_triton.weighed": [
        ("X_SIDE + M + x", "X_SIDE + x"),
        ("m_y[None, :]) * w_y", "m_y[None, :]) + w_y"),
        ("w += tl.exp2(s - m_y", "w = tl.exp2(s - m_y"),
        ("tl.exp2(s - m_x[:, None])", "tl.exp2(m_x[:, None] - s)"),
        ("Y_SIDE + N + y", "Y_SIDE + M + y"),
    ],
    "kernels/pairwise/masks_triton.kept": [
        ("RULES[t](j[None, :], i[:, None])", "RULES[t](i[:, None], j[None, :])"),
        ("X_IDS + PLACES[t] * M", "X_IDS + PLACES[t] * N"),
        ("keep & RULES[t](i", "keep | RULES[t](i"),
        ("PLACES[t] < 0", "PLACES[t] <= 0"),
        ("PLACES[t] * N + y", "PLACES[t] + y"),
    ],
    "kernels/pairwise/sigmoid_triton._sigmoid": [
        ("p * scale + bias", "p * scale - bias"),
        ("tl.where(positive, -s, s)", "tl.where(positive, s, -s)"),
        ("z > 0, 1.0, e", "z > 0, e, 1.0"),
        ("tl.maximum(z, 0.0)", "tl.maximum(s, 0.0)"),
        ("(positive, -w, w)", "(positive, w, -w)"),
    ],
    "kernels/pairwise/sigmoid_triton._tiles": [
        ("total += tl.sum(loss, 1)", "total = tl.sum(loss, 1)"),
        ("sum_wp += tl.sum(w * p, 1)", "sum_wp += tl.sum(w, 1)"),
        ("u *= scale / FP16_SCALE", "u *= 1 / FP16_SCALE"),
        ("row < M, total, 0.0", "row < M - 1, total, 0.0"),
        ("sum_w += tl.sum(w, 1)", "sum_w -= tl.sum(w, 1)"),
    ],
    "kernels/pairwise/sigmoid_triton._weigh": [
        ("[:, None] * C", "[:, None] * R"),
        ("x, y, ROW_IDS, COL_IDS", "y, x, ROW_IDS, COL_IDS"),
        ("tl.num_programs(1) + tl", "tl.num_programs(1) - tl"),
        ("tl.sum(tl.sum(w * p, 1), 0)", "tl.sum(tl.sum(w, 1), 0)"),
        ("(w * FP16_SCALE)", "(p * FP16_SCALE)"),
    ],
    "kernels/pairwise/topk_triton._topk": [
        ("first = tl.program_id(1) * share", "first = tl.program_id(1) * 0"),
        ("(best == worst[:, None]) &", "(best != worst[:, None]) &"),
        ("keys == top[:, None], DROPPED", "keys != top[:, None], DROPPED"),
        ("slot < n, empty, PAST", "slot < n - 1, empty, PAST"),
        ("| (s != s)", "| (s < s)"),
    ],
    "kernels/pairwise/lse_torch.statistics": [
        ("pairs.same else i != j", "pairs.same else i == j"),
        ("_fold(rows[:, i], s, 1)", "_fold(rows[:, i], s, 0)"),
        ("cols[1, j] += s.sum(0)", "cols[1, j] = s.sum(0)"),
        ("if bounded:", "if not bounded:"),
        ("rows[1, i] += s.sum(1)", "rows[0, i] += s.sum(1)"),
    ],
    "kernels/pairwise/lse_torch.gradients": [
        ("if pairs.same and i != j:", "if pairs.same:"),
        ("dbias[j] += w.sum(0)", "dbias[j] = w.sum(0)"),
        ("dk[j].addmm_(w.T, score.x", "dk[j].addmm_(w.T, score.q"),
        ("(2 if same", "(1 if same"),
        ("w = w + w.T", "w = w + w"),
    ],
    "kernels/correlation/moments_triton._measure": [
        ("k += 1.0", "k += 2.0"),
        ("1.0 - 1.0 / k", "1.0"),
        ("far * far * seen", "far * far"),
        ("mean += delta * (1.0 / k)", "mean += delta / n"),
    ],
    "kernels/correlation/moments_triton._forward": [
        ("first = tl.program_id(1) * share", "first = 0 * tl.program_id(1)"),
        ("PARTS + D + at, rest", "PARTS + D + at, shift"),
        ("(x - shift - rest) * scale", "(x - shift) * scale"),
        ("last - back, lane", "last + back, lane"),
    ],
    "kernels/correlation/moments_triton._backward": [
        ("total += more", "total = more"),
        ("tl.sum(dot, 0)", "tl.sum(total, 0)"),
        ("(stop - first).to", "(stop - first + 1).to"),
    ],
    "kernels/correlation/moments_triton._join_kernel": [
        ("tl.minimum(share, N - i * share)", "share"),
        ("part + 2 * D", "part + D"),
        ("shift = base + mean / n", "shift = base"),
        ("if ROOT else m2", "if not ROOT else m2"),
    ],
    "kernels/correlation/moments_torch.moments": [
        ("rest += rows.sum(0)", "rest = rows.sum(0)"),
        ("rest /= len(z)", "rest /= len(z) - 1"),
        ("m2 += rows", "m2 = rows"),
    ],
    "kernels/correlation/moments_torch.standardize": [
        ("if unbiased else 1.0", "if not unbiased else 1.0"),
        ("x - x[0].detach()", "x"),
        ("<= FAR", ">= FAR"),
    ],
    "kernels/correlation/moments_torch.gradient": [
        ("value=-1", "value=1"),
        ("g_mean * inv_std", "g_mean * 1.0"),
    ],
    "kernels/correlation/gram_triton._dots": [
        ("k < K - start", "k <= K - start"),
        ("(col < M)[:, None] & ok", "(row < M)[:, None] & ok"),
    ],
    "kernels/correlation/gram_triton._put": [
        ("apart = i0 + shift - j0", "apart = i0 - j0"),
        ("w *= 1 / tl.load(FP16_SCALE)", "w *= 1.0"),
        ('if PART == "upper":', 'if PART == "above":'),
    ],
    "kernels/correlation/gram_triton._total": [
        ("place >= 0", "place > 1"),
        ("total *= 2", "total *= 1"),
    ],
    "kernels/correlation/gram_triton._tiles": [
        ("p // side + 1", "p // side"),
        ("start + (part + 1) // 2", "start + part // 2"),
    ],
    "kernels/correlation/gram_triton._settle": [("t = tl.load(T + at", "t = tl.load(S + at")],
    "kernels/correlation/gradient_triton._finish": [
        ("out *= tl.load(FP16_SCALE)", "out *= 1.0"),
        ("MINE + row * mine_row", "MINE + row * D"),
        ("out *= tl.load(FACTOR)", "out *= 1.0"),
    ],
    "kernels/correlation/gram_torch._symmetric": [
        ("out[i.stop :, i] = out[i, i.stop :].T", "out[i.stop :, i] = 0"),
        ("product(x[i], x[i.start :].T)", "product(x[i], x[i.start :].T) * 1.01"),
    ],
    "kernels/correlation/gram_torch.squared": [("c.diagonal().zero_()", "c.diagonal()")],
    "kernels/correlation/gram_torch.blend": [("in_q.expand_as", "in_p.expand_as")],
    "kernels/correlation/plans.ByGram": [
        ("rank(group) * len(a)", "0 * len(a)"),
        ("- diagonal.square().sum() if split", "if split"),
        ("g_diagonal - 2 * g * diagonal", "g_diagonal - g * diagonal"),
        ("b is None, ctx.group)", 'b is None, "local")'),
    ],
    "kernels/correlation/plans.Sharded": [
        ("mine = c if owner == here else mine", "mine = c"),
        ("weights = c * (2 * g)", "weights = c * g"),
        ("db += weighted", "db = weighted"),
    ],
    "kernels/patches/patches_triton._gather": [
        ("tl.program_id(1) * BLOCK_P", "tl.program_id(1) + BLOCK_P"),
        ("n[:, None] * P + p", "n[:, None] * BLOCK_P + p"),
        ("element_ty != OUT", "element_ty == OUT"),
        ("(n < N)[:, None] &", "(n < N - 1)[:, None] &"),
        ("(p < P)[None, :]", "(p < P - 1)[None, :]"),
    ],
    "kernels/patches/patches_triton._spread": [
        ("total += tl.load(G", "total = tl.load(G"),
        ("named > found[:, None]", "named >= K"),
        ("place = n - image * L", "place = n"),
        ("((t * PH + y) * PW + x) * C + c", "((t * PW + y) * PH + x) * C + c"),
        ("total *= tl.load(NORM + C", "total *= tl.load(NORM"),
    ],
    "kernels/patches/patches_triton._mse": [
        ("WIDE) - shift", "WIDE)"),
        ("/ (P - 1)", "/ P"),
        ("        x *= inv", "        x *= 1.0"),
        ("sums += tl.where(ok, x - shift", "sums = tl.where(ok, x - shift"),
        ("sums += tl.where(ok, x * x", "sums = tl.where(ok, x * x"),
    ],
    "kernels/patches/patches_triton._mse_grad": [
        ("k * g_k, n < N", "k, n < N"),
        ("(x - shift - mean)", "(x - mean)"),
        ("2 * n + 1, n < N", "2 * n, n < N"),
        ("0.0).to(tl.float32) - x", "0.0).to(tl.float32) + x"),
        ("n[:, None] * P + p[None", "n[:, None] * K + p[None"),
    ],
    "kernels/patches/patches_triton._within": [
        ("c = p - q * C", "c = p - q * PW"),
        ("x = q - r * PW", "x = q - r * PH"),
        ("t = r // PH", "t = r // PW"),
    ],
    "kernels/patches/patches_torch._normalized": [
        ("rows.sub_(rows[:, :1].clone())", "rows.sub_(0 * rows[:, :1])"),
        ("eps * share", "eps / share"),
    ],
    "kernels/patches/patches_torch._judged": [
        ("e.clamp(-1, 1)", "e.clamp(-1, 2)"),
        ("alpha=0.5", "alpha=1.0"),
    ],
    "kernels/tokens/tokens_triton._gather_rows": [
        ("(ids < limit)", "(ids <= limit)"),
        ("b = r // n", "b = r % n"),
        (
            "tl.where(shown[:, None], x, token[None, :])",
            "tl.where(shown[:, None], token[None, :], x)",
        ),
        ("(r % n)[:, None] * D", "(r // n)[:, None] * D"),
        ("ids, 0) * s_r", "ids, 0) * s_b"),
    ],
    "kernels/tokens/tokens_triton._added": [
        ("x -= lost", "x += lost"),
        ("(after - total) - x", "0.0 * x"),
    ],
    "kernels/tokens/tokens_triton._restore_rows": [
        ("(ids >= 0) & (ids < K)", "(ids >= 0) & (ids <= K)"),
        ("tl.where((ids >= K)", "tl.where((ids > K)"),
        (
            "first = tl.program_id(0).to(tl.int64) * share",
            "first = tl.program_id(0).to(tl.int64) * 0",
        ),
        ("(part * L + l)", "(0 * part + l)"),
        ("b * g_b + place", "b * g_r + place"),
    ],
    "kernels/tokens/tokens_triton._scatter_rows": [
        ("tl.max(stop - start, 0)", "tl.min(stop - start, 0)"),
        ("more = start + j < stop", "more = start + j <= stop"),
        ("ORDER + b * n + start", "ORDER + start"),
        ("k * x_r", "k * x_b"),
        ("start_b + l + 1", "start_b + l + 2"),
    ],
    "kernels/tokens/bias_triton._pick": [
        ("(head % H) * b_h", "(head // H) * b_h"),
        ("b_i + q[None, :]", "b_i + p[None, :]"),
        ("head // H, i, K", "head % H, i, K"),
        ("(head * K + i)", "(head + i)"),
        ("p[:, None] * b_i", "p[:, None] * b_h"),
    ],
    "kernels/tokens/bias_triton._unpick": [
        ("h * g_h", "h * g_i"),
        ("i[:, None] * g_i + j[None, :] * g_j", "i[:, None] * g_j + j[None, :] * g_i"),
        ("total = after", "total = g"),
        ("(tl.program_id(0).to(tl.int64) * H + h) * L", "h * L"),
        ("% blocks * BLOCK_I", "// blocks * BLOCK_I"),
    ],
    "kernels/regression/cosine_triton._power": [
        ("gamma == 1.0, 1.0, 0.0", "gamma == 1.0, 0.0, 0.0"),
        ("gamma * slope", "slope"),
        ("2.0 * e", "e"),
    ],
    "kernels/regression/cosine_triton._forward": [
        ("cos > 1.0, 0.0, 1.0 - cos", "cos > 1.0, 1.0, 1.0 - cos"),
        ("tt += t * t", "tt = t * t"),
        ("place * p_r", "place * p_k"),
        ("tl.maximum(p_norm, EPS)", "p_norm"),
        ("STATS + 2 * R + r, t_norm", "STATS + 2 * R + r, p_norm"),
    ],
    "kernels/regression/cosine_triton._backward": [
        ("w = -slope", "w = slope"),
        ("p_norm > EPS, cos", "p_norm > EPS, 1.0"),
        ("dt = (p - along * t)", "dt = (t - along * p)"),
        ("(k * L + place)", "(k * n + place)"),
        ("(r % n) * g_r", "r * g_r"),
    ],
    "kernels/regression/chamfer_triton._squares": [
        ("total += delta * delta", "total = delta * delta"),
        ("x[:, None] - y[None, :]", "x[:, None] + y[None, :]"),
    ],
    "kernels/regression/chamfer_triton._nearest": [
        ("(total < best)", "(total <= best)"),
        ("g * x_g + n", "g * y_g + n"),
        ("& (m < M)[None, :]", "& (m <= M)[None, :]"),
        ("tl.where(best == least[:, None], places", "tl.where(best >= least[:, None], places"),
        ("tl.where(closer, m[None, :], places)", "tl.where(closer, start, places)"),
    ],
    "kernels/regression/chamfer_triton._factor": [
        ("tl.where(total > 0, tl.div_rn", "tl.where(total < 0, tl.div_rn"),
        ("total.shape, 2.0", "total.shape, 1.0"),
    ],
    "kernels/regression/chamfer_triton._pull": [
        ("back[None, :] == n[:, None]", "back[None, :] >= n[:, None]"),
        ("b * part", "a * part"),
        ("a * factor * delta", "b * factor * delta"),
        ("own += delta", "own = delta"),
        ("GRAD + g * grad_g", "GRAD + g"),
    ],
}
