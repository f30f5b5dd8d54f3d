"""`sgld serve`: the HTTP server, until SIGINT or SIGTERM."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
from typing import TYPE_CHECKING

from sgld import config, log
from sgld.cli import flags, show
from sgld.cli.plan import ignored
from sgld.cli.process import heeded, put
from sgld.cli.sources import gather
from sgld.convert import Values, refuse_unbuilt, structure
from sgld.errors import BadRequest, SgldError
from sgld.params import SamplingParams
from sgld.settings import RunOptions, Settings

if TYPE_CHECKING:
    from sgld.engine.engine import Engine
    from sgld.server.http.auth import Keys

logger = logging.getLogger("sgld")
KEEP_ALIVE_S = 75.0  # of a connection that asks for nothing
DESCRIPTION = "Run the OpenAI-compatible HTTP server. Sampling values in a config file become defaults of requests."


def run(words: list[str]) -> int:
    """Parse and check, then serve, or follow node 0; or print help or the merged configuration."""
    parser = flags.parser_for("serve", DESCRIPTION, config.SETTINGS)
    parsed = flags.parse(parser, words)
    if parsed.help:
        put(parser.format_help())
        return 0
    layer = gather(parsed.config, parsed.layer)
    with layer.spelling():
        settings, sampling = config.settings_of(layer.values), config.section(layer.values, SamplingParams)
        checked = structure(sampling, SamplingParams)
        for name in config.section(layer.values, RunOptions):
            raise BadRequest("only `sgld generate` has this; each request asks for its own", field=name)
        if parsed.print_config:
            put(show.merged(layer, settings, [*config.SETTINGS, SamplingParams]))
            return 0
        log.set_up(settings.logging.log_level, settings.logging.log_format)
        refuse_unbuilt(settings, checked, spell=layer.spell)
        if settings.parallel.node_rank > 0:
            from sgld.engine.follow import follow

            for flag in ignored(layer):
                logger.warning("%s: ignored; only node 0 runs the HTTP server", flag)
            return follow(settings)
        from sgld.engine.forkserver import prepare

        prepare(settings.parallel.worker_start)
        from sgld.server.http.auth import check_exposure, load_keys

        keys = load_keys(settings)
        check_exposure(settings, keys)
        return asyncio.run(_serve(settings, sampling, keys))


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket. Raises SgldError for an address that cannot be had; a busy port never moves."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except socket.gaierror as error:
        raise SgldError(f"{host!r} is no address of this machine: {error.strerror}", field="host") from None
    except OSError as error:
        reasons = {errno.EADDRINUSE: "it is in use", errno.EACCES: "permission denied"}
        reason = reasons.get(error.errno or 0, error.strerror or str(error))
        param = "host" if error.errno == errno.EADDRNOTAVAIL else "port"
        raise SgldError(f"cannot listen on {host}:{port}: {reason}", field=param) from None


async def _serve(settings: Settings, sampling: Values, keys: Keys) -> int:
    from aiohttp import web

    from sgld.server.app import load, make_app
    from sgld.server.http.protocol import Runner
    from sgld.server.service import SERVICE

    listener = listen(settings.server.host, settings.server.port)
    app = make_app(settings, sampling, keys=keys)
    runner = Runner(app, handler_cancellation=True, access_log=None, shutdown_timeout=5, keepalive_timeout=KEEP_ALIVE_S)
    await runner.setup()
    stopping = asyncio.Event()
    for number in heeded(signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    try:
        await web.SockSite(runner, listener).start()
        logger.info("listening on http://%s:%d", *listener.getsockname()[:2])
        service = app[SERVICE]
        await _until_stopped(asyncio.create_task(load(service)), stopping, service.engine)
        await service.jobs.drain(settings.server.shutdown_timeout)
    finally:
        await runner.cleanup()
    return 0


async def _until_stopped(loading: asyncio.Task[None], stopping: asyncio.Event, engine: Engine) -> None:
    """Wait for the request to stop. Raise the error of a model that cannot be loaded."""
    stop = asyncio.create_task(stopping.wait())
    await asyncio.wait({loading, stop}, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        engine.kill()
        loading.cancel()
        return
    try:
        await loading
        await stop
    finally:
        stop.cancel()
