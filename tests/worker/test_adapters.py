"""Which part of a model an adapter changes, on one with two transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sgld.messages import LoraPart, LoraState, SetLora, UnmergeLora
from sgld.nn.lora import LoraLayers
from sgld.nn.parallel import Mesh
from sgld.params import LoraUse
from sgld.worker.adapters import Adapters
from sgld.worker.run_context import Stopped

NAMES = ("transformer", "transformer_2")
Models = dict[str, nn.Module]


@pytest.fixture
def models() -> Models:
    """Two transformers of one layer, whose weights are zero."""
    found: Models = {name: nn.ModuleDict({"proj": nn.Linear(2, 2, bias=False)}) for name in NAMES}
    for model in found.values():
        model.requires_grad_(False).get_parameter("proj.weight").zero_()
    return found


@pytest.fixture
def adapters(models: Models) -> Adapters:
    return Adapters({name: LoraLayers(models[name], (), name) for name in NAMES}, Mesh.solo())


def write(folder: Path, name: str, **values: float) -> LoraUse:
    """An adapter that adds a number to every weight of the transformers that are named."""
    tensors = {}
    for component, value in values.items():
        tensors[f"{component}.proj.lora_A.weight"] = torch.ones(1, 2)
        tensors[f"{component}.proj.lora_B.weight"] = torch.full((2, 1), float(value))
    save_file(tensors, folder / f"{name}.safetensors")
    return LoraUse(name, str(folder / f"{name}.safetensors"))


def weights(models: Models) -> list[float]:
    return [float(models[name].get_parameter("proj.weight")[0, 0]) for name in NAMES]


def test_an_adapter_changes_what_it_is_for(adapters: Adapters, models: Models, tmp_path: Path) -> None:
    adapters.set(SetLora((write(tmp_path, "any", transformer=1),)))
    assert weights(models) == [1, 1], "one that says nothing of transformer_2 fits both"
    adapters.set(SetLora((write(tmp_path, "second", transformer_2=2),)))
    assert weights(models) == [1, 2], "the other part keeps its own"
    adapters.set(SetLora((write(tmp_path, "each", transformer=3, transformer_2=4),)))
    assert weights(models) == [3, 4]
    low = LoraUse("any", str(tmp_path / "any.safetensors"), target="transformer_2", strength=0.5)
    assert adapters.set(SetLora((low,))) == LoraState({"transformer_2": LoraPart((low,), "auto", "merge")})
    assert weights(models) == [3, 0.5]
    adapters.unmerge(UnmergeLora("transformer"))
    assert weights(models) == [0, 0.5]
    adapters.unmerge(UnmergeLora())
    assert weights(models) == [0, 0]


def test_the_answer_is_a_command_for_new_ranks(adapters: Adapters, models: Models, tmp_path: Path) -> None:
    """Sent for each component, it leads to the same weights and the same answer."""
    adapters.set(SetLora((write(tmp_path, "any", transformer=1),)))
    state = adapters.set(SetLora((write(tmp_path, "each", transformer=2, transformer_2=3),), "dynamic"))
    assert [part.applied for part in state.parts.values()] == ["dynamic", "dynamic"] and weights(models) == [0, 0]
    again = Adapters({name: LoraLayers(models[name], (), name) for name in NAMES}, Mesh.solo())
    answers = [again.set(SetLora(part.loras, part.merge_mode)) for part in state.parts.values()]
    assert {name: part for answer in answers for name, part in answer.parts.items()} == state.parts


def test_an_output_has_its_own(adapters: Adapters, models: Models, tmp_path: Path) -> None:
    assert adapters.activate([]) == []
    adapters.set(SetLora((write(tmp_path, "any", transformer=1),)))
    adapters.activate([write(tmp_path, "first", transformer=5, transformer_2=0)])
    assert weights(models) == [5, 0]
    adapters.activate([])
    assert weights(models) == [1, 1]


def test_what_is_kept_for_later_outputs_is_given_up(models: Models, tmp_path: Path) -> None:
    layers = {name: LoraLayers(models[name], (), name, 1000) for name in NAMES}
    adapters = Adapters(layers, Mesh.solo())
    for value in (1, 2, 3):
        adapters.activate([write(tmp_path, str(value), transformer=value)])
    assert [part.kept_bytes for part in layers.values()] == [3 * 16] * 2
    adapters.release()
    assert [part.kept_bytes for part in layers.values()] == [16] * 2 and weights(models) == [3, 3]


def test_nothing_to_take_away(adapters: Adapters, models: Models) -> None:
    adapters.unmerge(UnmergeLora())
    assert weights(models) == [0, 0]


class OtherFails(Mesh):
    """A rank whose peer has failed."""

    def any(self, flag: bool) -> bool:
        return True


def test_where_a_peer_fails_nothing_changes(models: Models, tmp_path: Path) -> None:
    adapters = Adapters({"transformer": LoraLayers(models["transformer"])}, OtherFails(0, 1, torch.device("cpu")))
    with pytest.raises(Stopped):
        adapters.set(SetLora((write(tmp_path, "any", transformer=1),)))
    assert weights(models) == [0, 0]
