from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import stat

import monai.apps.utils
import numpy as np
import pytest
import torch

from scripts import checkpoint
from scripts.checkpoint import CheckpointError, atomic_save, compact, convert, download, export, load_network
from scripts.networks import Neuroverse3D

FIXTURES = ("tiny_conv_down", "tiny_maxpool_down")
SHAPES = [
    {"channels": (2, 4, 8)},
    {"channels": (4, 4, 8), "spatial_size": 64},
    {"channels": (3, 3), "convs_per_block": 1, "spatial_size": (32, 48, 16)},
    {"channels": (2, 2, 2, 4), "convs_per_block": 3, "in_channels": 2, "out_channels": 3},
]


def one_line(caught) -> str:
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def files_in(folder):
    return sorted(p.name for p in folder.glob("[!.]*"))


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.fixture
def network():
    return Neuroverse3D(channels=(2, 4, 8), spatial_size=128).eval()


@pytest.fixture
def ours(tmp_path, network):
    """A file in our format."""
    path = tmp_path / "ours.pt"
    atomic_save(network.state_dict(), path)
    return path


@pytest.fixture
def theirs(tmp_path, network):
    """The same network as a file in the authors' layout."""
    path = tmp_path / "theirs.ckpt"
    atomic_save(checkpoint.to_authors(network), path)
    return path


# --- there and back ---------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", FIXTURES)
def test_convert_then_load_gives_the_authors_output(name, shared_dir, tmp_path, capsys):
    source, output = shared_dir / "reference" / f"{name}.ckpt", tmp_path / "deep" / "er" / "net.pt"
    convert(str(source), str(output))
    assert "parameters, channels (" in capsys.readouterr().out
    loaded = load_network(output)
    with np.load(source.with_suffix(".npz")) as file:
        inputs = [torch.from_numpy(file[key]) for key in ("target_in", "context_in", "context_out")]
        expected = torch.from_numpy(file["pred_l3"])
    assert not loaded.training
    torch.testing.assert_close(loaded(*inputs), expected, atol=1e-5, rtol=0)
    state = torch.load(output, weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert state["grid"].tolist() == [128, 128, 128]


@pytest.mark.parametrize("name", FIXTURES)
def test_convert_then_export_gives_the_authors_tensors(name, shared_dir, tmp_path):
    source = shared_dir / "reference" / f"{name}.ckpt"
    convert(str(source), str(tmp_path / "net.pt"))
    export(str(tmp_path / "net.pt"), str(tmp_path / "back.ckpt"))
    before, after = (torch.load(path, weights_only=True) for path in (source, tmp_path / "back.ckpt"))
    assert same_state(before["state_dict"], after["state_dict"])
    assert after["hparams_name"] == before["hparams_name"]  # without it Lightning cannot call their constructor
    for key in ("nb_inner_channels", "nb_conv_layers_per_stage", "data_slice_only"):
        assert after["hyper_parameters"][key] == before["hyper_parameters"][key]


@pytest.mark.parametrize("shape", SHAPES)
def test_export_then_convert_is_bit_identical(shape, tmp_path):
    network = Neuroverse3D(**{**shape, "spatial_size": checkpoint.AUTHORS_GRID})
    atomic_save(network.state_dict(), tmp_path / "a.pt")
    export(str(tmp_path / "a.pt"), str(tmp_path / "b.ckpt"))
    convert(str(tmp_path / "b.ckpt"), str(tmp_path / "c.pt"))
    assert same_state(torch.load(tmp_path / "c.pt", weights_only=True), network.state_dict())


@torch.no_grad()
def test_compact_weights_are_half_as_large_and_answer_the_same(tmp_path, capsys):
    network = Neuroverse3D(channels=(16, 32), spatial_size=8).eval()
    atomic_save({"network": network.state_dict(), "epoch": 3}, tmp_path / "last.pt")
    compact(str(tmp_path / "last.pt"), str(tmp_path / "model.pt"))
    assert "float16, 0." in capsys.readouterr().out
    assert (tmp_path / "model.pt").stat().st_size < 0.6 * (tmp_path / "last.pt").stat().st_size
    loaded = load_network(tmp_path / "model.pt")
    assert loaded.grid.tolist() == [8, 8, 8] and {p.dtype for p in loaded.parameters()} == {torch.float32}
    inputs = torch.rand(1, 1, 8, 8, 8), torch.rand(1, 2, 1, 8, 8, 8), torch.rand(1, 2, 1, 8, 8, 8)
    torch.testing.assert_close(loaded(*inputs), network(*inputs), atol=2e-3, rtol=0)
    compact(str(tmp_path / "last.pt"), str(tmp_path / "finer.pt"), spatial_size=[8, 16, 8])
    assert load_network(tmp_path / "finer.pt").grid.tolist() == [8, 16, 8]
    with pytest.raises(CheckpointError, match="with a grid of 7"):
        compact(str(tmp_path / "last.pt"), str(tmp_path / "odd.pt"), spatial_size=7)
    again = Neuroverse3D(channels=(16, 32), spatial_size=8)
    checkpoint.load_weights(again, tmp_path / "model.pt")
    assert same_state(again.state_dict(), loaded.state_dict())


def test_compact_averages_several_networks_of_one_shape(tmp_path):
    networks = [Neuroverse3D(channels=(2, 4), spatial_size=8) for _ in range(3)]
    networks.append(Neuroverse3D(channels=(2, 6), spatial_size=8))
    paths = [str(tmp_path / f"{k}.pt") for k in range(4)]
    for network, path in zip(networks, paths, strict=True):
        atomic_save(network.state_dict(), path)
    compact(paths[:3], str(tmp_path / "mean.pt"))
    bias = torch.stack([network.target_decoder.output.bias for network in networks[:3]]).mean(0)
    torch.testing.assert_close(load_network(tmp_path / "mean.pt").target_decoder.output.bias, bias, atol=1e-3, rtol=0)
    with pytest.raises(CheckpointError, match="several shapes"):
        compact(paths, str(tmp_path / "none.pt"))


@pytest.mark.parametrize("value", [1e5, float("nan")])
def test_weights_that_float16_cannot_hold_are_refused(value, tmp_path):
    network = Neuroverse3D(channels=(2, 4), spatial_size=8)
    network.target_decoder.output.bias.data.fill_(value)
    atomic_save(network.state_dict(), tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match="float16 cannot hold, such as target_decoder.output.bias"):
        compact(str(tmp_path / "net.pt"), str(tmp_path / "model.pt"))
    assert not (tmp_path / "model.pt").exists()


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_load_network_infers_the_network(shape, tmp_path):
    network = Neuroverse3D(**shape).eval()
    atomic_save(network.state_dict(), tmp_path / "net.pt")
    loaded = load_network(tmp_path / "net.pt")
    for name in ("channels", "convs_per_block", "in_channels", "out_channels"):
        assert getattr(loaded, name) == getattr(network, name)
    assert loaded.grid.tolist() == network.grid.tolist()
    assert same_state(loaded.state_dict(), network.state_dict())
    assert not loaded.training
    assert all(p.requires_grad and not p.is_meta for p in loaded.parameters())
    size = (network.divisor,) * 3
    inputs = torch.rand(1, network.in_channels, *size), torch.rand(1, 2, network.in_channels, *size)
    labels = torch.rand(1, 2, network.out_channels, *size)
    assert torch.equal(loaded(*inputs, labels), network(*inputs, labels))


def test_strict_loading_into_a_network_of_another_grid(ours):
    other = Neuroverse3D(channels=(2, 4, 8), spatial_size=32)
    other.load_state_dict(torch.load(ours, weights_only=True), strict=True)
    assert other.grid.tolist() == [128, 128, 128]


def test_float16_storage_loads_as_float32(network, tmp_path):
    halves = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    atomic_save(halves, tmp_path / "half.pt")
    loaded = load_network(tmp_path / "half.pt")
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    assert all(torch.equal(p, halves[k].float()) for k, p in loaded.named_parameters())
    assert loaded.grid.dtype == torch.int64
    loaded(torch.rand(1, 1, 4, 4, 4), torch.rand(1, 1, 1, 4, 4, 4), torch.rand(1, 1, 1, 4, 4, 4)).sum().backward()


def test_resume_file_is_accepted(network, tmp_path):
    torch.save({"network": network.state_dict(), "optimizer": {"state": {}}, "epoch": 3}, tmp_path / "last.pt")
    assert same_state(load_network(tmp_path / "last.pt").state_dict(), network.state_dict())


# --- files that are not what they should be ---------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 4, 100, 0.1, 0.5, 0.9, -1])
@pytest.mark.parametrize("command", ["load", "convert"])
def test_truncated_file(keep, command, ours, theirs, tmp_path):
    whole = (ours if command == "load" else theirs).read_bytes()
    cut = tmp_path / "cut.bin"
    cut.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError) as caught:
        load_network(cut) if command == "load" else convert(str(cut), str(tmp_path / "out.pt"))
    assert f"{cut} is not a readable checkpoint: it is truncated" in one_line(caught)
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"hello\n", b"<!DOCTYPE html><html>Google Drive - Quota exceeded</html>", b"# notes\n1,2,3\n", bytes(4096)],
)
def test_not_a_torch_file(content, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_network(path)
    assert f"{path} is not a readable checkpoint" in one_line(caught)


def test_missing_file(tmp_path):
    for call in (load_network, lambda path: convert(str(path), str(tmp_path / "o.pt"))):
        with pytest.raises(FileNotFoundError) as caught:
            call(tmp_path / "nowhere.pt")
        assert str(tmp_path / "nowhere.pt") in one_line(caught)
    with pytest.raises(FileNotFoundError):
        load_network(tmp_path)  # a folder


@pytest.mark.parametrize(
    "content",
    [
        {"conv1.weight": torch.zeros(3), "conv1.bias": torch.zeros(3)},
        {},
        {"epoch": 3},
        torch.zeros(3),
        [torch.zeros(3)],
        {"target_encoder.embedding.weight": torch.tensor(1.0)},
        {0: torch.zeros(3)},
    ],
    ids=["resnet", "empty", "no tensors", "tensor", "list", "scalar", "integer key"],
)
def test_foreign_content(content, tmp_path):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    for call in (load_network, lambda p: convert(str(p), str(tmp_path / "o.pt"))):
        with pytest.raises(CheckpointError) as caught:
            call(path)
        assert str(path) in one_line(caught)
        assert "tuple index" not in str(caught.value)
    assert files_in(tmp_path) == ["other.pt"]


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"net.conv.weight": torch.zeros(3)},
        {"net.x": 3},
        {"net.target_encoder.target_embedding.weight": torch.tensor(1.0)},
        {3: torch.zeros(3)},
    ],
)
def test_foreign_lightning_file(state, tmp_path):
    path = tmp_path / "other.ckpt"
    torch.save({"state_dict": state, "epoch": 1}, path)
    with pytest.raises(CheckpointError) as caught:
        convert(str(path), str(tmp_path / "o.pt"))
    assert str(path) in one_line(caught)
    assert "max()" not in str(caught.value)
    assert files_in(tmp_path) == ["other.ckpt"]


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "no grid", "short grid"])
def test_damaged_state_of_ours(damage, network, tmp_path):
    state = network.state_dict()
    key = "context_unet.fusions.1.conv.weight"
    if damage == "missing":
        del state[key]
    elif damage == "extra":
        state["surplus"] = torch.zeros(1)
    elif damage == "shape":
        state[key] = state[key][:-1]
    elif damage == "no grid":
        del state["grid"]
    else:
        state["grid"] = state["grid"][:2]
    path = tmp_path / "net.pt"
    torch.save(state, path)
    with pytest.raises(CheckpointError) as caught:
        load_network(path)
    message = one_line(caught)
    assert str(path) in message
    assert {"extra": "surplus", "no grid": "grid", "short grid": "spatial_size"}.get(damage, key) in message


@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_damaged_file_of_theirs(damage, network, tmp_path):
    content = checkpoint.to_authors(network)
    key = "net.context_unet.enc_blocks.1.combine_conv_context.module.weight"
    if damage == "missing":
        del content["state_dict"][key]
    elif damage == "extra":
        content["state_dict"]["net.surplus"] = torch.zeros(1)
    else:
        content["state_dict"][key] = content["state_dict"][key][:-1]
    path = tmp_path / "net.ckpt"
    torch.save(content, path)
    with pytest.raises(CheckpointError) as caught:
        convert(str(path), str(tmp_path / "o.pt"))
    message = one_line(caught)
    assert str(path) in message
    word = {"extra": "surplus", "missing": key.removeprefix("net.")}.get(damage, "context_unet.fusions.1.conv.weight")
    assert word in message
    assert files_in(tmp_path) == ["net.ckpt"]


def test_lightning_file_given_to_load_network_names_the_command(theirs):
    with pytest.raises(CheckpointError) as caught:
        load_network(theirs)
    assert f"python -m scripts.checkpoint convert --source {theirs} --output" in one_line(caught)


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_does_not_run(legacy, network, tmp_path):
    mark = tmp_path / "executed"
    path = tmp_path / "evil.ckpt"
    content = checkpoint.to_authors(network) | {"callbacks": Trap(mark)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    for call in (load_network, lambda p: convert(str(p), str(tmp_path / "out.pt"))):
        with pytest.raises(CheckpointError) as caught:
            call(path)
        message = one_line(caught)
        assert "pickled objects" in message and "--allow_pickle" in message and str(path) in message
    assert files_in(tmp_path) == ["evil.ckpt"]


def test_allow_pickle_reads_a_namespace(network, tmp_path):
    path, output = tmp_path / "namespace.ckpt", tmp_path / "out.pt"
    torch.save(checkpoint.to_authors(network) | {"hyper_parameters": argparse.Namespace(lr=1e-5)}, path)
    with pytest.raises(CheckpointError) as caught:
        convert(str(path), str(output))
    message = one_line(caught)
    assert "argparse.Namespace" in message and "--allow_pickle" in message
    assert not output.exists()
    convert(str(path), str(output), allow_pickle=True)
    assert same_state(torch.load(output, weights_only=True), network.state_dict())


# --- writing ----------------------------------------------------------------------------------------------


def test_existing_output_is_kept_unless_overwrite(ours, theirs, tmp_path):
    output = tmp_path / "precious.bin"
    commands = (convert, theirs), (export, ours), (compact, ours), (lambda _, out: download(out), None)
    for command, source in commands:
        output.write_bytes(b"precious")
        with pytest.raises(FileExistsError) as caught:
            command(str(source), str(output))
        assert str(output) in one_line(caught) and "another --output" in one_line(caught)
        assert output.read_bytes() == b"precious"
    with pytest.raises(FileExistsError, match="was not written by this program"):
        convert(str(theirs), str(output), overwrite=True)
    assert output.read_bytes() == b"precious"
    output.unlink()
    convert(str(theirs), str(output))
    with pytest.raises(FileExistsError, match="--overwrite true"):
        export(str(ours), str(output))
    convert(str(theirs), str(output), overwrite=True)
    load_network(output)


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("unexpected pos 64 vs 0"), KeyboardInterrupt()])
def test_atomic_save_keeps_the_old_file_when_writing_fails(error, tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    atomic_save({"a": torch.ones(2)}, path)

    def fails_midway(obj, file):
        with open(file, "wb") as handle:
            handle.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", fails_midway)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OSError):
        atomic_save({"a": torch.zeros(2)}, path)
    monkeypatch.undo()
    assert files_in(tmp_path) == ["model.pt"]
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.ones(2))


def test_atomic_save_replaces_and_respects_the_umask(tmp_path):
    path = tmp_path / "new" / "model.pt"
    mask = os.umask(0o027)
    try:
        for value in (1.0, 2.0):
            atomic_save({"a": torch.tensor(value)}, path)
    finally:
        os.umask(mask)
    assert torch.load(path, weights_only=True)["a"] == 2.0
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert files_in(path.parent) == ["model.pt"]


# --- the network of a run ---------------------------------------------------------------------------------


def test_load_weights_keeps_the_networks_own_grid(network, ours):
    other = Neuroverse3D(channels=(2, 4, 8), spatial_size=32)
    checkpoint.load_weights(other, ours)
    assert other.grid.tolist() == [32, 32, 32]
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), network.parameters(), strict=True))


@pytest.mark.parametrize("shape", [{"channels": (2, 4, 6)}, {"channels": (2, 4)}, {"convs_per_block": 1}])
def test_load_weights_of_another_network(shape, ours):
    other = Neuroverse3D(**{"channels": (2, 4, 8), **shape})
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_weights(other, ours)
    message = one_line(caught)
    assert str(ours) in message and "[2, 4, 8] and 2 convs" in message and str(list(other.channels)) in message


def test_network_options(ours, tmp_path):
    options = checkpoint.network_options(ours, spatial_size=(32, 32, 32))
    assert options["channels"] == (2, 4, 8) and options["spatial_size"] == (32, 32, 32)
    assert checkpoint.network_options(ours, channels=[2, 4, 8])["spatial_size"] == (128, 128, 128)
    assert checkpoint.network_options(None, channels=[4, 8]) == {"channels": (4, 8)}
    assert checkpoint.network_options(tmp_path / "later.pt", convs_per_block=1) == {"convs_per_block": 1}
    with pytest.raises(ValueError) as caught:
        checkpoint.network_options(ours, channels=[4, 8])
    message = one_line(caught)
    assert "(4, 8)" in message and "(2, 4, 8)" in message and str(ours) in message


# --- download ---------------------------------------------------------------------------------------------


def test_download_prints_the_digest_and_converts(network, theirs, tmp_path, monkeypatch, capsys):
    asked = []

    def copies(url, filepath, *args, **kwargs):
        asked.append(url)
        shutil.copy(theirs, filepath)

    monkeypatch.setattr(monai.apps.utils, "download_url", copies)
    output = tmp_path / "models" / "net.pt"
    download(str(output))
    assert hashlib.sha256(theirs.read_bytes()).hexdigest() in capsys.readouterr().out
    assert same_state(torch.load(output, weights_only=True), network.state_dict())
    assert asked == [checkpoint.AUTHORS_FILE_URL] and "1ER_mV2CCsdnF-q3Aoy7loJ2DZXI95M9M" in asked[0]
    assert files_in(output.parent) == ["net.pt"]


def test_failing_download_says_what_to_do(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("Cannot retrieve the public link.\nYou may need to change the permission.\nOr wait.")

    monkeypatch.setattr(monai.apps.utils, "download_url", fails)
    with pytest.raises(CheckpointError) as caught:
        download(str(tmp_path / "net.pt"))
    message = one_line(caught)
    assert "could not download" in message and "scripts.checkpoint convert" in message
    assert checkpoint.AUTHORS_FILE_URL in message
    assert files_in(tmp_path) == []


def test_download_of_a_web_page_is_an_unreadable_file(tmp_path, monkeypatch):
    monkeypatch.setattr(monai.apps.utils, "download_url", lambda url, path: path.write_text("<html>quota</html>"))
    with pytest.raises(CheckpointError) as caught:
        download(str(tmp_path / "net.pt"))
    assert "not a readable checkpoint" in one_line(caught)
    assert files_in(tmp_path) == []
