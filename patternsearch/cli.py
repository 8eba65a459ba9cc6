"""The command line. Heavy packages are imported by the commands that need them."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from .errors import ConfigError, PatternSearchError

app = typer.Typer(
    help="Search sparse matrix patterns: launch a sweep, look at it, take the best pattern away.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

SWEEPS = Path("sweeps")
Folder = Annotated[Path, typer.Option("--dir", help="Folder of the sweeps.")]
Name = Annotated[str | None, typer.Argument(help="A sweep of configs/, a YAML file or a task.")]
Data = Annotated[
    str | None, typer.Option(help="Your own data; with a task's name, the folder of its files.")
]
Columns = Annotated[str | None, typer.Option(help="Columns of your series: a,b,c.")]
Horizon = Annotated[int | None, typer.Option(help="Rows of your series to forecast.")]


@app.command()
def sweep(
    name: Name = None,
    data: Data = None,
    columns: Columns = None,
    horizon: Horizon = None,
    trials: Annotated[int | None, typer.Option(help="How many trials.")] = None,
    time: Annotated[float | None, typer.Option(help="Seconds; running trials are stopped.")] = None,
    workers: Annotated[int | None, typer.Option(help="Trials at a time.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the search and of training.")] = None,
    sampler: Annotated[str | None, typer.Option(help="tpe, gp, nsga2, random, structured.")] = None,
    executor: Annotated[str | None, typer.Option(help="ray or inline.")] = None,
    confirm: Annotated[
        int | None, typer.Option(help="Train so many of the best again from fresh seeds.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster; 'auto' on a node.")] = None,
    storage: Annotated[str | None, typer.Option(help="Database of the study, as a URL.")] = None,
    tracking_uri: Annotated[str | None, typer.Option(help="MLflow store or server.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, repeatable.")] = None,
    sweep_name: Annotated[str | None, typer.Option("--name", help="Name of this sweep.")] = None,
    start_from: Annotated[
        list[str] | None,
        typer.Option(help="First trials: an exported YAML, a sweep or SWEEP:NUMBER; repeatable."),
    ] = None,
    from_: Annotated[str | None, typer.Option("--from", help="A sweep to repeat.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted sweep.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Check and show the plan; train nothing.")] = False,
    folder: Folder = SWEEPS,
) -> None:
    """Search the best pattern for a task, or for your own data."""
    from .search import command

    name = _chosen(name, data, columns, horizon)
    options: dict[str, Any] = {"trials": trials, "time": time, "workers": workers, "seed": seed}
    options |= {"sampler": sampler, "executor": executor, "address": address, "storage": storage}
    options |= {"tracking_uri": tracking_uri, "start_from": start_from or None}
    changes = [*(set_ or []), *([] if confirm is None else [f"confirm.top={confirm}"])]
    command.sweep(name, options, changes, sweep_name, folder, from_, resume, dry_run)


def _data_folder(data: str | None) -> None:
    """Workers are told by the environment they inherit."""
    if data is not None:
        os.environ["PATTERNSEARCH_DATA"] = str(Path(data).resolve())


def _chosen(
    name: str | None, data: str | None, columns: str | None, horizon: int | None
) -> str | None:
    """What was named, its files in the folder `data`; or the name of the task of a user's data."""
    options = {"columns": columns, "horizon": horizon}
    given = [f"{key}={quote(str(v), safe=', ')}" for key, v in options.items() if v is not None]
    if data is not None and not data.strip():
        raise ConfigError("--data is empty; give the path of a file or folder")
    if name is None and data is not None:
        own = f"./{data}" if data == Path(data).stem else data  # not a task of ours
        return "?".join([own, *(["&".join(given)] if given else [])])
    if given:
        raise ConfigError("--columns and --horizon are for --data without a task")
    _data_folder(data)
    return name


@app.command()
def export(
    sweep: Annotated[str | None, typer.Argument(help="A sweep; the latest by default.")] = None,
    trial: Annotated[
        int | None, typer.Option(help="A trial's number; the best by default.")
    ] = None,
    front: Annotated[
        bool, typer.Option("--front", help="Every trial that none beats, as front/tNUMBER.yaml.")
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="YAML file.")] = Path("best.yaml"),
    folder: Folder = SWEEPS,
) -> None:
    """Write a trial's pattern as YAML, its weights in safetensors beside it."""
    from .search import command

    if front:
        command.export_front(sweep, trial, folder)
    else:
        command.export(sweep, trial, output, folder)


@app.command()
def confirm(
    sweep: Annotated[str | None, typer.Argument(help="A sweep; the latest by default.")] = None,
    top: Annotated[int, typer.Option(help="How many of the best trials.")] = 3,
    seeds: Annotated[int, typer.Option(help="Fresh seeds each is trained from.")] = 5,
    executor: Annotated[str | None, typer.Option(help="ray or inline.")] = None,
    folder: Folder = SWEEPS,
) -> None:
    """Train the best trials and the expert designs again from fresh seeds; the winner's test."""
    from .search import command

    command.confirm(sweep, top, seeds, executor, folder)


@app.command()
def compare(
    name: Name = None,
    scale: Annotated[str, typer.Option(help="small, subsampled, or full, for a GPU.")] = "small",
    trials: Annotated[int | None, typer.Option(help="Of the search, and of the baselines.")] = None,
    seeds: Annotated[int, typer.Option(help="Fresh seeds that all are trained from.")] = 3,
    data: Data = None,
    columns: Columns = None,
    horizon: Horizon = None,
    workers: Annotated[int | None, typer.Option(help="Trainings at a time.")] = None,
    executor: Annotated[str | None, typer.Option(help="ray or inline.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, repeatable.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of all that is kept.")
    ] = None,
) -> None:
    """Compare the pattern found with expert designs and native models of torch's own layers."""
    from .search import compare as comparing

    name = _chosen(name, data, columns, horizon)
    if name is None:
        raise ConfigError("name a sweep of configs/, a YAML file or a task, or give --data PATH")
    short = re.sub(r"[^\w.-]+", "-", Path(name).stem)
    folder = output or Path("comparisons") / f"{short}-{scale}"
    options = {"workers": workers, "executor": executor, "changes": set_ or []}
    comparing.command(name, scale, trials, seeds, folder, **options)


@app.command()
def report(
    sweep: Annotated[str | None, typer.Argument(help="A sweep; the latest by default.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML file; in its folder by default.")
    ] = None,
    folder: Folder = SWEEPS,
) -> None:
    """Write one HTML page that explains a sweep, its pictures inside it and as PNG beside it."""
    from .search import command

    command.report(sweep, output, folder)


@app.command()
def train(
    path: Annotated[Path, typer.Argument(help="An exported YAML.")],
    seed: Annotated[int | None, typer.Option(help="Another seed than the exported one.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Weights file.")] = None,
    data: Annotated[str | None, typer.Option(help="Folder of the task's files.")] = None,
) -> None:
    """Train an exported pattern again; print its validation and test metric."""
    from . import retrain

    _data_folder(data)
    typer.echo(retrain.train(path, seed, output))


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="An exported YAML, a pattern family, or 'families'.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="PNG file.")] = None,
) -> None:
    """Print cost and structure place by place, and draw the matrices."""
    from . import pictures

    typer.echo(pictures.show(name, output))


@app.command("list")
def list_(
    what: Annotated[
        str, typer.Argument(help="tasks, families, mixers, baselines, spaces, configs or kernels.")
    ] = "",
) -> None:
    """List what there is."""
    from . import listing

    typer.echo(listing.listing(what))


@app.command()
def ui(
    folder: Folder = SWEEPS,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on this machine.")] = 5000,
    tracking_uri: Annotated[str | None, typer.Option(help="Another MLflow store.")] = None,
) -> None:
    """Open the MLflow UI on the sweeps' store."""
    from .search import command

    command.ui(folder, port, tracking_uri)


def version(value: bool) -> None:
    if value:
        from . import __version__

        typer.echo(f"patternsearch {__version__}")
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[bool, typer.Option("--version", callback=version, is_eager=True)] = False,
) -> None:
    """Search sparse matrix patterns."""


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; a user's mistake is one line on stderr and exit status 2."""
    try:
        return app(arguments, prog_name="patternsearch")
    except PatternSearchError as e:
        typer.echo(f"error: {e}", err=True)
    except ModuleNotFoundError as e:
        if e.name not in _EXTRAS:
            raise
        need = ConfigError(f"{e.name} is not installed; pip install 'patternsearch[sweep]'")
        typer.echo(f"error: {need}", err=True)
    sys.exit(2)


_EXTRAS = {
    "ray",
    "optuna",
    "mlflow",
    "matplotlib",
    "rich",
    "pydantic",
    "sklearn",
    "filelock",
    "jinja2",
    "scipy",
    "pandas",
    "pooch",
    "requests",
    "tqdm",
}
