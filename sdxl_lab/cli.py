"""The terminal's door: draw, show or repeat an image, sweep, tune, promote and verify settings, run a notebook.

Knows words, exit codes and progress bars; each command imports what does its work when it is asked for, so that help
and a wrong word need no torch.
"""

import argparse
import dataclasses
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdxl_lab.config import FIT, MASK_BLUR, MAX_SEED, PROMPT_2, STRENGTH, ConfigError, GenerationConfig
from sdxl_lab.declaration import Choice, Falling, Kind, Pair, Setting, Switch, Table, Tables, Text
from sdxl_lab.notebook.runner import NotebookError
from sdxl_lab.version import __version__

STOPPED = 130  # what a shell expects of a program ended by Ctrl-C
SOURCE = (STRENGTH, MASK_BLUR, FIT)


def parser() -> argparse.ArgumentParser:
    called = "sdxl-lab" if Path(sys.argv[0]).stem == "sdxl-lab" else "python -m sdxl_lab"
    top = argparse.ArgumentParser(prog=called, description=__doc__.splitlines()[0])
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True)

    generate = commands.add_parser("generate", help="draw an image")
    generate.add_argument("prompt", nargs="?", help="what to draw; with --like, default that image's prompt")
    generate.add_argument("--out", type=Path, required=True, help="the PNG to write")
    start = generate.add_mutually_exclusive_group()
    start.add_argument("--like", type=Path, metavar="FILE", help="take prompt, seed and settings from this PNG")
    start.add_argument("--config", type=Path, metavar="FILE", help="take the settings from this config.toml")
    start.add_argument("--model", help="nano (default), sdxl, a folder, a .safetensors file or a hub id")
    generate.add_argument(
        "--parameters", type=Path, metavar="FILE", help="take prompt, seed and settings from the A1111 text of this PNG"
    )
    generate.add_argument("--prompt-2", metavar="TEXT", help=PROMPT_2.help)
    generate.add_argument("--seed", type=int, help=f"0 to {MAX_SEED}; random where none is given")
    source = generate.add_argument_group("source image", "what the image starts from, instead of noise alone")
    source.add_argument("--source", type=Path, metavar="FILE", help="an image that the base goes over again")
    source.add_argument("--mask", type=Path, metavar="FILE", help="white where the source is painted anew")
    for setting in SOURCE:
        source.add_argument(
            f"--{setting.option}",
            dest=setting.name,
            help=f"{_help(setting)}; default {setting.default}",
            **_form(setting.kind),
        )
    _add_settings(generate)
    generate.set_defaults(run=_generate)

    show = commands.add_parser("show", help="print the record inside a PNG")
    show.add_argument("file", type=Path)
    show.add_argument("--parameters", action="store_true", help="print the A1111 text instead")
    show.set_defaults(run=_show)

    promote = commands.add_parser("promote", help="try a configuration against what a slot serves, and promote it")
    promote.add_argument("candidate", type=Path, help="a config.toml, or an image drawn with the settings")
    promote.add_argument("slot", type=Path, help="the slot's folder, such as service/promoted/nano")
    promote.add_argument("--plan", type=Path, metavar="FILE", help="TOML with prompts, seeds, gates")
    promote.add_argument("--prompt", action="append", help="instead of the plan's prompts; may be repeated")
    promote.add_argument("--seed", type=int, action="append", help="instead of the plan's seeds; may be repeated")
    promote.add_argument("--gate", action="append", metavar="GATE", help="instead of the plan's; may be repeated")
    promote.add_argument(
        "--evidence", type=Path, metavar="FILE", help="what a comparison found before, instead of a new one"
    )
    promote.add_argument("--why", required=True, help="the reason, kept in the evidence")
    promote.add_argument("--who", required=True, help="who promotes")
    promote.add_argument("--allow-dirty", action="store_true", help="promote from a work tree with changes")
    promote.set_defaults(run=_promote)

    verify = commands.add_parser(
        "verify", help="draw a slot's goldens again; exit code 1 and the reason if one differs"
    )
    verify.add_argument("slot", type=Path)
    verify.set_defaults(run=_verify)

    diff = commands.add_parser("diff", help="what would change in a slot, as Markdown")
    diff.add_argument("slot", type=Path, help="the slot's folder")
    diff.add_argument("candidate", type=Path, help="a config.toml, an image, or another slot")
    diff.set_defaults(run=_diff)

    migrate = commands.add_parser("migrate", help="make what 0.1.0 wrote into what this version reads")
    migrate.add_argument("path", type=Path, help="a slot, a configuration's TOML, or a folder of such")
    migrate.set_defaults(run=_migrate)

    notebook = commands.add_parser("notebook", help="run a notebook to its end, or say why it did not get there")
    notebook.add_argument("file", type=Path, help="an .ipynb, such as notebooks/05_regression.ipynb")
    notebook.add_argument(
        "-p", "--parameter", action="append", default=[], metavar="NAME=VALUE", help="may be repeated"
    )
    notebook.add_argument("--out", type=Path, metavar="FILE", help="the executed copy; default runs/notebooks/NAME")
    notebook.add_argument("--cell-seconds", type=float, default=600, help="what one cell may take (default 600)")
    notebook.set_defaults(run=_notebook)

    sweep = commands.add_parser("sweep", help="draw and measure every combination that a file lists; resumes")
    sweep.add_argument("file", type=Path, help="a sweep's TOML; studies/ has examples")
    sweep.add_argument("--out", type=Path, help="the folder for table.parquet (default runs/sweeps/NAME)")
    sweep.add_argument("--cache", type=Path, default=Path("runs/cache"), help="where images and numbers are kept")
    sweep.set_defaults(run=_sweep)

    tune = commands.add_parser("tune", help="search the settings in a file for quality against cost; resumes")
    tune.add_argument("file", type=Path, help="a study's TOML; studies/ has examples")
    tune.add_argument("--out", type=Path, help="the folder for what is found (default runs/studies/NAME)")
    tune.add_argument("--storage", help="a database URL that workers share (default a SQLite file in the folder)")
    tune.add_argument("--cache", type=Path, default=Path("runs/cache"), help="where images and numbers are kept")
    tune.set_defaults(run=_tune)
    return top


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, 1 with the reason on standard error, or 130 after Ctrl-C."""
    asked = parser().parse_args(arguments)
    try:
        asked.run(asked)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return STOPPED
    except OSError as error:
        told = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error
        print(f"error: {told}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("sdxl_lab"):
            raise
        print(f"error: {error.name} is missing; the lab's packages bring it: pip install -e .[lab]", file=sys.stderr)
        return 1
    except (ValueError, NotebookError) as error:  # ConfigError, ModelError, SlotError... are ValueErrors
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _add_settings(command: argparse.ArgumentParser) -> None:
    """An option for every setting of the configuration, and one for those that may be left out."""
    group = command.add_argument_group("settings", "what is not said is as in the configuration that one starts from")
    optional = {}
    for setting in _options():
        group.add_argument(f"--{setting.option}", dest=setting.name, help=_help(setting), **_form(setting.kind))
        if isinstance(setting.kind, Tables) or (setting.optional and not isinstance(setting.kind, Table)):
            optional[str(setting.option)] = setting.name
    group.add_argument(
        "--without",
        action="append",
        choices=optional,
        metavar="SETTING",
        help=f"leave a setting out; may be repeated: {', '.join(optional)}",
    )


def _options() -> list[Setting]:
    return [setting for setting in GenerationConfig.settings().values() if setting.option]


def _form(kind: Kind) -> dict[str, Any]:
    """How argparse reads an option's value."""
    match kind:
        case Switch() | Table():
            return {"action": argparse.BooleanOptionalAction}
        case Tables(form=form):
            return {"type": _reader(kind), "action": "append", "metavar": form}
        case Pair(names=names):
            return {"type": _reader(kind), "nargs": 2, "metavar": tuple(name.upper() for name in names)}
        case Falling():
            return {"type": _reader(kind), "nargs": "+", "metavar": "N"}
        case Choice():
            return {"metavar": "NAME"}
    return {"type": _reader(kind), "metavar": "TEXT" if isinstance(kind, Text) else "N"}


def _reader(kind: Kind) -> Callable[[str], Any]:
    def read(word: str) -> Any:
        try:
            return kind.read(word)
        except ConfigError as error:  # of a table in a list, which says more
            raise argparse.ArgumentTypeError(str(error)) from error
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"must be {kind.words}; received {word!r}") from error

    return read


def _help(setting: Setting) -> str:
    """What the setting does, and what values it takes where its help does not say so already."""
    rule = "" if isinstance(setting.kind, Switch | Table | Text) else f"; {setting.kind.words}"
    if isinstance(setting.kind, Tables):
        rule = "; may be repeated"
    unit = f" ({setting.unit})" if setting.unit else ""
    return f"{setting.help}{rule}{unit}".replace("%", "%%")


def _changes(asked: argparse.Namespace) -> dict[str, Any]:
    """The options given, as plain changes of the configuration."""
    given = {setting.name: getattr(asked, setting.name) for setting in _options()}
    changes = {name: value for name, value in given.items() if value is not None}
    options = {setting.option: setting.name for setting in _options()}
    for option in asked.without or ():
        name = options[option]
        if name in changes:
            raise ValueError(f"--without {option} leaves out a setting; received it with --{option}, too")
        changes[name] = None
    return changes


def _generate(asked: argparse.Namespace) -> None:
    from sdxl_lab.diffusion.lora_files import pinned

    record = None
    prompt, seed, second = asked.prompt, asked.seed, asked.prompt_2
    if asked.like:
        from sdxl_lab.images import read_record

        record = read_record(asked.like)
        config = record.config
        if prompt is None:  # a new prompt does away with both of the image's
            prompt, second = record.prompt, second or record.prompt_2
        seed = seed if seed is not None else record.seed
    elif asked.config:
        config = GenerationConfig.from_toml(asked.config)
    else:
        config = GenerationConfig.for_model(asked.model or "nano")
    if asked.parameters:
        told = _parameters(asked.parameters)
        config = config.changed(told.settings)
        prompt, seed = prompt if prompt is not None else told.prompt, seed if seed is not None else told.seed
    if prompt is None:
        raise ConfigError("prompt", None, "given, or taken from an image with --like", "A cat in a hat")
    config = _with_commits(pinned(config.changed(_changes(asked), none=None)))
    seed = seed if seed is not None else secrets.randbelow(2**32)

    if asked.out.suffix.lower() != ".png":
        raise ValueError(f"--out must end in .png, since only PNG carries the record; received '{asked.out}'")

    from sdxl_lab.diffusion.engine import Engine
    from sdxl_lab.job import ImageRequest

    source = _given_source(asked, record)
    request = ImageRequest(config, prompt, seed, source, second)
    with Engine.load(config) as engine:
        if source is None and record is not None and record.source is not None:
            again = _source(engine, record, _mask(asked))
            request = dataclasses.replace(request, source=dataclasses.replace(again, **_said(asked)))
        tokens = engine.tokens(request)
        for name, count in tokens.items():
            if warning := count.warning(name):
                print(f"warning: {warning}", file=sys.stderr)
        image = _draw(engine, request)
    image.save(asked.out)
    told = f"{image.timings['total_ms'] / 1000:.1f} s  {tokens['prompt']}"
    print(f"{asked.out}  seed {seed}  config {config.short_digest}  {told}")


def _parameters(path: Path) -> Any:
    """What A1111's text in a PNG says; what of it is not taken is printed."""
    from sdxl_lab.a1111 import read
    from sdxl_lab.images import open_image

    told = read(getattr(open_image(path), "text", {}).get("parameters", ""))
    if told.unread:
        print(f"not taken: {', '.join(f'{name}: {value}' for name, value in told.unread.items())}", file=sys.stderr)
    return told


def _with_commits(config: GenerationConfig) -> GenerationConfig:
    """With the commit of every hub id that came without one, which is said."""
    names = (config.model.base, config.model.refiner, config.model.vae, config.model.config)
    if not any(name and name.count("/") == 1 for name in names):
        return config
    from sdxl_lab.diffusion import hub

    model = hub.pinned(config.model)
    for name in model.differs(config.model):
        role = name.removesuffix("revision").rstrip("_") or "base"
        print(f"{model.value(role)}: the commit is {model.value(name)}", file=sys.stderr)
    return config.with_(model=model)


def _said(asked: argparse.Namespace) -> dict[str, Any]:
    """What the command line says of how the source is taken."""
    return {s.name: getattr(asked, s.name) for s in SOURCE if getattr(asked, s.name) is not None}


def _mask(asked: argparse.Namespace) -> Any:
    from sdxl_lab.images import open_image

    return None if asked.mask is None else open_image(asked.mask)


def _given_source(asked: argparse.Namespace, record: Any) -> Any:
    """The source image in a file; what is not said of it is as in the `record` of an image to be like. None where there
    is none, or it is to be drawn again. Raises `ConfigError` where a file is missing."""
    from sdxl_lab.images import open_image
    from sdxl_lab.source import SourceImage

    known = None if record is None else record.source_image
    if asked.source is None:
        if known is not None and record.source is None:
            rule = f"the file that the image started from, whose pixels have the sha256 {known.sha256}"
            raise ConfigError("source", None, rule, "--source=cat.png")
        given = [name for name in ("mask", *_said(asked)) if getattr(asked, name) is not None]
        if given and (record is None or record.strength is None):
            raise ConfigError(given[0], getattr(asked, given[0]), "left out without a source", "--source=cat.png")
        return None
    before = {}
    if known is not None:
        before = {"strength": record.strength, "fit": known.fit, "stage": known.stage}
        before |= {} if known.mask_blur is None else {"mask_blur": known.mask_blur}
    source = SourceImage(open_image(asked.source), mask=_mask(asked), **(before | _said(asked)))
    for name in [] if known is None else source.differs(known):
        print(f"warning: the {name} is another one than that of {asked.like}", file=sys.stderr)
    return source


def _source(engine: Any, record: Any, mask: Any = None) -> Any:
    """The image that another one started from, drawn again from the record inside its record. Raises `ConfigError`
    where there was a mask, which no record holds."""
    from sdxl_lab.job import ImageRequest
    from sdxl_lab.source import SourceImage

    parent, known = record.source, record.source_image
    above = _source(engine, parent) if parent.source is not None else None
    request = ImageRequest(parent.config, parent.prompt, parent.seed, above, parent.prompt_2)
    if known is None:  # 0.1.0 had nothing but the refiner
        return SourceImage(engine.draw(request).image, record.strength, parent, mask, stage="refiner")
    if known.mask_sha256 is not None and mask is None:
        rule = f"the file with the image's mask, whose pixels have the sha256 {known.mask_sha256}"
        raise ConfigError("mask", None, rule, "--mask=mask.png")
    blur = {} if known.mask_blur is None else {"mask_blur": known.mask_blur}
    how = {"mask": mask, "fit": known.fit, "stage": known.stage, **blur}
    return SourceImage(engine.draw(request).image, record.strength, parent, **how)


def _draw(engine: Any, request: Any) -> Any:
    """Draw with a progress bar on the terminal."""
    from tqdm import tqdm

    with tqdm(total=1, unit="step", leave=False, disable=None) as bar:
        job = engine.submit(request)
        try:
            while not job.over:
                bar.n, bar.total = job.progress[0], job.progress[1] or 1
                bar.refresh()
                time.sleep(0.05)
        except KeyboardInterrupt:
            job.cancel()
            raise
    return job.result()


def _show(asked: argparse.Namespace) -> None:
    from sdxl_lab.images import a1111_parameters, read_record

    record = read_record(asked.file)
    print(
        a1111_parameters(record)
        if asked.parameters
        else json.dumps(record.to_dict(), indent=2, sort_keys=True, ensure_ascii=False)
    )


def _promote(asked: argparse.Namespace) -> None:
    from sdxl_lab.evaluation.comparison import candidate_of, compare, draw
    from sdxl_lab.job import ImageRequest
    from sdxl_lab.release.diff import difference_table
    from sdxl_lab.release.promote import clean_state, promote, read_findings
    from sdxl_lab.release.slot import slot_config

    clean_state(asked.allow_dirty)
    config = candidate_of(asked.candidate)
    before = slot_config(asked.slot)
    if asked.evidence:
        if given := [name for name in ("plan", "prompt", "seed", "gate") if getattr(asked, name) is not None]:
            raise ValueError(f"--evidence says what was tried, and must come without --{given[0]}")
        findings = read_findings(asked.evidence)
        requests = [ImageRequest(config, golden.prompt, golden.seed) for golden in findings.goldens]
        goldens = draw(requests, exact=range(len(requests)))
    else:
        found = compare(config, asked.slot, _plan(asked))
        findings, goldens = found.findings(), found.goldens
    print(difference_table(before, config, findings))
    slot = promote(
        config,
        asked.slot,
        images=goldens,
        why=asked.why,
        who=asked.who,
        findings=findings,
        allow_dirty=asked.allow_dirty,
    )
    count = len(slot.goldens)
    print(f"{slot.folder} now holds {slot.config.short_digest}, with {count} golden image{'' if count == 1 else 's'}")


def _plan(asked: argparse.Namespace) -> Any:
    from sdxl_lab.evaluation.comparison import ComparisonPlan

    plan = ComparisonPlan.from_toml(asked.plan) if asked.plan else ComparisonPlan()
    return dataclasses.replace(
        plan, prompts=asked.prompt or plan.prompts, seeds=asked.seed or plan.seeds, gates=asked.gate or plan.gates
    )


def _verify(asked: argparse.Namespace) -> None:
    from sdxl_lab.evaluation.regression import regress
    from sdxl_lab.release.slot import load_slot

    found = regress(load_slot(asked.slot), metrics=False)
    for golden in found.goldens:
        verdict = "as promoted" if golden.passed else "differs"
        measured = f"{golden.measure} {golden.difference:.4f}, allowed {golden.tolerance:.4f}"
        similar = "" if golden.ssim is None else f", SSIM {golden.ssim:.4f}"
        print(f"{golden.golden.path.name}  {verdict}  {measured}{similar}")
    found.check()


def _diff(asked: argparse.Namespace) -> None:
    from sdxl_lab.evaluation.comparison import candidate_of
    from sdxl_lab.release.diff import difference_table
    from sdxl_lab.release.slot import load_slot

    before = load_slot(asked.slot)
    if asked.candidate.is_dir():
        other = load_slot(asked.candidate)
        evidence = other.evidence if other.evidence and other.evidence.replaces == before.digest else None
        print(difference_table(before.config, other.config, evidence, (before.limits, other.limits)))
    else:
        print(difference_table(before.config, candidate_of(asked.candidate)))


def _migrate(asked: argparse.Namespace) -> None:
    from sdxl_lab.release.migrate import migrate

    for line in migrate(asked.path):
        print(line)


def _notebook(asked: argparse.Namespace) -> None:
    from sdxl_lab.notebook.runner import parse_parameters, run_notebook

    words = {}
    for pair in asked.parameter:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"a parameter must be NAME=VALUE; received {pair!r}. Example: steps=6")
        words[name] = value
    began = time.monotonic()
    out = run_notebook(asked.file, parse_parameters(asked.file, words), out=asked.out, cell_seconds=asked.cell_seconds)
    print(f"{out}  ran to its end in {time.monotonic() - began:.0f} s")


def _sweep(asked: argparse.Namespace) -> None:
    from sdxl_lab.research.sweep import OUT, Sweep, run_sweep, summary

    sweep = Sweep.from_toml(asked.file)
    out = asked.out or OUT / sweep.name
    with _resumable(asked.cache), _cells_bar() as on_progress:
        table = run_sweep(sweep, out=out, cache=asked.cache, on_progress=on_progress)
    if not _first():
        return
    failed = table["error"].dropna()
    print(summary(sweep, table).to_string())
    print(f"{out / 'table.parquet'}  {len(table)} cells, {len(failed)} failed")
    for told in (failed, table["warning"].dropna()):
        for reason, count in told.value_counts().items():
            print(f"  {count} x {reason}", file=sys.stderr)


@contextmanager
def _cells_bar() -> Iterator[Callable[[Any], None]]:
    """A progress bar on the terminal, with a forecast that knows long cells from short ones."""
    from tqdm import tqdm

    form = "{n_fmt}/{total_fmt} cells |{bar}| {elapsed}{postfix}"
    with tqdm(total=1, bar_format=form, leave=False, disable=None) as bar:

        def show(progress: Any) -> None:
            bar.n, bar.total = progress.done, progress.total
            left = "?" if progress.eta is None else tqdm.format_interval(progress.eta)
            bar.set_postfix_str(f"{left} left, {progress.drawn} drawn, {progress.failed} failed")

        yield show


def _tune(asked: argparse.Namespace) -> None:
    from sdxl_lab.research.tune import OUT, StudyPlan, tune

    plan = StudyPlan.from_toml(asked.file)
    out = asked.out or OUT / plan.name

    def told(trial: Any) -> None:
        settings = "  ".join(f"{name} {value}" for name, value in trial.params.items())
        outcome = trial.user_attrs.get("pruned", "interrupted")
        if trial.values:
            outcome = f"{plan.metric.name} {trial.values[0]:.4g} at {trial.values[1]:g} UNet rows"
        print(f"trial {trial.number}  {settings}\n  {trial.state.name.lower()}: {outcome}", flush=True)

    with _resumable(asked.cache):
        tuned = tune(plan, out=out, storage=asked.storage, cache=asked.cache, on_trial=told)
    if not _first():
        return
    names = ["trial", *plan.space, plan.metric.name, "unet_rows"]
    print(f"\nThe front, cheapest first\n{tuned.front[names].to_string(index=False)}")
    print(f"\nImportance of each field\n{tuned.importance.round(3).to_string()}")
    print(f"\nCandidate: {tuned.rule}")
    if tuned.candidate is not None:
        print(f"{out / 'candidate.toml'}  config {tuned.candidate.short_digest}")


def _first() -> bool:
    """Whether this is the one of many processes that speaks."""
    return int(os.environ.get("RANK", 0)) == 0


@contextmanager
def _resumable(cells: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nwhat is finished is kept in {cells}; to go on, run the same command again", file=sys.stderr)
        raise
