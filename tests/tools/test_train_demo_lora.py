"""The adapters' training: what is frozen, what is learnt, and that the engine reads the file that is written."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from demo_model import lora, transformer
from demo_model.runs import Run
from demo_model.scenes import FULL_LENGTH

from sgld.nn.lora import LoraLayers, WeightedAdapter
from sgld.nn.lora_formats import read_adapter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
DEMO = Path(__file__).resolve().parents[2] / "sgld" / "demo"


def test_a_file_gives_the_model_that_was_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trained, fresh = (lora.load_model(DEMO).flow for _ in range(2))
    pairs = lora.add_adapter(trained)
    for pair in pairs.values():
        torch.nn.init.normal_(pair.up, std=0.05)
    file = lora.save_adapter(pairs, tmp_path / "x.safetensors")
    layers = LoraLayers(fresh)
    fitted = layers.fit(read_adapter(file))
    assert not fitted.skipped and fitted.layers.keys() == pairs.keys() and len(pairs) == 6 * 10
    with torch.no_grad():
        x, t, states = torch.randn(1, 6, 2, 6, 6), torch.tensor([500.0]), torch.randn(1, 4, 128)
        plain = fresh(x, t, states, return_dict=False)[0]
        layers.apply([WeightedAdapter(fitted)])
        wanted, got = (model(x, t, states, return_dict=False)[0] for model in (trained, fresh))
    assert (got - wanted).abs().mean() < 0.1 * (got - plain).abs().mean()


def test_two_steps_change_the_pairs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "BUCKETS", (transformer.Bucket(0.5, 2, 2), transformer.Bucket(0.5, 2, None)))
    run = Run(tmp_path, 0)
    lora.make_effect_bank(run, DEMO, "grid", 8, 8)
    bank = lora.load_effect_bank(run, "grid")
    assert bank["clips"][1].shape[1:] == (6, (FULL_LENGTH + 3) // 4, 12, 12)
    assert all(lora.visible(scene, "grid") for scenes, _ in bank.values() for scene in scenes)
    lora.train_adapter(run, DEMO, "grid", 2, tmp_path)
    model = lora.load_model(DEMO)
    fitted = LoraLayers(model.flow).fit(read_adapter(tmp_path / "grid.safetensors"))
    assert all(delta.up is not None and delta.up.any() for delta in fitted.layers.values())
    pairs = lora.add_adapter(model.flow)
    learning = {id(p) for p in model.parameters() if p.requires_grad}
    assert learning == {id(p) for pair in pairs.values() for p in pair.parameters()}
