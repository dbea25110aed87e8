import pytest
import torch

from fastssl.kernels import gather_patches
from fastssl.masking import corrupt, corruption, random_masking
from fastssl.masking.places import words
from tests.oracle import DEVICE


def seeds(n, start=0):
    return torch.arange(start, start + n, device=DEVICE)


def batch(shape=(3, 8, 12), n=5, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(n, *shape, device=DEVICE) * 3 + 1
    return x.to(dtype) if dtype.is_floating_point else x.mul(20).clamp(0, 255).to(dtype)


CASES = {
    "images": ((3, 8, 12), (4, 3), (2, 4)),
    "signals": ((2, 30), 5, (6,)),
    "clips": ((1, 4, 6, 6), (2, 3, 2), (2, 2, 3)),
}


@pytest.mark.parametrize("shape, patch, grid", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_masked_patches_are_replaced_and_no_others(shape, patch, grid, dtype):
    images = batch(shape, dtype=dtype)
    before = images.clone()
    L = int(torch.tensor(grid).prod())
    mask = random_masking(seeds(5), L, L // 2)
    for kind in ("zeros", "swap", "noise", "mixed"):
        out = corrupt(images, seeds(5), mask, patch, kind)
        assert out.shape == images.shape and out.dtype == dtype and torch.equal(images, before)
        assert torch.equal(
            gather_patches(out, mask.visible, patch), gather_patches(images, mask.visible, patch)
        )
        got = gather_patches(out, mask.masked, patch)
        if kind == "zeros":
            assert (got == 0).all()
        elif kind == "swap":
            assert torch.equal(got, gather_patches(images.roll(-1, 0), mask.masked, patch))
        else:
            assert (got != gather_patches(images, mask.masked, patch)).any(-1).all()


def all_hidden(n, L):
    mask = random_masking(seeds(n), L, 1)
    everything = torch.arange(L, device=DEVICE).expand(n, L)
    return mask._replace(visible=everything[:, :0], masked=everything, restore=everything)


def test_noise_is_standard_normal():
    x = corrupt(batch((3, 64, 64), 8), seeds(8), all_hidden(8, 16), 16).double()
    n = x.numel()
    assert abs(x.mean()) < 4.5 / n**0.5 and abs(x.var() - 1) < 4.5 * (2 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 4.5 * (96 / n) ** 0.5
    assert abs((x[..., 1:] * x[..., :-1]).mean()) < 4.5 / n**0.5
    assert abs((x[1:] * x[:-1]).mean()) < 4.5 / n**0.5
    half = x.flatten(1).unflatten(1, (2, -1))  # two numbers of one word
    assert abs((half[:, 0] * half[:, 1]).mean()) < 4.5 / n**0.5


def test_odd_numbers_of_values():
    images, mask = batch((1, 3, 9), 4), random_masking(seeds(4), 3, 2)
    for x in (images, images.mul(9).clamp(0, 255).to(torch.uint8)):
        out = corrupt(x, seeds(4), mask, 3)
        hidden = gather_patches(out, mask.masked, 3)
        assert (hidden != gather_patches(x, mask.masked, 3)).any(-1).all()
        assert len({tuple(p) for p in hidden.flatten(0, 1).tolist()}) == 4


@pytest.mark.parametrize("dtype, a_word", [(torch.float32, 2), (torch.uint8, 8)], ids=str)
def test_only_hidden_patches_are_drawn(monkeypatch, dtype, a_word):
    drawn = []

    def counted(seeds, length, stream=0):
        drawn.append(length)
        return words(seeds, length, stream)

    monkeypatch.setattr(corruption, "words", counted)
    corrupt(batch((3, 64, 64), 4, dtype), seeds(4), random_masking(seeds(4), 256, 250), 4)
    assert drawn == [6 * 48 // a_word]


def test_noise_of_bytes_is_uniform():
    images = batch((3, 64, 64), 8, torch.uint8)
    counts = torch.bincount(corrupt(images, seeds(8), all_hidden(8, 16), 16).flatten().long())
    expected = images.numel() / 256
    assert len(counts) == 256 and ((counts - expected).abs() < 5 * expected**0.5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
def test_mixed_patches_are_each_of_one_kind_in_thirds(dtype):
    n, L = 60, 64
    images, mask = batch((1, 32, 32), n, dtype), all_hidden(60, 64)
    got = gather_patches(corrupt(images, seeds(n), mask, 4, "mixed"), mask.masked, 4)
    pure = {
        kind: gather_patches(corrupt(images, seeds(n), mask, 4, kind), mask.masked, 4)
        for kind in ("noise", "zeros", "swap")
    }
    of = torch.stack([(got == x).all(-1) for x in pure.values()])
    assert (of.sum(0) == 1).double().mean() > 0.99  # a byte image may hold a patch of zeros
    share = of.double().mean((1, 2))
    assert ((share - 1 / 3).abs() < 4.5 * (2 / 9 / (n * L)) ** 0.5 + 0.01).all()


@pytest.mark.parametrize("kind", ["noise", "zeros"])
def test_a_sample_is_corrupted_alike_in_any_company(kind):
    images, mask = batch(), random_masking(seeds(5), 8, 3)
    whole = corrupt(images, seeds(5), mask, (4, 3), kind)
    alone = corrupt(images[3:4], seeds(1, 3), type(mask)(*(x[3:4] for x in mask)), (4, 3), kind)
    assert torch.equal(whole[3:4], alone)


def test_any_strides():
    images, mask = batch(), random_masking(seeds(5), 8, 3)
    wanted = corrupt(images, seeds(5), mask, (4, 3), "mixed")
    for other in (
        images.contiguous(memory_format=torch.channels_last),
        torch.cat([images, images], -1)[..., :12],
        torch.stack([images, images], -1)[..., 1],
    ):
        assert torch.equal(corrupt(other, seeds(5), mask, (4, 3), "mixed"), wanted)


def test_shapes_on_a_device_without_values():
    images = torch.empty(5, 3, 8, 12, device="meta")
    mask = random_masking(seeds(5).to("meta"), 8, 3)
    out = corrupt(images, seeds(5).to("meta"), mask, (4, 3), "mixed")
    assert out.shape == images.shape and out.device.type == "meta"


def test_compiles_in_one_graph():
    images, mask = batch(), random_masking(seeds(5), 8, 3)
    compiled = torch.compile(corrupt, fullgraph=True, backend="aot_eager")
    wanted = corrupt(images, seeds(5), mask, (4, 3), "mixed")
    torch.testing.assert_close(compiled(images, seeds(5), mask, (4, 3), "mixed"), wanted)


MASK = random_masking(torch.arange(5), 8, 3)
REFUSED = {
    "a patch that does not divide": ((3, 8, 12), 5, "noise", r"divide .* \(8, 12\), got 5"),
    "a patch of other sides": ((3, 8, 12), (4, 3, 1), "noise", "got"),
    "an empty patch": ((3, 8, 12), (4, 0), "noise", "got"),
    "another mask": (
        (3, 8, 12),
        (4, 4),
        "noise",
        r"masking must be of \(5, 6\) places, got \(5, 8\)",
    ),
    "a kind": ((3, 8, 12), (4, 3), "blur", "kind must be .* got 'blur'"),
    "no sides": ((3,), 1, "noise", r"sides \(\), got 1"),
}


@pytest.mark.parametrize("shape, patch, kind, words", REFUSED.values(), ids=REFUSED)
def test_refuses(shape, patch, kind, words):
    with pytest.raises(ValueError, match=words):
        corrupt(torch.zeros(5, *shape), torch.arange(5), MASK, patch, kind)


@pytest.mark.parametrize("kind", ["swap", "mixed"])
def test_a_batch_of_one_has_nothing_to_swap_with(kind):
    one = type(MASK)(*(x[:1] for x in MASK))
    with pytest.raises(ValueError, match="got a batch of 1"):
        corrupt(torch.zeros(1, 3, 8, 12), torch.arange(1), one, (4, 3), kind)
