"""A training step of DINOv2, written out from its formulas: float64, everything materialized.

G global views, V in all, of b images on each of W ranks; K prototypes

head(x) = (z / |z|) (g v / |v|)'      z = W3 gelu(W2 gelu(W1 x))
dino    sum over g != v of mean_b CE(q_g, p_v) / number of such pairs
ibot    1 / (G b) sum over hidden patches of CE(q, p) / hidden in its view
koleo   - sum over global views of mean_b log(|x - x_nn + 1e-8| + 1e-8), x of length 1
q       softmax((t - c) / teacher_temp); Sinkhorn's: t / teacher_temp by three iterations
c       <- 0.9 c + 0.1 mean t, after the step; teacher <- m teacher + (1 - m) student
"""

import torch
import torch.nn.functional as F


def tokens(vit, images, mask_token=None, hidden=None):
    """Class token (B, E) and patches (B, L, E), normed; the mask token stands for hidden ones."""
    x = vit.patch_embed(images)
    if hidden is not None:
        x = torch.where(hidden.view(*x.shape[:-1], 1), mask_token, x)
    x = vit.norm(vit.blocks(vit.norm_pre(vit._pos_embed(x))))
    return x[:, 0], x[:, 1:]


def scores(head, x):
    """(..., K); head: {"0.weight", "0.bias", ..., "weight_v", "weight_g"}."""
    linear = sorted({int(name.split(".")[0]) for name in head if name[0].isdigit()})
    for n in linear:
        x = x @ head[f"{n}.weight"].T + head[f"{n}.bias"]
        x = x if n == linear[-1] else F.gelu(x)
    v = head["weight_v"]
    w = v / v.norm(dim=1, keepdim=True) * head.get("weight_g", 1)
    return x / x.norm(dim=-1, keepdim=True) @ w.T


def sinkhorn(t, temp):
    """The assignment of rows t (R, K), of all ranks."""
    Q = (t / temp).exp().T
    K, R = Q.shape
    Q = Q / Q.sum()
    for _ in range(3):
        Q = Q / Q.sum(1, keepdim=True) / K
        Q = Q / Q.sum(0, keepdim=True) / R
    return (Q * R).T


def assign(ranks, center, temp):
    """The targets of each rank's rows, by the center or, where there is none, Sinkhorn."""
    if center is not None:
        return [((t - center) / temp).softmax(-1) for t in ranks]
    return sinkhorn(torch.cat(ranks), temp).split([len(t) for t in ranks])


def cross_entropy(q, s, temp):
    return -(q * (s / temp).log_softmax(-1)).sum(-1)


def koleo(x):
    x = x / x.norm(dim=1, keepdim=True)
    near = (x @ x.T).fill_diagonal_(-2).argmax(1)
    return -((x - x[near] + 1e-8).norm(dim=1) + 1e-8).log().mean()


def losses(student, teacher, batches, centers, temps, G):
    """[{"dino", "ibot", "koleo"} of each rank], and what the centers move towards.

    student, teacher: {"vit", "head", "patch_head", "mask_token"}; batches: of each rank {"views",
    "hidden" (b, G, L)}; centers: of the views and of the patches, or None.
    """
    with torch.no_grad():
        seen = [[tokens(teacher["vit"], view) for view in batch["views"][:G]] for batch in batches]
        views_t = [torch.stack([scores(teacher["head"], c) for c, _ in own]) for own in seen]
        hidden_t = [
            torch.cat([patches[b["hidden"][:, g]] for g, (_, patches) in enumerate(own)])
            for own, b in zip(seen, batches, strict=True)
        ]
        patches_t = [scores(teacher["patch_head"], x) for x in hidden_t]
        q_views = assign([t.flatten(0, 1) for t in views_t], centers[0], temps[1])
        q_patches = assign(patches_t, centers[1], temps[1])
        means = [torch.cat([t.flatten(0, -2) for t in x]).mean(0) for x in (views_t, patches_t)]
    found = []
    for batch, q, q_hidden in zip(batches, q_views, q_patches, strict=True):
        views, hidden = batch["views"], batch["hidden"]
        b, q = len(hidden), q.unflatten(0, (G, -1))
        made = [tokens(student["vit"], v, student["mask_token"], hidden[:, g] if g < G else None)
                for g, v in enumerate(views)]  # fmt: skip
        s = [scores(student["head"], c) for c, _ in made]
        pairs = [(g, v) for g in range(G) for v in range(len(views)) if v != g]
        dino = sum(cross_entropy(q[g], s[v], temps[0]).mean() for g, v in pairs) / len(pairs)
        rows = torch.cat([made[g][1][hidden[:, g]] for g in range(G)])
        each = cross_entropy(q_hidden, scores(student["patch_head"], rows), temps[0])
        count = torch.cat([hidden[:, g].sum(1)[:, None].expand(-1, hidden.shape[2])[hidden[:, g]]
                           for g in range(G)])  # fmt: skip
        ibot = (each / count).sum() / (G * b)
        spread = sum(koleo(made[g][0]) for g in range(G))
        found.append({"dino": dino, "ibot": ibot, "koleo": spread})
    return found, means
