"""Methods: which tests look at a file, and the tokens that are changed in it."""

JOINT = "tests/methods/test_methods.py"
MASKED = "tests/methods/test_masked_images.py"

TESTS = {
    "methods/gmml": (JOINT, "gmml"),
    "methods/clip": (JOINT, "clip"),
    "methods/nnclr": (JOINT, "nnclr"),
    "methods/mocov3": (JOINT, "mocov3 or momentum"),
    "methods/sie": (JOINT, "split_embeddings or share_that"),
    "methods/mae": (JOINT, "mae"),
    "methods/base": (JOINT, "plain_encoders"),
    "methods/simmim": (MASKED, "simmim"),
    "methods/ijepa": (MASKED, "ijepa"),
    "methods/data2vec": (MASKED, "data2vec"),
    "methods/cropmae": (MASKED, "cropmae"),
    "methods/places": (MASKED, "every_sort or resumed_schedule or impossible"),
    "methods/tjepa": ("tests/methods/test_tjepa.py", ""),
}

MUTATIONS = {  # place: (what stands in it or below, what it becomes)
    "methods/gmml.__init__": [('("swap", "mixed")', '("mixed",)')],
    "methods/clip.*": [("math.log(100)", "math.log(200)")],
    "methods/clip.forward": [
        ("clamp(min=0)", "clamp(max=0)"),
        ('nearest == batch["label"]', 'nearest != batch["label"]'),
    ],
    "methods/clip.on_step": [("clamp_(max", "clamp(max")],
    "methods/nnclr.forward": [
        ("nan_to_num(0.0, 0.0, 0.0)", "clone()"),
        ("if self.training:", "if loss is not None:"),
        ("push(z_1", "push(z_0"),
    ],
    "methods/mocov3.forward": [("self.loss(q_0, k_1)", "self.loss(q_0, k_0)")],
    "methods/mocov3.on_step": [("momentum, 1.0", "momentum, 0.9")],
    "methods/sie.__init__": [("if min(inv) < 1:", "if min(inv) < 0:")],
    "methods/sie.forward": [("parts[0][1], relation", "parts[1][1], relation")],
    "methods/mae.__init__": [("norm_pix=cfg.norm_pix", "norm_pix=False")],
    "methods/base.features": [(").float()", ")")],
    "methods/simmim.predict": [("self.masked.prefix :]", "self.masked.prefix - 1 : -1]")],
    "methods/ijepa.targets": [("self.student.prefix :", "self.student.prefix - 1 : -1")],
    "methods/data2vec.LayerMean": [
        ("-self.layers :", "-1 :"),
        ("layers > depth", "layers > depth + 1"),
    ],
    "methods/data2vec.on_step": [("progress / cfg.until", "progress")],
    "methods/cropmae.forward": [("prediction, crop,", "prediction, whole,")],
    "methods/places.set_extra_state": [("state.item()", "0.0")],
    "methods/places.draw_mask": [("!= prod(grid)", "> prod(grid)")],
    "methods/tjepa.__init__": [("> columns:", "> columns + 2:")],
}
