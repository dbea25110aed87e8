"""Files of tensors that are written as they come, and large ones in several."""

import shutil

import pytest
import torch
from huggingface_hub import load_torch_model
from safetensors.torch import load_file

from fastssl.diagnose.hardware import GPUS
from fastssl.diagnose.plan import make_plan
from fastssl.diagnose.speed import Cluster
from fastssl.engine import launch, tensor_files
from fastssl.engine.checkpoint import CheckpointError, Checkpoints
from fastssl.engine.encoders import saved_encoder
from fastssl.engine.engine import Engine
from fastssl.engine.tensor_files import Kind, in_order, write_split
from fastssl.export import load_encoder
from fastssl.run.build import build
from fastssl.run.train import pretrain
from tests.runs import tiny


def test_an_encoder_in_several_files_is_whole_wherever_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "LARGEST", 30_000)
    cfg = tiny("simclr", tmp_path, epochs=1)
    pretrain(cfg)
    folder = next(cfg.directory.glob("checkpoints/step-*"))
    parts = sorted(folder.glob("encoder-*-of-*.safetensors"))
    assert len(parts) > 2 and not (folder / "encoder.safetensors").exists()
    assert all(part.stat().st_size < 34_000 for part in parts)
    encoder = load_encoder(cfg.directory)[0].backbone
    ours = {k: v.clone() for k, v in encoder.state_dict().items()}
    assert any(value.abs().sum() > 0 for value in ours.values())
    for value in encoder.state_dict().values():
        value.zero_()
    load_torch_model(encoder, folder, filename_pattern="encoder{suffix}.safetensors")
    torch.testing.assert_close(encoder.state_dict(), ours, rtol=0, atol=0)
    plan = make_plan(cfg, 1, Cluster(GPUS["h200"], 1, 1), images=130)
    files = [file.read_bytes() for file in folder.glob("*.safetensors")]
    held = sum(len(file) - 8 - int.from_bytes(file[:8], "little") for file in files)
    assert plan.checkpoint == pytest.approx(held, rel=0.02)
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=f"{parts[1].name} is missing"):
        saved_encoder(cfg.directory)
    shutil.copy(parts[0], folder / "encoder-00001-of-00009.safetensors")
    with pytest.raises(CheckpointError, match="does not name encoder-00001-of-00009"):
        saved_encoder(cfg.directory)


def test_weights_that_are_not_finite_are_no_checkpoint(tmp_path):
    cfg = tiny("simclr", tmp_path, engine__zero_stage=0)
    cfg.directory.mkdir()
    with launch.session("cpu") as device:
        e = Engine(build(cfg, 1), cfg.optim, cfg.engine, device=device, batch_size=8)
        checkpoints = Checkpoints(cfg.directory, cfg.checkpoint)
        checkpoints.save(e, 1, {}, best=False)
        e.method.encoder.norm.weight.data[3] = float("nan")
        with pytest.raises(CheckpointError, match="norm.weight of encoder.* is not finite.*00001"):
            checkpoints.save(e, 2, {}, best=False)
    assert checkpoints.names() == ["step-00000001"]


def test_a_file_takes_what_fits_and_large_elements_first(tmp_path, monkeypatch):
    tensors = {
        "halves": torch.ones(3, dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "flags": torch.tensor([True, False]),
        "floats": torch.arange(4.0).view(2, 2).t(),
    }
    kinds = {key: Kind(tuple(x.shape), x.dtype) for key, x in tensors.items()}
    assert in_order(kinds) == ["count", "floats", "halves", "flags"]
    monkeypatch.setattr(tensor_files, "LARGEST", 24)
    path = tmp_path / "encoder.safetensors"
    write_split(path, kinds, (tensors[key] for key in in_order(kinds)))
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == [
        "encoder-00001-of-00002.safetensors",
        "encoder-00002-of-00002.safetensors",
        "encoder.safetensors.index.json",
    ]
    assert sorted(tensor_files.named(path.name, names)) == names
    loaded = {}
    for name in tensor_files.files_of(path.name, names):
        loaded |= load_file(tmp_path / name)
    torch.testing.assert_close(loaded, tensors, rtol=0, atol=0)
    with pytest.raises(TypeError, match="z is torch.complex64"):
        write_split(path, {"z": Kind((1,), torch.complex64)}, [torch.zeros(1)])
