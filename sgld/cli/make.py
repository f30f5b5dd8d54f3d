"""Make the outputs of a plan: one engine, one load, one prompt after the other. Files are encoded meanwhile."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import attrs

from sgld.cli.outputs import (
    Output,
    Saved,
    absent_folders,
    check_early,
    dump_performance,
    line_of,
    outputs_of,
    remove_empty,
    save,
)
from sgld.cli.plan import Plan
from sgld.cli.process import exit_now, heeded
from sgld.cli.screen import Screen, say
from sgld.engine.engine import Engine
from sgld.errors import JobCancelled, SgldError
from sgld.messages import Event, Media, OutputReady, batch_key
from sgld.params import OutputParams
from sgld.storage.local import LocalStorage

GRACE_S = 3.0  # from a kill to leaving, whatever still runs


def run(plan: Plan) -> int:
    """Make all outputs. Raises SgldError for the first that fails, and `JobCancelled` after ^C."""
    absent = absent_folders(plan)
    try:
        check_early(plan, LocalStorage(plan.folder))
        asyncio.run(_run(plan, absent))
    finally:
        remove_empty(absent)
    return 0


async def _run(plan: Plan, absent: list[Path]) -> None:
    async with Engine(plan.settings) as engine:
        task = Run(plan, engine, absent)
        making = asyncio.create_task(task.everything())
        interrupts = Interrupts(making, task)
        try:
            await making
        except (asyncio.CancelledError, SgldError) as error:
            if interrupts.count:
                raise JobCancelled("interrupted") from error
            raise


class Run:
    """A plan in progress."""

    def __init__(self, plan: Plan, engine: Engine, absent: list[Path]):
        self.engine = engine
        self._plan, self._absent = plan, absent
        self._storage = LocalStorage(plan.folder)
        self._screen = Screen()
        self._made: list[Saved] = []
        self._parts: list[Path] = []
        self._saving: asyncio.Task[None] | None = None

    async def everything(self) -> None:
        """Load, generate and save. Finished outputs are saved even if a later one fails or is interrupted."""
        started = time.perf_counter()
        try:
            outputs = await self._load()
            load_ms = 1e3 * (time.perf_counter() - started)
            try:
                titles = [f"[{i}/{len(outputs)}]" if len(outputs) > 1 else "" for i in range(1, len(outputs) + 1)]
                for _, group in groupby(zip(outputs, titles, strict=True), lambda each: batch_key(each[0].params)):
                    await self._generate(list(group))
            finally:
                await self._saved()
                if self._plan.report is not None:
                    await asyncio.to_thread(dump_performance, self._plan, load_ms, self._made)
        finally:
            self._screen.close()

    async def _load(self) -> list[Output]:
        info = await self.engine.load(self._screen.follow())
        outputs, notes = await asyncio.to_thread(outputs_of, self._plan, info)
        for note in notes:
            self._screen.line(f"warning: {note}")
        for output in outputs:
            await self._find_adapters(output.params)
        if self._plan.options.save_output:
            chosen = [output.name for output in outputs if output.chosen]
            await asyncio.to_thread(self._storage.check, chosen, self._plan.options.overwrite)
        return outputs

    async def _generate(self, group: list[tuple[Output, str]]) -> None:
        """Make outputs that differ in their seed alone. A file that cannot be written stops those after it."""
        items = [await self._find_adapters(output.params) for output, _ in group]
        waiting = iter(group)

        def announce() -> Callable[[Event], None]:
            output, title = next(waiting)
            self._screen.line(f"{title} seed {output.seed}".strip())
            return self._screen.follow(title)

        def stop_if_lost(saving: asyncio.Task[None]) -> None:
            if not saving.cancelled() and saving.exception() is not None:
                making.cancel()

        follow = announce()

        def emit(event: Event) -> None:
            nonlocal follow
            if not isinstance(event, OutputReady):
                follow(event)
                return
            self._saving = asyncio.create_task(self._save(group[event.item][0], event.media, self._saving))
            self._saving.add_done_callback(stop_if_lost)
            if event.item + 1 < len(group):
                follow = announce()

        making = asyncio.create_task(self.engine.generate(f"generate-{group[0][0].name}", items, emit))
        await making

    async def _find_adapters(self, params: OutputParams) -> OutputParams:
        """Add the files of the adapters, which are looked up once."""
        return attrs.evolve(params, loras=await self.engine.adapters.resolve(params.loras, "loras", local=True))

    async def _saved(self) -> None:
        """Wait until all files are written and reported, even when ^C comes meanwhile."""
        if self._saving is None:
            return
        try:
            await asyncio.shield(self._saving)
        except asyncio.CancelledError:
            await asyncio.wait([self._saving])
            raise

    async def _save(self, output: Output, made: Media, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await before
        saved = await asyncio.to_thread(save, self._plan, self._storage, output, made, self._parts)
        self._made.append(saved)
        if self._plan.options.save_output or self._plan.options.json:
            self._screen.line(line_of(self._plan, saved), sys.stdout)

    def abandon(self) -> None:
        """Remove the unfinished file, and its folder if that is empty."""
        for part in self._parts:
            part.unlink(missing_ok=True)
        remove_empty(self._absent)


class Interrupts:
    """Cancel the job at its next step on ^C, SIGTERM or SIGHUP; kill the workers on the second."""

    def __init__(self, making: asyncio.Task[None], run: Run):
        self.count = 0
        self._making, self._run = making, run
        self._loop = asyncio.get_running_loop()
        for number in heeded(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._loop.add_signal_handler(number, self)

    def __call__(self) -> None:
        self.count += 1
        if self.count == 1 and self._run.engine.state != "loading":
            say("\nstopping after this step; ^C again kills")
        else:
            self._run.engine.kill()
            self._loop.call_later(GRACE_S, self._leave)
        self._making.cancel()

    def _leave(self) -> None:
        """Exit at once, because a download, for example, cannot be interrupted. The workers follow their parent."""
        self._run.abandon()
        say("error: interrupted")
        exit_now(JobCancelled.exit_code)
