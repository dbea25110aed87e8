"""Every number argument of every loss: finite and in range, or refused by its name."""

import inspect

import pytest

from fastssl import losses

INF, NAN = float("inf"), float("nan")
BAD = {  # what each argument must refuse beside infinities and NaN
    "temperature": [0.0, 1e-9],
    "sigma": [0, -1],
    "tau_plus": [-0.1, 1],
    "label_smoothing": [-0.1, 1.1],
    "beta": [-0.1],
    "rho": [-0.1],
    "eta": [-0.1],
    "steepness": [0, -1],
    "gamma": [0.9],
    "lmda": [-0.1],
    "mixup": [-1],
    "scale": [-1],
    "alpha": [-0.1, 1.5],
    "eps": [-1],
    "tau_init": [0, 2.0],
    "p": [0, -1],
    "sinkhorn_epsilon": [0, -1],
    "center_momentum": [-0.1, 1.1],
    "regularization_weight": [],
    **{name: [0, -1] for name in ("teacher_temperature", "student_temperature")},
    **{name: [1, 2.5] for name in ("knots", "sigreg_knots")},
    **{name: [0, 2.5] for name in ("num_vectors", "sigreg_num_vectors", "num_slices", "topk")},
    **{name: [0, -1] for name in ("t_max", "sigreg_t_max", "tol")},
    **{name: [-0.1] for name in ("lambda_scale", "lambda_shape", "lambda_center", "weight")},
    **{name: [0, 1.5] for name in ("local_clusters", "global_clusters", "max_kmeans_iters")},
    "power_law_exponent": [],
    **{name: [0, -1] for name in ("student_temp", "teacher_temp", "warmup_teacher_temp")},
    **{name: [0, 1.5] for name in ("output_dim", "sinkhorn_iterations")},
    "warmup_teacher_temp_epochs": [-1, 1.5],
    **{name: [-0.1] for name in ("lambda_param", "mu_param", "nu_param")},
    **{f"lambda_{part}": [-0.1] for part in ("inv", "equi", "var", "cov")},
    **{name: [0, -1, 2.5] for name in ("size", "dim", "negatives", "top_n")},
    **{name: [-1, 2.5] for name in ("s", "s_prime")},
    **{name: [0, -1] for name in ("t", "tcr_eps", "student_temperature")},
    **{name: [] for name in ("inv_coef", "tcr_coef", "invariance_weight")},
    **{
        name: [-0.1] for name in ("lam", *(f"{part}_loss_weight" for part in ("sim", "var", "cov")))
    },
    **{name: [0, 1.5] for name in ("loss_dim", "embedding_dim", "w_iter", "w_size", "num_samples")},
    "A_0": [-0.1, 1.5],
    "momentum": [-0.1, 1.1],
}
NEEDED = {"ISogCLRLoss": {"size": 8}, "MoCHiLoss": {"dim": 4, "size": 8, "top_n": 2}}
NEEDED |= {"PMSNCustomLoss": {"target_distribution": abs}}
NEEDED |= {"MoCoLoss": {"dim": 4}, "MAELoss": {"patch": 2}, "NNCLRLoss": {"size": 8}}
OTHERS = {"MatryoshkaLoss"}  # sequences: see its own tests
KINDS = {"negatives": "GroCoLoss"}  # elsewhere a word
LOSSES = [name for name in vars(losses) if name.endswith("Loss")]
LOSSES = sorted([*LOSSES, "SIGReg", "DSERegularizer"])


def number_arguments():
    for name in sorted(set(LOSSES) - OTHERS):
        kind = getattr(losses, name)
        parameters = set(inspect.signature(kind).parameters)
        if "options" in parameters:  # of the class it builds on
            parameters |= set(inspect.signature(kind.__bases__[0]).parameters)
        for argument in sorted(parameters & set(BAD)):
            if KINDS.get(argument, name) == name:
                yield name, argument


@pytest.mark.parametrize("name, argument", list(number_arguments()))
def test_refuses_a_number_by_its_name(name, argument):  # fault 35
    kind, needed = getattr(losses, name), NEEDED.get(name, {})
    kind(**needed)
    own = [b for b in BAD[argument] if not (argument == "gamma" and name != "ScaledCosineLoss")]
    if argument == "sinkhorn_iterations" and name not in ("SwaVLoss", "CAPILoss"):
        own = [-1, 1.5]  # MSN's without any take targets as they are
    if (name, argument) == ("HypersphereLoss", "alpha"):  # a power
        own = [0, -1]
    for bad in [*own, INF, -INF, NAN, "a word"]:
        with pytest.raises(ValueError, match=f"(?s){argument}.* must .*got .*{bad}"):
            kind(**(needed | {argument: bad}))


def test_the_table_has_every_number():
    """An argument with a number for its default stands in the table."""
    known = {*BAD, "rank", "world_size", "memory_bank_size"}
    for name in LOSSES:
        for argument, about in inspect.signature(getattr(losses, name)).parameters.items():
            if isinstance(about.default, (int, float)) and not isinstance(about.default, bool):
                assert argument in known, (name, argument)
