"""The plan: which tests look at a file, and the tokens that are changed in it."""

PLAN = "tests/test_plan.py"

TESTS = {
    "diagnose/memory": (PLAN, "by_hand or cut_at"),
    "diagnose/speed": (PLAN, "by_hand or those_measured"),
    "diagnose/counting": (PLAN, "of_all_ranks or transformer or exact_large or launches_kernels"),
    "diagnose/hardware": (PLAN, "makers or by_hand or refusals or would_be"),
    "diagnose/replay": (PLAN, "kind_of_operator"),
    "diagnose/plan": (PLAN, "refusals or micro_batches_do or command or not_be_there"),
    "diagnose/bottleneck": ("tests/test_bottleneck.py", "or_none"),
    "distributed": (PLAN, "of_all_ranks"),
}

MUTATIONS = {  # place: (what stands in it or below, what it becomes)
    "diagnose/bottleneck._prepare": [("with distributed.alike():", "if True:")],
    "diagnose/memory.memory": [
        ("cut = W if stage == 3 else 1", "cut = W if stage == 2 else 1"),
        ("share = T / W if stage else T", "share = T / W"),
        ("(6 if half else 4)", "(2 if half else 4)"),
        ("masters = 4 * share if half or stage else 0", "masters = 4 * share if stage else 0"),
        ("full = b if on_cpu", "full = zero.bucket if on_cpu"),
        ("lower = 0 if stage == 3", "lower = w if stage == 3"),
        ("zero.stepped + sizes.largest / W", "zero.stepped"),
        ("max(b, sizes.largest)", "b"),
        ("most = T if rule.whole", "most = T if not rule.whole"),
        ("(grads if not zero.cuts else 0)", "0"),
    ],
    "diagnose/memory.at_stage": [("cuts=stage >= 2", "cuts=stage >= 4")],
    "diagnose/speed.Cluster": [
        ("self.device.nic * self.per_node", "self.device.nic"),
        ("(self.world - 1) / self.world", "1"),
    ],
    "diagnose/speed.traffic": [
        ("times = parts if zero.cuts else 1", "times = 1"),
        ("2 * grads * times", "grads * times"),
    ],
    "diagnose/speed.work_seconds": [("call.moved / moved, KERNEL", "KERNEL")],
    "diagnose/speed._on_cpu": [
        ("max(call.seconds, device.launch)", "call.seconds"),
        ("rate) + device.launch", "rate)"),
    ],
    "diagnose/replay.measure": [
        ("key=cost, reverse=True", "key=cost"),
        ("min(found, _known", "max(found, _known"),
    ],
    "diagnose/replay._filled": [("(n - 1) * step", "n * step - n")],
    "diagnose/hardware.planned_on": [('asked != "cpu"', 'asked == "cpu"')],
    "diagnose/counting._run": [
        ("with meter.into(found.encode_backward)", "with meter.into(found.encode)")
    ],
    "diagnose/counting._joined": [
        ("row = leaf.new_empty(found.rows,", "row = leaf.new_empty(found.micro,")
    ],
    "diagnose/counting._grown": [("shape if key in as_shape else whole", "whole")],
    "diagnose/counting.count": [("pretend(_SOME_GPU) if on_gpu", "nullcontext() if on_gpu")],
    "diagnose/hardware._gpu": [("TERA * rate for", "GB * rate for")],
    "diagnose/hardware.with_rates": [("0 < efficiency <= 1", "0 < efficiency")],
    "diagnose/plan.check_cluster": [
        ("if W % nodes:", "if nodes % W:"),
        ("cfg.batch_size % (W * parts)", "cfg.batch_size % W"),
    ],
    "diagnose/plan.data_of": [
        ("images < cfg.batch_size", "images < 1"),
        ('not in ("image", "clip")', 'not in ("image",)'),
        ('not in ("image", "clip")', "is None"),
    ],
    "distributed.require_all_even": [("== 1 or _alike", "== 1")],
}
