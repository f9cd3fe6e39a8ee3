"""The commands and their parameters: what typer needs to know, and nothing of what they do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["application"]

_Target = Annotated[
    str, typer.Argument(metavar="FILE[:NAME]", help="A Python file, and which of its jobs, if it has several.")
]


def application() -> typer.Typer:
    """The ``penstock`` command with all its groups."""
    app = typer.Typer(
        name="penstock",
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,  # a user's own traceback is printed as Python prints it
        rich_markup_mode=None,  # help without the half of rich that it would load
    )
    app.callback()(_main)
    app.command("run")(_run)
    app.command("fetch")(_fetch)
    app.command("dead")(_dead)
    app.command("torture")(_torture)
    app.add_typer(_log(), name="log")
    return app


def _log() -> typer.Typer:
    log = typer.Typer(
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        help="Look at an event log, publish to it, and trim it.",
    )
    log.command("topics")(_topics)
    log.command("tail")(_tail)
    log.command("publish")(_publish)
    log.command("trim")(_trim)
    return log


def _version(asked: bool) -> None:
    if asked:
        import penstock

        typer.echo(f"penstock {penstock.__version__}")
        raise typer.Exit


def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Run flows: every item is accounted for, and a killed job goes on where it was."""


def _run(
    target: _Target,
    to: Annotated[str | None, typer.Option(metavar="SINK", help="Write here instead, by suffix.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard the output and its progress first.")] = False,
    inline: Annotated[
        bool, typer.Option("--inline", help="No threads or processes, so that breakpoint() works.")
    ] = False,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="Show no progress.")] = False,
) -> None:
    """Run the job that FILE defines; run again after a crash, it goes on where it was."""
    from penstock.cli.run import run_target

    raise typer.Exit(run_target(target, to=to, fresh=fresh, inline=inline, progress=False if no_progress else None))


def _fetch(
    urls: Annotated[str, typer.Argument(metavar="URLS.txt", help="A file with a URL a line; - for standard input.")],
    to: Annotated[str, typer.Option(metavar="SINK", help="Where the pages go, by suffix.")],
    limit: Annotated[str | None, typer.Option(metavar="N/min|N/s", help="The most requests in a time.")] = None,
    per_host: Annotated[bool, typer.Option("--per-host", help="The limit holds for each host by itself.")] = False,
    retry: Annotated[int | None, typer.Option(min=0, help="Further attempts after a failure. [default: 4]")] = None,
    timeout: Annotated[float | None, typer.Option(help="The most seconds for one attempt.")] = None,
    save_to: Annotated[str | None, typer.Option(metavar="DIR", help="Put the bodies into files there.")] = None,
    allow_private: Annotated[
        bool, typer.Option("--allow-private", help="Fetch from addresses of private networks and this machine, too.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard the output and its progress first.")] = False,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="Show no progress.")] = False,
) -> None:
    """Fetch a list of URLs, as fast as their hosts allow; run again after a crash, it goes on where it was."""
    from penstock.cli.fetch import fetch_list

    raise typer.Exit(
        fetch_list(
            urls,
            to,
            limit=limit,
            per_host=per_host,
            retry=retry,
            timeout=timeout,
            save_to=save_to,
            allow_private=allow_private,
            fresh=fresh,
            progress=False if no_progress else None,
        )
    )


def _dead(
    output: Annotated[Path, typer.Argument(help="The output of a job, or an event log.")],
    requeue: Annotated[bool, typer.Option("--requeue", help="Deliver the events of a log again.")] = False,
    topic: Annotated[str | None, typer.Option(help="Of a log: only those of this topic.")] = None,
    group: Annotated[str | None, typer.Option(help="Of a log: only those of this group.")] = None,
    position: Annotated[
        list[int] | None, typer.Option(min=0, help="Of a log: only the event at this position; may be repeated.")
    ] = None,
) -> None:
    """Show what failed for good: a table on a terminal, JSON lines otherwise."""
    from penstock.cli.dead import show_dead

    raise typer.Exit(show_dead(output, requeue=requeue, topic=topic, group=group, positions=position or ()))


def _torture(
    target: _Target,
    kills: Annotated[int, typer.Option(min=1, help="How often to kill the job.")] = 50,
    seed: Annotated[int | None, typer.Option(help="Repeats the choice of instants of an earlier run.")] = None,
) -> None:
    """Kill the job that FILE defines at random instants and compare its output with an undisturbed run's.

    It runs in a scratch copy of its outputs: the real ones aren't touched.
    """
    from penstock.cli.torture import torture_target

    raise typer.Exit(torture_target(target, kills=kills, seed=seed))


_File = Annotated[str, typer.Argument(metavar="FILE", help="The file of an event log.")]
_Topic = Annotated[str, typer.Argument(metavar="TOPIC", help="One of its topics.")]


def _topics(file: _File) -> None:
    """Show the topics and their groups: tables on a terminal, JSON lines otherwise."""
    from penstock.cli.log import show_topics

    raise typer.Exit(show_topics(file))


def _tail(
    file: _File,
    topic: _Topic,
    count: Annotated[
        int | None, typer.Option("-n", metavar="COUNT", min=0, help="How many of the last. [default: 10]")
    ] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with what comes, until Ctrl-C.")] = False,
    start: Annotated[
        str | None, typer.Option(metavar="POSITION|TIME", help="All from this position or ISO time on instead.")
    ] = None,
) -> None:
    """Show the last events of a topic: a line each on a terminal, JSON lines otherwise."""
    from penstock.cli.log import tail_topic

    raise typer.Exit(tail_topic(file, topic, count=count, follow=follow, start=start))


def _publish(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The file of an event log; made if it isn't there.")],
    topic: Annotated[str, typer.Argument(metavar="TOPIC", help="The topic; its first event makes it.")],
    key: Annotated[
        str | None, typer.Option(metavar="FIELD", help="The field with the key: events of one key stay in order.")
    ] = None,
    id: Annotated[
        str | None, typer.Option("--id", metavar="FIELD", help="The field with the id: it is published once.")
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="Each line is a string, not JSON.")] = False,
) -> None:
    """Publish the lines of standard input, each a JSON value, as they come."""
    from penstock.cli.log import publish_lines

    raise typer.Exit(publish_lines(file, topic, key=key, id=id, text=text))


def _trim(
    file: _File,
    topic: _Topic,
    keep: Annotated[int | None, typer.Option(metavar="N", min=0, help="This many events stay.")] = None,
    before: Annotated[
        str | None, typer.Option(metavar="POSITION|TIME", help="Those before this position or ISO time go.")
    ] = None,
    max_bytes: Annotated[int | None, typer.Option(metavar="N", min=0, help="This many bytes of payload stay.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Remove what a group still needs, too.")] = False,
) -> None:
    """Remove the oldest events of a topic; what a group still needs stays."""
    from penstock.cli.log import trim_topic

    raise typer.Exit(trim_topic(file, topic, keep=keep, before=before, max_bytes=max_bytes, force=force))
