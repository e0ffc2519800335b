"""`index`, `info` and `failures`: build an index, and see what is in it."""

import re
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinosearch.cli import show
from dinosearch.cli.exits import SOME_FAILED
from dinosearch.errors import UsageError

if TYPE_CHECKING:
    from dinosearch.encoder import Encoder
    from dinosearch.images.source import Source
    from dinosearch.index.embed import EncoderPlan
    from dinosearch.index.sync import SyncProgress, SyncSummary

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
IndexOption = Annotated[str | None, typer.Option("--index", help="Name or folder of an index; the newest without.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        help="Use no more memory than this, such as 1.5G; converting a new model for the CPU takes 1.3 GB beside it.",
    ),
]


def add_to(app: typer.Typer) -> None:
    app.command()(index)
    app.command()(info)
    app.command()(failures)


def index(
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE...", help="Folders, archives, lists, tables, quoted globs or URLs.")
    ],
    name: Annotated[str | None, typer.Option(help="Name of the index; the source's name without.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Name in models/, a folder, timm:NAME or a released file; the newest without.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the square that released weights see, in pixels.")
    ] = None,
    device: DeviceOption = "auto",
    precision: Annotated[
        str | None,
        typer.Option(
            help="auto, fp32, bf16 or int8, remembered; int8 (CPU) costs about a minute once per model and some "
            "accuracy: below a mean cosine of 0.995 to fp32 it is refused."
        ),
    ] = None,
    max_memory: MemoryOption = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Accept that more than a fifth of the files is gone.")
    ] = False,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Pass over paths like this, as in .gitignore; '' passes over none."),
    ] = None,
    include_hidden: Annotated[
        bool | None, typer.Option("--include-hidden/--skip-hidden", help="Take names that begin with a dot too.")
    ] = None,
    all_pages: Annotated[
        bool | None, typer.Option("--all-pages/--first-page", help="Take each page and frame, not only the first.")
    ] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Take only this of N parts; merge makes one index of them.")
    ] = None,
    recall: Annotated[
        float | None,
        typer.Option(
            help="Share of the 10 nearest that a large index must find, 0.5 to 1; 0.95 without.", min=0.5, max=1
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Follow the sources until Ctrl-C, and take in what changes.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read unchanged files too, and all of the index's own.")
    ] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Forget the vectors that no file needs any more.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Embed images into an index, or bring that index up to date.

    Example: dinosearch index ./catalog
    """
    from dinosearch.images.sources import open_sources
    from dinosearch.index.locate import index_for, indexes_path
    from dinosearch.index.survey import GivenOptions, Shard
    from dinosearch.index.sync import sync_index
    from dinosearch.index.watch import keep_synced
    from dinosearch.vit.folder import models_path
    from dinosearch.vit.resolve import resolve_model

    memory = bytes_of(max_memory)
    opened = open_sources(sources)
    part = Shard.parse(shard) if shard else None
    given = GivenOptions(None if exclude is None else tuple(filter(None, exclude)), include_hidden, all_pages)
    index_path = index_for(opened, name=name, indexes=indexes_path(), shard=shard, note=show.note)
    vit = resolve_model(model, models=models_path(), note=show.note, image_size=image_size)
    show.note(f"index: {show.shown(index_path)}")

    started: list[Encoder] = []  # one for all syncs of --watch

    def start_encoder(plan: "EncoderPlan") -> "Encoder":
        from dinosearch.encoder import open_encoder

        if not started:
            started.append(
                open_encoder(
                    vit,
                    device=device,
                    planned_images=plan.images,
                    precision=plan.precision,
                    sample=plan.sample,
                    note=show.note,
                )
            )
            show.note(f"engine: {started[0].engine}")
        return started[0]

    def sync(due: "Sequence[Source]", *, verify: bool = False) -> "SyncSummary":
        return _shown_sync(
            sync_index(
                due,
                index_path=index_path,
                model=vit,
                encoder_for=start_encoder,
                options=given,
                shard=part,
                allow_deletions=yes,
                verify=verify,
                prune=prune,
                max_memory=memory,
                recall=recall,
                precision=precision,
                note=show.note,
            )
        )

    def first_sync() -> "SyncSummary":
        summary = sync(opened, verify=verify)
        _print_summary(summary, as_json=as_json)
        return summary

    following = False

    def follow(due: "Sequence[Source]") -> None:
        nonlocal following
        if following:
            _print_changes(sync(due), as_json)
        else:
            first_sync()
            show.note("following; Ctrl-C ends it")
            following = True

    if watch:
        keep_synced(opened, follow, index_path=index_path, note=show.note)
    summary = first_sync()
    if summary.failed:
        raise typer.Exit(SOME_FAILED)


def info(index: IndexOption = None, as_json: JsonOption = False) -> None:
    """Show what an index holds: images, model, folders, FAISS file.

    Example: dinosearch info --index catalog
    """
    from dinosearch.index.contents import index_info

    facts = asdict(index_info(chosen_index(index)))
    facts["roots"] = [show.shown(root) for root in facts["roots"]]
    for source in facts["sources"]:
        source["location"] = show.shown(source["location"])
    if as_json:
        show.json_line(facts)
        return
    faiss = facts.pop("faiss") or {"type": "none yet"}
    facts["roots"] = ", ".join(facts["roots"])
    facts["sources"] = ", ".join(_source_line(source) for source in facts["sources"])
    facts["metadata"] = ", ".join(facts["metadata"])
    facts |= {f"faiss {key.replace('_', ' ')}": value for key, value in faiss.items()}
    show.table(["", "value"], facts.items(), wide=["value"])


def failures(
    index: IndexOption = None,
    as_json: JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV with a header, for spreadsheets.")] = False,
) -> None:
    """List the images of an index that could not be read, with the reason.

    Example: dinosearch failures --index catalog
    """
    from dinosearch.index.contents import failures as read_failures

    if as_json and as_csv:
        raise UsageError("--json and --csv are two forms. Choose one")
    rows = ((show.shown(row.path), row.status, row.reason, row.frame) for row in read_failures(chosen_index(index)))
    if as_json:
        for path, status, reason, frame in rows:
            known = {"path": path, "status": status, "reason": reason}
            show.json_line(known | ({"frame": frame} if frame else {}))
    elif as_csv:
        show.csv(["path", "status", "reason", "frame"], rows)
    else:
        show.table(["path", "status", "reason"], ((path, *rest) for path, *rest, _ in rows), wide=["path", "reason"])


def chosen_index(spec: str | None) -> Path:
    """The index that is named, or the newest, which is then said."""
    from dinosearch.index.locate import indexes_path, resolve_index

    return resolve_index(spec, indexes=indexes_path(), note=show.note)


def bytes_of(text: str | None) -> int | None:
    """ "1.5G" → 1610612736; None, for no limit, stays None."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not found:
        raise typer.BadParameter(f"{text!r} is no size; give bytes, or such as 900M or 1.5G")
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))


def _source_line(source: dict[str, Any]) -> str:
    options = [f"without {pattern}" for pattern in source["exclude"]]
    options += ["with hidden names"] * source["include_hidden"] + ["every page"] * source["all_pages"]
    return f"{source['kind']} {source['location']}" + (f" ({', '.join(options)})" if options else "")


def _details(progress: "SyncProgress") -> str:
    speed = f"{progress.images_per_second:.0f} images/s  {progress.mb_per_second:.1f} MB/s"
    parts = [speed, f"limit: {progress.limit}"] if progress.images_per_second else []
    return "  ".join(parts + ([f"{progress.failed} failed"] if progress.failed else []))


def _shown_sync(sync: "Generator[SyncProgress, None, None]") -> "SyncSummary":
    summary: SyncSummary | None = None
    with show.Progress() as bar:
        try:
            with closing(sync):  # saves what was embedded, wherever Ctrl-C comes in
                for progress in sync:
                    bar.update(progress.stage, done=progress.done, total=progress.total, details=_details(progress))
                    summary = progress.summary
        except KeyboardInterrupt:
            show.note("what was embedded is saved; the same command goes on from there")
            raise
    assert summary is not None
    return summary


def _print_summary(summary: "SyncSummary", *, as_json: bool) -> None:
    if as_json:
        show.json_line(asdict(summary))
    else:
        counts = ", ".join(
            f"{getattr(summary, name)} {name}" for name in ("new", "changed", "moved", "unchanged", "deleted", "failed")
        )
        show.line(f"{summary.index}: {summary.images} images can be searched ({counts})")
        speed = f", {summary.images_per_second:.0f} images/s" if summary.embedded else ""
        show.line(f"{summary.embedded} embedded with {summary.model} in {show.duration(summary.seconds)}{speed}")
    if summary.failed:
        images = "image" if summary.failed == 1 else "images"
        show.note(f"{summary.failed} {images} failed: dinosearch failures --index {summary.index}")


def _print_changes(summary: "SyncSummary", as_json: bool) -> None:
    """While following, a sync that found nothing is not worth a line."""
    if summary.new or summary.changed or summary.moved or summary.deleted or summary.embedded:
        _print_summary(summary, as_json=as_json)
