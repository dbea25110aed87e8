"""The table transformer: any subset of columns, and features as they are pooled."""

import pytest
import timm
import torch

from fastssl.models import TableTransformer, build_backbone, feature_dim


def made(**changes):
    torch.manual_seed(0)
    return TableTransformer(5, **{"embed_dim": 16, "depth": 2, "num_heads": 2, **changes}).eval()


def test_tokens_are_linear_in_each_column():
    table, rows = made(), torch.randn(3, 5)
    tokens = table.tokens(rows)
    for j in range(5):
        want = rows[:, j, None] * table.weight[j] + table.bias[j]
        torch.testing.assert_close(tokens[:, j], want)


def test_chosen_columns_are_those_of_all():
    table, rows = made(), torch.randn(3, 5)
    ids = torch.tensor([[4, 0], [1, 2], [3, 3]])
    whole = table.tokens(rows)
    torch.testing.assert_close(table.tokens(rows, ids), whole[torch.arange(3)[:, None], ids])


def test_columns_are_a_set():
    """Their order does not matter to the others: positions are the columns' own weights."""
    table, rows = made(registers=2), torch.randn(3, 5)
    order = torch.tensor([3, 1, 4, 0, 2])
    one, other = table.encode(table.tokens(rows)), table.encode(table.tokens(rows)[:, order])
    torch.testing.assert_close(other[:, :2], one[:, :2])
    torch.testing.assert_close(other[:, 2:], one[:, 2:][:, order])


@pytest.mark.parametrize("pool, width", [("flatten", 80), ("mean", 16), ("reg", 16)])
def test_pooling(pool, width):
    table, rows = made(global_pool=pool, registers=3), torch.randn(4, 5)
    h = table.encode(table.tokens(rows))
    assert h.shape == (4, 8, 16)
    want = {"flatten": h[:, 3:].flatten(1), "mean": h[:, 3:].mean(1), "reg": h[:, :3].mean(1)}
    features = table(rows)
    torch.testing.assert_close(features, want[pool])
    assert features.shape == (4, width) and feature_dim(table) == width


def test_registers_see_and_are_seen():
    table, rows = made(), torch.randn(2, 5)
    before = table(rows)
    with torch.no_grad():
        table.reg_token += 1
    assert not torch.allclose(table(rows), before)
    bare = made(registers=0)
    assert bare.encode(bare.tokens(rows)).shape == (2, 5, 16)


def test_checkpointing_changes_no_gradient():
    rows, found = torch.randn(4, 5), []
    for enabled in (False, True):
        table = made().train()
        table.set_grad_checkpointing(enabled)
        table(rows).square().sum().backward()
        found.append([p.grad for p in table.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_timm_and_recipes_find_it():
    assert timm.is_model("table_transformer")
    kwargs = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    table = build_backbone("table_transformer", shape=(7,), kwargs=kwargs)
    assert isinstance(table, TableTransformer) and table(torch.randn(2, 7)).shape == (2, 112)
    assert table.no_weight_decay() <= {name for name, _ in table.named_parameters()}


def test_what_it_cannot_be_is_refused():
    with pytest.raises(ValueError, match="global_pool"):
        made(global_pool="max")
    with pytest.raises(ValueError, match="registers >= 1"):
        made(global_pool="reg", registers=0)
    with pytest.raises(ValueError, match="num_classes=0"):
        made(num_classes=3)
    with pytest.raises(ValueError, match=r"rows must be \(B, 5\), got \(2, 6\)"):
        made()(torch.randn(2, 6))
    with pytest.raises(ValueError, match="pretrained"):
        timm.create_model("table_transformer", pretrained=True, columns=3)
