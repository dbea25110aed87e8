"""Reports: which tests look at a file, and the tokens that are changed in it."""

TESTS = {"report/curves": ("tests/report/test_pictures.py", "stacked")}

MUTATIONS = {  # place: (what stands in it or below, what it becomes)
    "report/curves.plot_curves": [("+ bool(times)", "")],
    "report/curves._stack": [
        ("[parts[:, :1], parts]", "[parts, parts[:, -1:]]"),
        ("2 * np.median(total)", "9 * np.median(total)"),
    ],
}
