"""Adapters on real ranks that run the embedded model, and how references to them are resolved."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio.to_thread
import attrs
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sgld.engine import lora as adapters_module
from sgld.engine.engine import Engine
from sgld.engine.lora import LoraPlan, LoraRegistry, NamedAdapter, at_start, resolve_adapter
from sgld.errors import BadRequest, NotReady, SgldError
from sgld.messages import Frames, LoraPart, LoraState, Note, SetLora
from sgld.params import LoraUse
from sgld.resolve import resolve
from sgld.settings import Settings
from tests.adapters import write_adapter
from tests.engine.outputs import generate_one
from tools import tiny

PROMPT = "a red circle on a blue background"
VISIBLE = 1.0  # mean difference of two pictures, of 255; measured: 5 and more
Files = dict[str, str]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Two adapters, and ones that do not fit."""
    folder = tmp_path_factory.mktemp("adapters")
    odd = ("transformer.nowhere.lora_A.weight", "transformer.nowhere.lora_B.weight")
    second = ("transformer_2.proj_out.lora_A.weight", "transformer_2.proj_out.lora_B.weight")
    found = {
        "a": write_adapter(folder / "a.safetensors", 1),
        "b": write_adapter(folder / "b.safetensors", 2),
        "odd": write_adapter(folder / "odd.safetensors", 3, extra=odd),
        "second": write_adapter(folder / "second.safetensors", 4, extra=second),
    }
    (folder / "broken.safetensors").write_bytes(b"no weights")
    return {name: str(path) for name, path in found.items()} | {"broken": str(folder / "broken.safetensors")}


class Studio:
    """An engine with the embedded model, that makes one small picture."""

    def __init__(self, engine: Engine):
        self.engine, self.notes = engine, []  # type: ignore[var-annotated]

    async def picture(self, *loras: LoraUse) -> Frames:
        assert self.engine.info is not None
        found = await self.engine.adapters.resolve(loras, "loras", local=True)
        given = {"prompt": PROMPT, "num_frames": 1, "num_inference_steps": 3, "loras": found}
        params = resolve(given, self.engine.info).params
        made = await generate_one(self.engine, "picture", attrs.evolve(params, seed=3), self._hear)
        return made.frames.array.copy()

    def _hear(self, event: Any) -> None:
        if isinstance(event, Note):
            self.notes.append(event.text)


class Saved:
    """The plans that an engine has saved, as the next server reads them."""

    def __init__(self) -> None:
        self.plans: list[LoraPlan] = []

    async def __call__(self, record: dict[str, Any]) -> None:
        plan = LoraPlan.restore(json.loads(json.dumps(record)), Settings())
        assert plan is not None
        self.plans.append(plan)


def differ(a: Frames, b: Frames) -> bool:
    return float(np.abs(a.astype(int) - b).mean()) > VISIBLE


@pytest.fixture(params=[1, 2])
async def studio(request: pytest.FixtureRequest) -> AsyncIterator[Studio]:
    async with Engine(Settings.of(num_gpus=request.param)) as engine:
        await engine.load(lambda event: None)
        yield Studio(engine)


@pytest.mark.timeout(300)
async def test_adapters_come_and_go(studio: Studio, adapters: Files) -> None:
    engine, picture = studio.engine, studio.picture
    plain = await picture()
    await engine.set_lora([LoraUse("a", adapters["a"])])
    a = await picture()
    assert differ(a, plain)
    assert (await picture() == a).all()
    await engine.set_lora([LoraUse("b", adapters["b"])])
    b = await picture()
    assert differ(b, a) and differ(b, plain), "another adapter replaces the first"
    both = await engine.set_lora([LoraUse("a"), LoraUse("b")])
    assert [lora.nickname for lora in both.parts["transformer"].loras] == ["a", "b"]
    together = await picture()
    assert differ(together, a) and differ(together, b)
    await engine.set_lora([LoraUse("b"), LoraUse("a")])
    assert not differ(await picture(), together), "the order means nothing"
    await engine.unmerge_lora()
    assert (await picture() == plain).all(), "every weight is what it was"
    await engine.set_lora([LoraUse("a", strength=0.0)])
    assert (await picture() == plain).all()
    await engine.merge_lora(strength=0.5)
    half = await picture()
    assert differ(half, plain) and differ(half, a)
    await engine.merge_lora()
    assert (await picture() == a).all(), "merging again starts from the model's own weights"
    await engine.set_lora([LoraUse("a")], "dynamic")
    assert engine.adapters.state.parts["transformer"].applied == "dynamic"
    assert not differ(await picture(), a) and differ(a, plain)

    own = await picture(LoraUse("b"))
    assert (own == b).all(), "an output's own adapters replace those that are set"
    assert not differ(await picture(), a), "and are gone with it"


@pytest.mark.timeout(300)
async def test_what_does_not_fit_changes_nothing(studio: Studio, adapters: Files) -> None:
    engine, picture = studio.engine, studio.picture
    await engine.set_lora([LoraUse("a", adapters["a"])])
    before, pids = await picture(), engine.status.pids
    wrong = {
        "odd": r"'odd.safetensors' does not fit .* 2 of \d+ keys: transformer.nowhere.lora_A.weight",
        "second": "2 keys for parts that this model has not: transformer_2.proj_out.lora_A.weight",
        "broken": "'broken.safetensors' is corrupt",
    }
    for name, message in wrong.items():
        with pytest.raises(BadRequest, match=message) as caught:
            await engine.set_lora([LoraUse("b", adapters["b"]), LoraUse(name, adapters[name])])
        assert caught.value.param == "lora_path"
        with pytest.raises(BadRequest, match=message):
            await picture(LoraUse(name, adapters[name]))
    with pytest.raises(BadRequest, match="no adapter is called 'odd'.*known: a|did you mean"):
        await engine.set_lora([LoraUse("odd")])
    with pytest.raises(BadRequest, match="target: 'transformer_2': this model has only all, transformer"):
        await engine.set_lora([LoraUse("a", target="transformer_2")])
    with pytest.raises(BadRequest, match="'nowhere.safetensors': it is neither a file"):
        await engine.set_lora([LoraUse("x", "nowhere.safetensors")])
    assert (await picture() == before).all() and engine.status.pids == pids
    assert list(engine.adapters.known) == ["a"]
    partly = await picture(LoraUse(path=adapters["odd"], strict=False))
    assert differ(partly, before) and studio.notes == ["loras: 2 keys fit no layer and were left out"]
    studio.notes.clear()
    await picture(LoraUse(path=adapters["second"], strict=False))
    assert studio.notes == ["loras: 2 keys fit no layer and were left out"], "those of a part that is not there count"
    with pytest.raises(BadRequest, match="2 keys for parts that this model has not"):
        await engine.set_lora([LoraUse("second", adapters["second"], target="transformer")])
    state = await engine.set_lora([LoraUse("odd", adapters["odd"], strict=False)])
    assert state.parts["transformer"].skipped == 2 and (await picture() == partly).all()


async def restart(engine: Engine) -> None:
    """Kill the last rank, and wait until the group is back."""
    os.kill(engine.status.pids[-1], signal.SIGKILL)
    async with asyncio.timeout(120):
        while engine.state != "restarting":
            await asyncio.sleep(0.01)
        while engine.state != "ready":
            await asyncio.sleep(0.05)


@pytest.mark.timeout(300)
async def test_a_restarted_group_keeps_its_adapters(studio: Studio, adapters: Files) -> None:
    engine, picture = studio.engine, studio.picture
    await engine.set_lora([LoraUse("a", adapters["a"], strength=0.5)])
    before, state = await picture(), engine.adapters.state
    await restart(engine)
    assert engine.adapters.state == state
    assert (await picture() == before).all()
    await engine.unmerge_lora()
    await restart(engine)
    plain = await picture()
    assert differ(plain, before), "those that were taken away do not come back"
    await engine.merge_lora(strength=0.5)
    assert (await picture() == before).all(), "but are still known"


async def test_the_workers_hold_what_the_engine_says(studio: Studio, adapters: Files) -> None:
    """The answer of the last command of each component, and the same weights as in workers that get the state anew."""
    engine, picture = studio.engine, studio.picture
    await engine.set_lora([LoraUse("a", adapters["a"]), LoraUse("b", adapters["b"], strength=0.5)], "dynamic")
    for change in (engine.merge_lora(strength=0.25), engine.unmerge_lora(), engine.merge_lora(strength=0.5)):
        await change
    part = engine.adapters.state.parts["transformer"]
    assert (part.merge_mode, part.applied, [lora.strength for lora in part.loras]) == ("dynamic", "dynamic", [0.5, 0.5])
    before = await picture()
    await restart(engine)
    assert (await picture() == before).all()
    assert engine.adapters.state == await engine.set_lora(part.loras, "dynamic")
    assert (await picture() == before).all()


async def test_a_restarted_group_without_its_adapters_says_so(adapters: Files, tmp_path: Path) -> None:
    """No output is made without what was set, nothing else is refused, and the group is there again."""
    brief = tmp_path / "brief.safetensors"
    shutil.copyfile(adapters["a"], brief)
    async with Engine(Settings()) as engine:
        await engine.load(lambda event: None)
        picture = Studio(engine).picture
        plain = await picture()
        await engine.set_lora([LoraUse("brief", str(brief))])
        worn = await picture()
        moved = brief.rename(tmp_path / "moved.safetensors")
        await restart(engine)
        with pytest.raises(NotReady, match="the adapters that are set are gone"):
            await picture()
        assert differ(await picture(LoraUse("b", adapters["b"])), worn)
        moved.rename(brief)
        assert np.array_equal(await picture(), worn)
        brief.unlink()
        await restart(engine)
        await engine.unmerge_lora()
        assert np.array_equal(await picture(), plain)


async def test_an_adapter_that_was_taken_away_may_be_gone(adapters: Files, tmp_path: Path) -> None:
    """Neither a new worker nor the next server needs it."""
    brief = tmp_path / "brief.safetensors"
    shutil.copyfile(adapters["a"], brief)
    saved = Saved()
    async with Engine(Settings()) as engine:
        engine.adapters.persist(None, saved)
        await engine.load(lambda event: None)
        plain = await Studio(engine).picture()
        await engine.set_lora([LoraUse("brief", str(brief))])
        await engine.unmerge_lora()
        brief.unlink()
        await restart(engine)
        assert np.array_equal(await Studio(engine).picture(), plain)
        with pytest.raises(BadRequest, match="brief.safetensors"):
            await engine.merge_lora()
        assert np.array_equal(await Studio(engine).picture(), plain)
    assert saved.plans[-1].state.parts["transformer"].applied is None, "the control: the next server hears of it"
    async with Engine(Settings()) as engine:
        engine.adapters.persist(saved.plans[-1], saved)
        await engine.load(lambda event: None)
        assert np.array_equal(await Studio(engine).picture(), plain)


async def test_one_part_keeps_its_adapters_when_those_of_the_other_are_gone(tmp_path: Path) -> None:
    """And until those are set again or taken away, no output is made without them."""
    model = tiny.make_wan22_a14b(tmp_path / "model")
    lone, second = (write_small(tmp_path / name, name, model) for name in ("transformer", "transformer_2"))
    kept = LoraUse("kept", second, target="transformer_2")

    async with Engine(Settings.of(model_path=str(model))) as engine:
        await engine.load(lambda event: None)
        await engine.set_lora([LoraUse("lone", lone, target="transformer")])
        both = await engine.set_lora([kept])
        away = (tmp_path / "transformer.safetensors").rename(tmp_path / "away")
        await restart(engine)
        with pytest.raises(NotReady):
            await Studio(engine).picture()
        assert engine.adapters.state == both
        await engine.set_lora([kept])
        with pytest.raises(NotReady):
            await Studio(engine).picture()
        await engine.unmerge_lora("transformer")
        assert (await Studio(engine).picture()).size and applied(engine) == ["transformer_2"]
        away.rename(lone)
        state = await engine.set_lora([LoraUse("lone", lone, target="transformer")])
        assert state == both


def applied(engine: Engine) -> list[str]:
    """Return the components whose adapters are applied."""
    return [name for name, part in engine.adapters.state.parts.items() if part.applied is not None]


def write_small(file: Path, component: str, model: Path) -> str:
    """An adapter for one layer of one transformer."""
    file = file.with_suffix(".safetensors")
    (weights,) = (model / component).glob("*.safetensors")
    out, inner = load_file(weights)["proj_out.weight"].shape
    layer = f"{component}.proj_out"
    save_file({f"{layer}.lora_A.weight": torch.ones(1, inner), f"{layer}.lora_B.weight": torch.ones(out, 1)}, file)
    return str(file)


async def test_a_hub_that_does_not_answer_takes_no_thread_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()
    monkeypatch.setattr(adapters_module, "resolve_adapter", lambda *_, **__: answer.wait(60))
    asked = [LoraUse(path=f"owner/name{i}") for i in range(64)]
    waiting = [asyncio.create_task(LoraRegistry(Settings()).resolve([lora], "loras", local=False)) for lora in asked]
    await asyncio.sleep(0.2)
    async with asyncio.timeout(10):
        assert await anyio.to_thread.run_sync(int, "7") == 7
    answer.set()
    assert len(await asyncio.gather(*waiting)) == 64


async def test_files_that_have_gone_are_sought_again(adapters: Files, tmp_path: Path) -> None:
    """A download can be repeated, by the name that it was given by."""
    names, gone = LoraRegistry(Settings()), str(tmp_path / "gone.safetensors")
    names.known = {
        "moved": NamedAdapter(adapters["a"], Path(gone)),
        "lost": NamedAdapter(str(tmp_path / "lost.safetensors"), tmp_path / "lost.safetensors"),
    }
    lost = LoraUse("lost", str(tmp_path / "lost.safetensors"))
    part = LoraPart((LoraUse("moved", gone), LoraUse("stays", adapters["b"]), lost), "auto", "merge")
    names.state = LoraState({"transformer": part})
    await names.refind()
    assert names.state.parts["transformer"].loras == (
        LoraUse("moved", adapters["a"]),
        LoraUse("stays", adapters["b"]),
        lost,
    )
    names.known["moved"] = NamedAdapter(adapters["b"], Path(gone))
    (again,) = await names.resolve([LoraUse("moved")], "loras", local=False)
    assert again.path == adapters["b"]


@pytest.mark.parametrize("settings", [{}, {"num_gpus": 2}], ids=["one", "two"])
async def test_a_worker_that_dies_while_it_gets_its_first_adapters(adapters: Files, settings: dict[str, int]) -> None:
    killed: list[int] = []

    def kill_once(event: Any) -> None:
        if event.step == event.total and not killed:  # the model is loaded
            killed.append(engine.status.pids[-1])
            os.kill(killed[0], signal.SIGKILL)

    async with Engine(Settings.of(lora_path=[adapters["a"]], **settings)) as engine:
        await engine.load(kill_once)
        assert killed and engine.state == "ready" and engine.status.restarts == 1
        assert engine.adapters.state.parts["transformer"].applied == "merge"


async def test_a_worker_that_dies_while_it_loads_is_replaced() -> None:
    async with Engine(Settings.of(num_gpus=2)) as engine:
        killed: list[int] = []

        def kill_once(event: Any) -> None:
            if not killed:
                killed.append(engine.status.pids[1])
                os.kill(killed[0], signal.SIGKILL)

        await engine.load(kill_once)
        assert killed and engine.state == "ready" and engine.status.restarts == 1
        assert (await Studio(engine).picture()).size


@pytest.mark.timeout(200)
async def test_adapters_of_the_settings(adapters: Files) -> None:
    settings = Settings.of(lora_path=[adapters["a"], adapters["b"]], lora_scale=[0.5])
    async with Engine(settings) as engine:
        with pytest.raises(NotReady):
            await engine.unmerge_lora()
        await engine.load(lambda event: None)
        loras = engine.adapters.state.parts["transformer"].loras
        assert [(lora.nickname, lora.strength) for lora in loras] == [("default", 0.5), ("default_2", 0.5)]
        assert set(engine.adapters.known) == {"default", "default_2"}
        with_both = await Studio(engine).picture()
        await engine.unmerge_lora()
        assert differ(with_both, await Studio(engine).picture())


@pytest.mark.timeout(200)
async def test_a_change_is_kept_though_its_caller_goes_away(adapters: Files) -> None:
    saved = Saved()
    async with Engine(Settings()) as engine:
        engine.adapters.persist(None, saved)
        await engine.load(lambda event: None)
        assert [plan.state for plan in saved.plans] == [LoraState()]
        setting = asyncio.create_task(engine.set_lora([LoraUse("a", adapters["a"])]))
        while not engine._turn.locked():  # its command is not under way yet
            await asyncio.sleep(0.001)
        setting.cancel()
        async with asyncio.timeout(60):
            while len(saved.plans) < 2:
                await asyncio.sleep(0.01)
        assert setting.cancelled() and list(engine.adapters.known) == ["a"]
        assert saved.plans[1].state == engine.adapters.state and applied(engine) == ["transformer"]


def test_what_was_kept_goes_with_its_settings(caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings.of(lora_path=["x"], lora_scale=[0.5])
    part = LoraPart((LoraUse("y", "/y", target="transformer"),), "auto", None, 2)
    kept = LoraPlan(
        settings.model.model_path,
        at_start(settings),
        {"y": NamedAdapter("o/y", Path("/y"))},
        LoraState({"transformer": part}),
    )
    record = json.loads(json.dumps(kept.record()))
    assert LoraPlan.restore(record, settings) == kept
    for other in (Settings(), settings.evolve(lora_scale=[1.0]), settings.evolve(model_path="other")):
        caplog.clear()
        assert LoraPlan.restore(record, other) is None and "are left out" in caplog.text
    for wrong in ({**record, "more": 1}, {**record, "state": {"parts": {"transformer": {}}}}):
        with pytest.raises(SgldError, match="another version of sgld"):
            LoraPlan.restore(wrong, settings)


def test_at_start() -> None:
    assert at_start(Settings()) == []
    settings = Settings.of(lora_path=["x", "y"], lora_nickname=["one", "two"], lora_target=["transformer", "all"])
    assert at_start(settings) == [LoraUse("one", "x", target="transformer"), LoraUse("two", "y")]


# References

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face cache that holds one repository with two adapters, and no network."""
    repository = tmp_path / "hub" / "models--owner--styles"
    snapshot = repository / "snapshots" / COMMIT
    (snapshot / "more").mkdir(parents=True)
    for name in ("ink.safetensors", "more/oil.safetensors"):
        (snapshot / name).touch()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize(
    ("reference", "found"),
    [
        ("owner/styles", ""),
        ("owner/styles:ink.safetensors", "ink.safetensors"),
        ("owner/styles/ink.safetensors", "ink.safetensors"),
        ("owner/styles/more/oil.safetensors", "more/oil.safetensors"),
        ("owner/styles:more/oil.safetensors", "more/oil.safetensors"),
        ("owner/styles/more", "more"),
        ("https://huggingface.co/owner/styles", ""),
        ("https://huggingface.co/owner/styles/blob/main/ink.safetensors", "ink.safetensors"),
        ("https://huggingface.co/owner/styles/resolve/main/more/oil.safetensors?download=true", "more/oil.safetensors"),
        ("https://huggingface.co/owner/styles/tree/main/more", "more"),
    ],
)
def test_references_to_the_hub(hub: Path, reference: str, found: str, local: bool) -> None:
    assert resolve_adapter(reference, local=local) == hub / found


@pytest.mark.parametrize(
    "reference",
    ["", "nothing", "owner/../../etc", "/etc/passwd", "owner/styles:../x", "https://other.example/a/b", "~"],
)
def test_references_that_a_client_may_not_make(hub: Path, reference: str) -> None:
    with pytest.raises(BadRequest, match="is no Hugging Face id") as caught:
        resolve_adapter(reference, "loras", local=False)
    assert caught.value.param == "loras"


@pytest.mark.parametrize(
    "reference", ["owner/styles:none.safetensors", "owner/styles:ink.bin", "owner/styles/none", "owner/none"]
)
def test_references_that_lead_nowhere(hub: Path, reference: str) -> None:
    with pytest.raises(BadRequest, match="^lora_path: '?(owner|ink)"):
        resolve_adapter(reference)


def test_local_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Path) -> None:
    (tmp_path / "owner" / "styles").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_adapter("owner/styles") == tmp_path / "owner" / "styles"
    assert resolve_adapter("owner/styles", local=False) == hub, "a client never reaches a folder of this machine"


async def test_a_nickname_remembers_how_its_adapter_was_read(adapters: Files) -> None:
    names = LoraRegistry(Settings())
    given = [LoraUse("odd", adapters["odd"], alpha=2.0, strict=False)]
    names.register(given, await names.resolve(given, "loras", local=True))
    [again] = await names.resolve([LoraUse("odd", strength=0.5)], "loras", local=False)
    assert (again.path, again.alpha, again.strict, again.strength) == (adapters["odd"], 2.0, False, 0.5)
    [other] = await names.resolve([LoraUse("odd", alpha=1.0)], "loras", local=False)
    assert (other.alpha, other.strict) == (1.0, False)


def test_there_is_nothing_to_merge() -> None:
    registry = LoraRegistry(Settings())
    with pytest.raises(BadRequest, match="no adapter was set for 'all'; set one first") as caught:
        registry.merging("all", 1.0)
    assert caught.value.param == "target"


def test_merging_keeps_the_mode_of_each_component() -> None:
    registry = LoraRegistry(Settings())
    first, second = LoraUse("x", "/x", target="transformer"), LoraUse("y", "/y", target="transformer_2")
    registry.state = LoraState(
        {"transformer": LoraPart((first,), "dynamic", None), "transformer_2": LoraPart((second,), "auto", "merge")}
    )
    half = attrs.evolve(first, strength=0.5)
    assert registry.merging("transformer", 0.5) == [SetLora((half,), "dynamic")]
    assert registry.merging("all", 0.5) == [SetLora((half,), "dynamic"), SetLora((attrs.evolve(second, strength=0.5),))]
    assert registry.commands() == {"transformer_2": SetLora((second,))}, "new ranks lack what was taken away"
