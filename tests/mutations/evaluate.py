"""Evaluation: which tests look at a file, and the tokens that are changed in it."""

TESTS = {
    "evaluate": ("tests/evaluate/test_spread.py tests/evaluate/test_knn.py", ""),
    "evaluate/__init__": ("tests/evaluate/test_evaluate.py", ""),
    "evaluate/embed": ("tests/evaluate/test_embed.py", ""),
    "evaluate/knn": ("tests/evaluate/test_knn.py", ""),
    "evaluate/linear": ("tests/evaluate/test_linear.py", ""),
}

MUTATIONS = {  # function: (what stands in it or below, what it becomes)
    "evaluate/embed.subset": [
        ("mix(EVALUATE, 0, np.arange(count))", "mix(EVALUATE, 0, np.zeros(count))"),
        ("/ own", "* own"),
        ("- first)", "+ first)"),
        ("[:limit]", "[-limit:]"),
        ("groups[order]", "groups[:count]"),
    ],
    "evaluate/embed.embed": [
        ("len(source) > cfg.limit", "len(source) < cfg.limit"),
        ("subset(source.labels,", "subset(None,"),
        ('bad += batch["bad"]', 'bad = batch["bad"]'),
    ],
    "evaluate/embed._join": [
        ("source.labels[index]", "source.labels[order]"),
    ],
    "evaluate/embed.two_views": [
        ("subset(source.labels,", "subset(None,"),
        ("sample_seed(seed, draw, i)", "sample_seed(seed, 0, i)"),
        ("except BadItem", "except KeyError"),
        ("if not pairs:", "if pairs is None:"),
    ],
    "evaluate/_checks.directions": [
        ("x.abs().amax", "x.amax"),
        ("largest == 0", "largest == 1"),
        ("x / largest", "x / 1 ** largest"),
    ],
    "evaluate/_checks.checked_features": [
        (".any(dim=1)", ".all(dim=1)"),
        ("x.detach().float()", "x.detach()"),
        ("x.shape[0] < 2", "x.shape[0] < 1"),
    ],
    "evaluate/knn.knn_accuracy": [
        ("directions(rows)", "rows.sign()"),
        ("directions(train_x)", "train_x"),
        ("/ temperature", "* temperature"),
        ("s_Mk.amax(1, keepdim=True)", "s_Mk.amin(1, keepdim=True)"),
        ("min(k, len(keys))", "max(k, len(keys))"),
        ("classes[votes_MC.argmax(1)]", "votes_MC.argmax(1)"),
    ],
    "evaluate/alignment_uniformity.alignment": [
        ("directions(a)", "a"),
        ("directions(b)", "b"),
        (".pow(alpha)", ".pow(2)"),
    ],
    "evaluate/alignment_uniformity.uniformity": [
        ("(x == 0).all(1", "(x == 0).any(1"),
        ("torch.cat([directions(x), zero]", "torch.cat([directions(x), 0 * zero]"),
        ("x, 2 * t,", "x, t,"),
        ("len(x) * (len(x) - 1)", "len(x) * len(x)"),
    ],
    "evaluate/rankme.spectrum": [
        ("tall else mean[:, None]", "tall else mean"),
        ("(len(x) - int(centered))", "len(x)"),
    ],
    "evaluate/linear.fit_probe": [
        ("1e-6 * mean.abs()", "1e-6 * 0"),
        ("(l2 * len(x))", "(l2 * 1)"),
    ],
    "evaluate/__init__.evaluate_features": [
        ("if train_y is not test_y:", "if train_y is test_y:"),
        ("len(train_y.unique()) < 2", "len(train_y.unique()) < 1"),
    ],
}
