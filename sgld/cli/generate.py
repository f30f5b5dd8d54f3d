"""`sgld generate`: load once, make every prompt's outputs, write them, exit. Nothing heavy is imported for `--help`."""

from __future__ import annotations

from sgld import config, log
from sgld.cli import flags, show
from sgld.cli.plan import ignored, plan_of, refuse_early
from sgld.cli.process import put
from sgld.cli.sources import gather
from sgld.errors import BadRequest

DESCRIPTION = "Make images or videos from prompts. The last line of standard output is the path of the file."


def run(words: list[str]) -> int:
    """Parse, check, and make the outputs; or print help or the merged configuration."""
    parser = flags.parser_for("generate", DESCRIPTION, config.SECTIONS)
    parsed = flags.parse(parser, words)
    if parsed.help:
        put(parser.format_help())
        return 0
    layer = gather(parsed.config, parsed.layer)
    with layer.spelling():
        plan = plan_of(layer)
        if parsed.print_config:
            put(show.merged(layer, plan.settings, config.SECTIONS))
            return 0
        log.set_up(plan.settings.logging.log_level, plan.settings.logging.log_format)
        refuse_early(plan)
        if plan.settings.parallel.node_rank > 0:
            raise BadRequest("only node 0 makes outputs; run `sgld serve` on the others", field="node_rank")
        from sgld.engine.forkserver import prepare

        prepare(plan.settings.parallel.worker_start)
        from sgld.cli import make
        from sgld.cli.screen import warn

        for flag in ignored(layer):
            warn(f"{flag}: ignored; only `sgld serve` uses it")
        return make.run(plan)
