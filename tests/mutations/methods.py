"""Methods: which tests look at a file, and the tokens that are changed in it."""

JOINT = "tests/methods/test_methods.py"
VIEWS = "tests/methods/test_views.py"
MASKED = "tests/methods/test_masked_images.py"
PRETEXT = "tests/methods/test_pretext.py"

TESTS = {
    "methods/gmml": (JOINT, "gmml"),
    "methods/views": (VIEWS, ""),
    "methods/global_local": ("tests/methods/test_global_local.py", ""),
    "methods/clip": (JOINT, "clip"),
    "methods/nnclr": (f"{JOINT} {VIEWS}", "nnclr"),
    "methods/mocov3": (f"{JOINT} {VIEWS}", "mocov3 or momentum"),
    "methods/mochi": (JOINT, "mochi"),
    "methods/groco": (JOINT, "groco"),
    "methods/isogclr": (JOINT, "isogclr"),
    "methods/matryoshka": (JOINT, "matryoshka"),
    "methods/point_cmae": ("tests/methods/test_point_mae.py", "two_decoders"),
    "methods/sie": (JOINT, "split_embeddings or share_that"),
    "methods/mae": (JOINT, "mae"),
    "methods/base": (JOINT, "plain_encoders or flag"),
    "methods/mixed_barlow_twins": ("tests/methods/test_mixed_barlow_twins.py", ""),
    "methods/simmim": (MASKED, "simmim"),
    "methods/ijepa": (MASKED, "ijepa"),
    "methods/data2vec": (MASKED, "data2vec"),
    "methods/cropmae": (MASKED, "cropmae"),
    "methods/places": (MASKED, "every_sort or resumed_schedule or impossible"),
    "methods/sla": (PRETEXT, "sla"),
    "methods/sit": (PRETEXT, "sit"),
    "methods/tjepa": ("tests/methods/test_tjepa.py", ""),
}

MUTATIONS = {  # place: (what stands in it or below, what it becomes)
    "methods/gmml.prepare": [("masking.masked\n", "masking.visible\n")],
    "methods/mixed_barlow_twins.prepare": [("x_b[perm]", "x_a[perm]")],
    "methods/views.global_views": [
        ("or len(views) == 2", "or len(views) == 1"),
        ("== max(sizes)", "== min(sizes)"),
    ],
    "methods/views.pairs": [("range(w)", "range(len(views)) if v != w"), ("& {v, w}", "& {v}")],
    "methods/views.queries": [("if g != v", "if g > v")],
    "methods/views.mean_over_pairs": [("/ len(losses)", "/ 1")],
    "methods/global_local.loss": [("(w, v)", "(v, w)"), ("self.cfg.local_weight *", "0 *")],
    "methods/global_local.same_places": [("y * m + x", "x * m + y"), ("/ n - 0.5", "/ m - 0.5")],
    "methods/clip.*": [("math.log(100)", "math.log(200)")],
    "methods/clip.loss": [
        ("clamp(min=0)", "clamp(max=0)"),
        ('nearest == batch["label"]', 'nearest != batch["label"]'),
    ],
    "methods/clip.on_step": [("clamp_(max", "clamp(max")],
    "methods/nnclr.loss": [("(views)[-1]", "(views)[0]"), ("update=False", "update=True")],
    "methods/mocov3.loss": [("q[v], k[g]", "q[g], k[g]"), ("(2 / len(losses))", "(2 / 2)")],
    "methods/mocov3.targets": [("self.teacher.model.children()", "self.student.children()")],
    "methods/mochi.encode": [('["views"][0]', '["views"][1]')],
    "methods/mochi.loss": [("update=False", "update=True"), ('"keep": key', '"keep": encoded')],
    "methods/groco.__init__": [("cfg.negatives, ", "10, ")],
    "methods/isogclr.__init__": [("cfg.eta, sharded=False", "sharded=False")],
    "methods/isogclr.loss": [("z_0, z_1, batch", "z_0, z_0, batch")],
    "methods/matryoshka.__init__": [("cfg.weights or None", "None"), ("range(3,", "range(2,")],
    "methods/point_cmae.encode": [
        ("self.second, finish(", "self.decoder, finish("),
        ("hidden[0] & hidden[1]", "hidden[0] | hidden[1]"),
    ],
    "methods/mocov3.on_step": [("momentum, 1.0", "momentum, 0.9")],
    "methods/sie.__init__": [("if min(inv) < 1:", "if min(inv) < 0:")],
    "methods/sie.loss": [("parts[0][1], relation", "parts[1][1], relation")],
    "methods/mae.__init__": [("norm_pix=cfg.norm_pix", "norm_pix=False")],
    "methods/base.features": [(").float()", ")")],
    "methods/base.forward": [("if not prepared:", "if prepared:")],
    "methods/simmim.predict": [("self.masked.prefix :]", "self.masked.prefix - 1 : -1]")],
    "methods/ijepa.teach": [("self.student.prefix :", "self.student.prefix - 1 : -1")],
    "methods/data2vec.LayerMean": [
        ("-self.layers :", "-1 :"),
        ("layers > depth", "layers > depth + 1"),
    ],
    "methods/data2vec.on_step": [("progress / cfg.until", "progress")],
    "methods/cropmae.loss": [('["views"][1]', '["views"][0]')],
    "methods/places.set_extra_state": [("state.item()", "0.0")],
    "methods/places.draw_mask": [("!= prod(grid)", "> prod(grid)")],
    "methods/tjepa.__init__": [("> columns:", "> columns + 2:")],
    "methods/sla.loss": [
        ("4 * label[:, None]", "label[:, None]"),
        ("(logits).detach()", "(logits)"),
        ("encoded[:, 0]", "encoded[:, 1]"),
    ],
    "methods/sla.aggregate": [(".mean(-1)", ".sum(-1)")],
    "methods/sit.prepare": [
        ("draws[:2].flatten()", "draws[:1].repeat(1, 2).flatten()"),
        ("unflatten(0, (2, -1)).transpose(0, 1)", "unflatten(0, (-1, 2))"),
    ],
    "methods/sit.encode": [("P - 1", "0")],
    "methods/sit.loss": [("[R / 2,", "[R,"), ("s.sum() / 2", "s.sum()")],
}
