"""Losses and collectives: which tests look at a file, and the tokens that are changed in it."""

AHEAD = "tests/losses/test_ahead.py"
EDGES = "tests/losses/test_edges.py"

TESTS = {
    "losses": (EDGES, ""),
    "losses/_checks": (
        "tests/losses/test_refusals.py tests/losses/test_dcl.py tests/losses/test_contrastive.py",
        "refuse or images",
    ),
    "losses/_loss": ("tests/losses/test_mmcr.py", "prints"),
    "losses/_unit": (EDGES, "length_one"),
    "losses/_contrastive": (
        "tests/losses/test_dcl.py tests/losses/test_moco.py tests/losses/test_grouped.py"
        " tests/losses/test_contrastive_ranks.py",
        "lightly or formula or joined",
    ),
    "losses/_moments": (f"tests/losses/test_vicreg.py {EDGES} {AHEAD}", "vicreg and not leading"),
    "losses/_ahead": (AHEAD, ""),
    "losses/vicreg": (f"{AHEAD} tests/losses/test_vicreg.py", ""),
    "losses/_ring": ("tests/losses/test_sharded.py", ""),
    "losses/_sharded": ("tests/losses/test_sharded.py", ""),
    "losses/ntxent": (
        "tests/losses/test_ntxent.py tests/losses/test_refusals.py tests/losses/test_ahead.py",
        "(not compiles) or ahead",
    ),
    "losses/dcl": ("tests/losses/test_dcl.py", ""),
    "losses/hcl": ("tests/losses/test_hcl.py", ""),
    "losses/supcon": ("tests/losses/test_supcon.py " + EDGES, "supcon"),
    "losses/nnclr": ("tests/losses/test_nnclr.py", "not rank"),
    "losses/queue": ("tests/losses/test_queue.py", "not rank"),
    "losses/mochi": ("tests/losses/test_mochi.py", "not rank"),
    "losses/moco": ("tests/losses/test_moco.py", ""),
    "losses/clip": ("tests/losses/test_clip.py tests/losses/test_ahead.py", "(not ranks) or ahead"),
    "losses/siglip": (
        "tests/losses/test_siglip.py tests/losses/test_ahead.py",
        "(joined_batch) or ahead",
    ),
    "losses/barlow_twins": ("tests/losses/test_barlow_twins.py tests/losses/test_ahead.py", ""),
    "losses/dense": ("tests/losses/test_dense.py", ""),
    "losses/groco": ("tests/losses/test_groco.py", "not rank"),
    "losses/isogclr": ("tests/losses/test_isogclr.py", "not rank"),
    "losses/latents": ("tests/losses/test_latents.py", ""),
    "losses/matryoshka": ("tests/losses/test_matryoshka.py", ""),
    "losses/mmcr": ("tests/losses/test_mmcr.py tests/losses/test_ahead.py", ""),
    "losses/reconstruction": ("tests/losses/test_reconstruction.py", ""),
    "losses/sie": ("tests/losses/test_sie.py", "not rank"),
    "losses/ssl_ey": ("tests/losses/test_ssl_ey.py tests/losses/test_ahead.py", ""),
    "losses/tico": ("tests/losses/test_tico.py", ""),
    "losses/vicregl": ("tests/losses/test_vicregl.py", ""),
    "losses/__init__": ("tests/losses/test_import.py", ""),
    "distributed": ("tests/test_distributed.py", ""),
}

MUTATIONS = {
    "losses/_ahead.nt_xent": [
        ("low >= 1e-9", "low >= -1"),
        ("value=-1).div_(norms)", "value=-1).mul_(norms)"),
        ("(g * y).sum(1", "(g * g).sum(1"),
    ],
    "losses/_ahead._whole_nt_xent": [
        ("above.zero_()", "above.clone()"),
        ("push.sum(0).neg_()", "push.sum(0)"),
        ("below.copy_(pull)", "below.copy_(-pull)"),
        ("weight + weight.unsqueeze(1)", "weight + weight"),
        ("len(y) * temperature", "len(y)"),
    ],
    "losses/_ahead._nt_xent": [
        ("mul_(-scale)", "mul_(scale)"),
        ("addcmul_(second, pull)", "addcmul_(first, pull)"),
        ("1 / abs(temperature)", "0 * temperature"),
        ("transpose(0, 1).flatten(0, 1)", "flatten(0, 1)"),
    ],
    "losses/_ahead._clip": [("float(low) <= SAFE", "float(low) <= 1e9")],
    "losses/_ahead._whole_clip": [
        ("e.sum(1), e.sum(0)", "e.sum(0), e.sum(1)"),
        ("line.copy_(pull)", "line.copy_(push[0])"),
        ("torch.mm(w.T, x)", "torch.mm(w, x)"),
        (".div_(scale)", ".mul_(scale)"),
        ("clamp_min_(_TINY)", "clone()"),
    ],
    "losses/_ahead._clip_by_tiles": [
        ("pull * cosine", "pull * own"),
        ("addcmul_(wide_t,", "addcmul_(wide_x,"),
        ("push.sum(0).neg_()", "push.sum(0)"),
    ],
    "losses/_ahead._siglip": [
        ("matches.neg_()", "matches.clone()"),
        ("w.sum().div_(len(x))", "w.sum()"),
        ("u.mul_(scale)", "u"),
    ],
    "losses/_ahead.centered": [("z.shape[1] - 1", "z.shape[1]")],
    "losses/vicreg._small": [
        ("self.mu_param / (2 * D)", "self.mu_param / D"),
        ("gaps.sign_()", "gaps"),
        ("dz[1].sub_(difference)", "dz[1].add_(difference)"),
        ("4 * self.nu_param / D", "2 * self.nu_param / D"),
    ],
    "losses/ssl_ey._small": [
        (".add_(rows)", ""),
        ("between - own", "between + own"),
        ("mul_(4 *", "mul_(2 *"),
    ],
    "losses/mmcr._alone": [
        ("alpha=1 / z.shape[1]", "alpha=1 / z.shape[0]"),
        ("self.lmda / len(z)", "self.lmda"),
        (".sub_(spread)", ".add_(spread)"),
    ],
    "losses/barlow_twins._at_once": [
        ("torch.mm(b, C.T", "torch.mm(b, C"),
        ("gap.mul_(2 * self.scale / N)", "gap.mul_(2 / N)"),
        ("2 * self.scale * self.lambda_param / N", "self.scale * self.lambda_param / N"),
    ],
    "losses/__init__.*": [("from .barlow", "import torch._dynamo\nfrom .barlow")],  # fault 19
    # fault 35: numbers at the edge
    "losses/_unit.unit": [
        ("1e-10", "0.0"),
        ("> 1e15", "> 1e38"),
        ("low >= 1e-9 and", ""),
        ("and high <= 1e15", ""),
    ],
    "losses/_checks.check_positive": [("value > 0", "value >= 0")],
    "losses/_checks.check_not_negative": [("value >= 0", "value >= -1")],
    "losses/_checks.is_finite": [("isfinite(value)", "isnan(value) is False")],
    "losses/_checks.check_embeddings": [("or 0 in x.shape", "or False"), ("> 1:", "> 9:")],
    "losses/_checks.check_batch": [("images < least", "images < 1")],
    "losses/_loss.Loss": [("!= LOCAL", "== LOCAL")],
    "losses/_contrastive.info_nce": [("-F.logsigmoid", "F.logsigmoid")],
    "losses/_contrastive.against_queue": [("1 / temperature", "temperature")],
    "losses/_contrastive.lse_of_others": [("(Rule(exclude_self, ids, ids),)", "()")],
    "losses/_contrastive.TwoViews": [("unflatten(0, (-1, 2)).unbind(1)", "unflatten(0, (2, -1))")],
    "losses/_contrastive.others": [
        ("(Rule(exclude_self, self.images, self.images), *rules)", "rules")
    ],
    "losses/_contrastive.joined_ids": [("+ n *", "+ 0 *")],
    "losses/_moments.forward": [("rows.sub_(rest)", "rows.sub_(0)")],
    "losses/_moments.variance_covariance": [
        ("(n - 1) * scale**2", "n * scale**2"),
        ("unit**2 /", "unit /"),
    ],
    "losses/_moments._ByPosition": [("4 * sums", "2 * sums")],
    "losses/_ring._Journey": [
        ("self.W // 2 + 1", "self.W // 2"),
        ("not met_twice or", "met_twice or"),
    ],
    "losses/_ring._RingLSE": [("grad_rows + grad_cols", "grad_rows"), ("dq += carried", "dq += 0")],
    "losses/_sharded.sharded_lse": [(".logsumexp(0)", ".amax(0)")],
    "losses/ntxent.NTXentLoss": [(">= 1e-8", ">= -1"), ("z0.requires_grad and", "True and")],
    "losses/dcl._mises_fisher": [("2 - len", "1 - len"), ("/ sigma", "* sigma")],
    "losses/hcl.forward": [
        ("1 + self.beta", "self.beta"),
        ("_replace(dtype=views.rows.dtype)", "_replace()"),
    ],
    "losses/hcl._debiased": [("log1p(-self", "log1p(self"), ("share >= 0", "share >= 1e9")],
    "losses/supcon.forward": [
        ("rows.detach().view_as(z) - z.detach()", "z.detach() - z.detach()"),  # fault 35, 16 bits
        (".clamp(max=0)", ".clamp(max=-1e9)"),
        ("images * V - 1", "images * V"),
    ],
    "losses/supcon._by_label": [("images[number] * V > 1", "images[number] * V > 0")],
    "losses/nnclr._find_neighbors": [("cosines.isnan(), cosines", "cosines.isnan(), 0 * keys[:1]")],
    "losses/queue.push": [("[-self.size :]", "[: self.size]"), ("unit(everyone)", "everyone")],
    "losses/mochi._mix_negatives": [("unsqueeze(-1) / 2", "unsqueeze(-1)")],
    "losses/moco.MoCoV3Loss": [("2 * t * info_nce", "t * info_nce")],
    "losses/clip.forward": [("/ 2\n", "\n"), ("0 * logit_bias", "1 * logit_bias")],  # fault 6
    "losses/siglip._travel": [("hop + 1 < W", "hop + 2 < W"), ("(me - hop) % W", "me")],
    "losses/barlow_twins._weigh": [("/ n**2", "/ n"), ("- 1).square()", "+ 1).square()")],
    "losses/barlow_twins.MixedBarlowTwinsLoss": [("b[perm]", "b"), ("0 <= alpha <= 1", "0 <= 1")],
    "losses/dense._ImageLSE": [("k[i], w.mT @ q[i]", "k[i], w @ k[i]"), ("total > 0", "total > 1")],
    "losses/dense.forward": [("(match >= 0) &", "(match >= 1) &")],
    "losses/groco._order_loss": [(".flip(1)", ""), ("1 - mass[:, :-1]", "mass[:, :-1]")],
    "losses/isogclr.forward": [
        ("log1p(-self.gamma)", "log(self.gamma)"),
        ("- log_n - now", "- now"),
    ],
    "losses/isogclr._update": [("(1 - self.beta)", "(0 + self.beta)")],
    "losses/latents.ScaledCosineLoss": [("gamma < 1", "gamma < 0")],
    "losses/matryoshka._prefix": [("..., :m", "..., -m:")],
    "losses/mmcr._inverse_root": [
        ("sigma > resolved", "sigma > 0 * resolved"),
        ("+ broken, root", ", root"),
    ],
    "losses/sie.terms": [("hinge) / 2", "hinge)"), ("unbiased=True", "unbiased=False")],
    "losses/ssl_ey.forward": [("2 * unit", "unit"), ("within * unit**2", "within * unit")],
    "losses/tico._Terms": [("2 * ctx.rho", "ctx.rho")],
    "losses/tico._meet": [("self.C = new", "self.C = old")],
    "losses/vicregl._match": [("largest=False", "largest=True")],
    "losses/vicregl.__init__": [("nu_param / 2", "nu_param")],
    # Ranks whose dtypes differ (fault 35), and the adjoints.
    "distributed.require_all_even": [
        ("_DTYPES.index(x.dtype)", "0"),
        ("len(set(shapes)) > 1", "len(set(shapes)) > 9"),
        ("len(set(counts)) > 1", "len(set(counts)) > 9"),
        ("row[0] > 7", "row[0] > 8"),
    ],
    "distributed.all_reduce_sum": [("_reduce, _reduce)", "_reduce, lambda grad, group: grad)")],
    "distributed._scatter_sum": [("mine.to(x.dtype)", "x[: len(mine)]")],
    "distributed._reduce": [("x.float() if half", "x.clone() if half")],
    "distributed.all_agree": [("ReduceOp.MIN", "ReduceOp.MAX")],
}
