"""Checkpoints and students on disk: plain values, damage is one line, an architecture is never guessed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.embedder import Embedder, EmbedderConfig
from orchestrator import checkpoint


def test_checkpoints_are_plain_and_damage_is_one_line(tmp_path):
    checkpoint.save(tmp_path / "a.pt", {"x": torch.ones(2), "y": [1, {"z": 2.0}]})
    assert checkpoint.load(tmp_path / "a.pt")["y"] == [1, {"z": 2.0}]
    (tmp_path / "b.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"checkpoint .*b.pt cannot be read") as error:
        checkpoint.load(tmp_path / "b.pt")
    assert "\n" not in str(error.value)
    torch.save({"f": Path}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load(tmp_path / "c.pt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "b.pt", "c.pt"]


def test_students_are_stored_without_classifier_and_loaded_by_architecture(tmp_path):

    config = EmbedderConfig(backbone="resnet18", width=0.125, embedding_dim=8, image_size=(16, 16), num_classes=3)
    net = Embedder(config).eval()
    checkpoint.save_model(tmp_path, net, {"note": 1})
    loaded, facts = checkpoint.load_model(tmp_path / "student.safetensors", config)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(x), net(x)) and facts == {"note": 1} and loaded.classifier is None
    with pytest.raises(ValueError, match="holds another architecture: embedding_dim 8 instead of 9"):
        checkpoint.load_model(tmp_path / "student.safetensors", replace(config, embedding_dim=9))
    (tmp_path / "student.json").unlink()
    with pytest.raises(ValueError, match=r"another architecture than expected: \d+ of \d+ tensors fit, the first"):
        checkpoint.load_model(tmp_path / "student.safetensors", replace(config, backbone="resnet34"))
    with pytest.raises(ValueError, match="its architecture is unknown"):
        checkpoint.load_model(tmp_path / "student.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"123")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        checkpoint.load_model(tmp_path / "broken.safetensors", config)
    with pytest.raises(FileNotFoundError, match="no weights at"):
        checkpoint.load_model(tmp_path / "nothing.safetensors")
