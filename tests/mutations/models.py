"""Models: which tests look at a file, and the tokens that are changed in it."""

TESTS = {
    "models/backbones": (
        "tests/models/test_backbones.py tests/test_cli.py",
        "efficientnet or encoder or dry_run",
    ),
    "models/heads": (
        "tests/models/test_heads.py tests/engine/test_engine.py",
        "heads or batch_norms_of_two",
    ),
    "models/dino_head": ("tests/models/test_heads.py", "dinos_head"),
    "models/stochastic_depth": ("tests/models/test_stochastic_depth.py", ""),
    "models/ema": ("tests/models/test_ema.py tests/train/test_frozen.py", "ema or leave_a_frozen"),
    "models/frozen": ("tests/train/test_frozen.py", "leave_a_frozen or resumes_and"),
    "models/deferred": ("tests/models/test_deferred.py", ""),
    "models/buffers": ("tests/engine/test_engine.py", "finite_moves"),
    "models/directpred": ("tests/models/test_directpred.py", ""),
    "models/masked_vit": ("tests/models/test_masked_vit.py", ""),
    "models/point": ("tests/models/test_point.py", ""),
    "models/tabular": ("tests/models/test_tabular.py", ""),
    "masking": ("tests/masking/test_laws.py tests/masking/test_blocks.py", ""),
}

MUTATIONS = {
    "models/dino_head.rows": [
        ('rows * self.weight_g if self.last == "scaled" else rows', "rows"),
        ("F.normalize(self.weight_v, dim=1)", "self.weight_v"),
    ],
    "models/dino_head.DINOHead": [
        ("modules[:-1]", "modules"),
        ("nn.init.zeros_(linear.bias)", "pass"),
        ("F.normalize(z, dim=-1", "F.normalize(z, dim=0"),
    ],
    "models/stochastic_depth._of_some": [
        ("alpha=len(x) / keep", "alpha=1"),
        ("max(1, int(", "max(0, int("),
    ],
    "models/stochastic_depth._dropping": [
        ("rope[chosen] if", "rope[: len(chosen)] if"),
        ("_scale(self, 2))", "_scale(self, 1))"),
    ],
    "models/stochastic_depth.drop_samples": [("m.drop_prob for m in", "False for m in")],
    "models/stochastic_depth.still": [
        ("module.drop_prob = 0.0", "pass"),
        ("module.p = 0.0", "pass"),
    ],
    "models/deferred.fills": [("whole and", "whole or")],
    "models/deferred.overwrites": [("len(read) == 1 and", ""), ("read[0].fills()", "True")],
    "models/deferred.__torch_function__": [
        ("if func in _FROM_PYTHON", "if False"),
        ("if func == _IS_META", "if False"),
    ],
    "models/deferred.__enter__": [
        ("self._inside.enter_context(_replaced(", "(lambda context: None)(_replaced(")
    ],
    "models/deferred._load": [
        ('if "mmap" in str(error)', "if False"),
        ("x.detach)", "x.new_zeros(x.shape).detach)"),
    ],
    "models/deferred._load_file": [("partial(_of_file, filename, key)", "x.clone")],
    "models/buffers.restore": [
        ("buffer.copy_(value)", "pass"),
        ("del module._buffers[name]", "pass"),
        ("module._buffers.update(buffers)", "pass"),
    ],
    "models/deferred._note": [
        ("if any(isinstance(x, torch.Generator)", "if not any(True"),
        ("| {", "& {"),
    ],
    "models/deferred.check": [
        ("if self.refused is not None", "if False"),
        ("if storage in names", "if False"),
        ("if storage not in self._of", "if False"),
        ("if any(_on_meta(x)", "if any(False"),
    ],
    "models/deferred._note_draw": [
        ("if not self._draws", "if True"),
        ('torch.rand((), device="cpu")', "None"),
    ],
    "models/deferred._try_draws": [
        ("place not in operation.changed", "False"),
        ("size < smallest", "size > smallest"),
        ("operation.run_apart()", "pass"),
    ],
    "models/deferred._state_before": [
        ("append(torch.get_rng_state())", "append(self._began)"),
        ("self._states[-1]", "self._began"),
    ],
    "models/deferred._replayed": [
        ("draw + 1 == len(self._states)", "draw is not None"),
        ("if n < until", ""),
        ("leaf.storage != place.storage", "True"),
    ],
    "models/deferred._noted": [('x.type == "meta"', "False"), ("x.detach().clone() if", "x if")],
    "models/masked_vit.grid_of": [("s and s % p", "s % p"), (" and len(sides)", " or len(sides)")],
    "models/masked_vit.encode": [("grid != self.grid and", "grid == self.grid and")],
    "models/masked_vit._with_prefix": [
        ("grid != self.grid", "grid == self.grid"),
        ("0 if vit.no_embed_class else P", "0"),
    ],
    "models/masked_vit._rotary_blocks": [("(shape=grid)", "(shape=self.grid)")],
    # faults 1 and 15
    "models/backbones.channels_of": [("== shapes", "!= shapes")],
    "models/backbones.build_backbone": [
        ("key in _REFUSED and", "False and"),
        ("features.ndim != 2", "features.ndim != 3"),
        ("LookupError, OSError", "OSError"),
    ],
    "models/backbones.probe": [("if side % patch", "if side < patch")],
    "models/backbones.backbone_arguments": [
        ('"in_chans": shape[0], **family', '"in_chans": 3, **family')
    ],
    # fault 3
    "models/heads._GlobalNorm": [
        ("@partial(first_order, whose=whose, instead=instead)", "@first_order"),
        ("(means - mean).square()", "0"),
        ("all_reduce_sum(sums) / count", "sums / count"),
        ("z * per_channel(shared[1])", "z"),
    ],
    "models/heads._normalize_globally": [
        ("count / (count - 1)", "1"),
        ("_GlobalNorm.call(", "_GlobalNorm.apply("),
    ],
    "models/heads.BatchNorm1d": [("world_size() == 1", "world_size() > 0")],
    "models/heads.synchronize_batch_norms": [("plain or hasattr", "hasattr")],
    "models/heads._synchronized": [("self.act(self.drop(y))", "y")],
    "models/heads.average_running_statistics": [("/ world_size()", "/ 1")],
    "models/heads.projection_head": [("affine=not last", "affine=last")],
    "models/frozen.freeze": [("requires_grad_(False)", "requires_grad_(True)")],
    "models/frozen.set_aside": [("{part: {} for part in parts}", "{}")],
    "models/frozen.shared_copies": [("memo[id(part)] = part", "pass")],
    # fault 36
    "models/ema.update": [
        ("for _, theirs in some], 1 - momentum", "for _, theirs in some], momentum"),
        ("for _, s in whole], 1 - momentum", "for _, s in whole], momentum"),
        ("halves[n : n + _AT_ONCE], self", "halves[:_AT_ONCE], self"),
        ("mine.copy_(theirs)", "mine.copy_(mine)"),
    ],
    "models/ema.EMA": [("mine.float()", "mine")],
    "models/ema.float32_masters": [
        ("if begin and not", "if False and not"),
        ("if id(p) not in shared", ""),
    ],
    "models/ema.set_extra_state": [("copy=True", "copy=False")],
    "models/directpred.update": [
        ("1 - self.rho if", "self.rho if"),
        ("self.steps % self.every", "0"),
    ],
    "models/directpred._predictor": [("torch.nan)", "0)")],
}
