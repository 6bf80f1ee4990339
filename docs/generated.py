"""The parts of the documentation that come from the code: `python -m docs.generated` writes them.

A page marks such a part with `<!-- generated: NAME -->` and `<!-- end -->`; `PARTS` makes its content.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import grimp
import networkx

from bench import cost, measure
from sdxl_lab.config import GenerationConfig, ServingLimits
from sdxl_lab.declaration import Declared, Setting, Table, Tables
from sdxl_lab.job import OVER, TRANSITIONS, JobState
from sdxl_lab.schedules import ABLE
from service.api.problems import ENTRIES
from service.app import create_app
from service.settings import TABLE as SETTINGS
from service.settings import Settings, default

ROOT = Path(__file__).parents[1]
PAGES = (*(ROOT / "docs").glob("*.md"), ROOT / "bench" / "README.md")
# Compact, so that the text stays readable when a page scales the graph to its width.
COMPACT = '%%{init: {"flowchart": {"nodeSpacing": 18, "rankSpacing": 32, "padding": 8}}}%%'
PART = re.compile(r"<!-- generated: ([\w ]+) -->\n.*?<!-- end -->", re.S)


def imports() -> networkx.DiGraph:
    """The imports of each room of the library and each module of the service, without indirect ones."""
    code = grimp.build_graph("sdxl_lab", "service", cache_dir=None)
    graph = networkx.DiGraph()
    for module in code.modules:
        for other in code.find_modules_directly_imported_by(module):
            user, used = (_shown(name) for name in (module, other))
            if "." in used and user != used and not user.endswith("__main__"):
                graph.add_edge(user, used)
    return networkx.transitive_reduction(graph)


def _shown(module: str) -> str:
    """The node that a module belongs to."""
    return ".".join(module.split(".")[: 2 if module.startswith("sdxl_lab") else 3])


def diagram(package: str) -> str:
    """The modules of a package and their imports, in mermaid's notation."""
    edges = sorted(edge for edge in imports().edges if edge[0].startswith(package))
    lines = (f"  {user} --> {used}".replace(f"{package}.", "") for user, used in edges)
    return "\n".join(["```mermaid", COMPACT, "flowchart LR", *lines, "```"])


def table(*rows: tuple[str, ...]) -> str:
    """Rows in Markdown; the first is the head."""
    head, *rest = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *rest])


def calls() -> str:
    """Every call of the service, with the first sentence of its description."""
    paths = create_app(Settings()).openapi()["paths"]
    described = (
        (f"`{method.upper()} {path}`", re.split(r"\.(?:\s|$)", operation["description"])[0].replace("\n", " "))
        for path, methods in paths.items()
        for method, operation in methods.items()
    )
    return table(("call", "does"), *described)


def errors() -> str:
    """Every error of the service by status, with the end of its `type` and its Retry-After."""
    entries = sorted(ENTRIES, key=lambda entry: (entry.status, entry.kind))
    return table(
        ("status", "`type`: `urn:sdxl-lab:...`", "what it says", "`Retry-After`"),
        *(
            (str(e.status), f"`{e.kind}`", e.title, "measured" if e.measured else str(e.retry_after or ""))
            for e in entries
        ),
    )


def settings() -> str:
    """Every setting of the service."""
    return table(
        ("setting", "default", "meaning"),
        *((f"`{name}`", f"`{default(setting)}`", setting.description or "") for name, setting in SETTINGS.items()),
    )


def configuration() -> str:
    """Every setting of an image, as `GenerationConfig` declares it."""
    return table(
        ("setting", "label", "what it does", "rule", "unit", "default", "option of `generate`", "source"),
        *(
            (f"`{s.name}`", s.label, s.help, _rule(s), s.unit, _default(s), _option(s), s.source)
            for s in _all(GenerationConfig)
        ),
    )


def schedules() -> str:
    """What each scheduler can be told of its schedule, and in A1111's words."""
    yes = {True: "yes", False: ""}
    return table(
        ("scheduler", "`sigma_schedule`", "`sigmas`", "`timesteps`", "`timestep_spacing`"),
        *(
            (
                f"`{name}`",
                f"by its name; others with `{able.twin}`" if able.twin else ", ".join(f"`{s}`" for s in able.schedules),
                yes[able.sigmas],
                yes[able.timesteps],
                "with `own` and the curves" if able.spaced_curves else "with `own`" if able.spacing else "",
            )
            for name, able in ABLE.items()
        ),
    )


def limits() -> str:
    """Every limit of a slot, as `ServingLimits` declares it."""
    rows = ((f"`{s.name}`", s.help, _rule(s), s.unit, _default(s)) for s in _all(ServingLimits))
    return table(("limit", "meaning", "rule", "unit", "default for nano"), *rows)


def _all(kind: type[Declared]) -> list[Setting]:
    """Every setting, and after a list of tables those of one, whose place is N."""
    found: list[Setting] = []
    for setting in kind.settings().values():
        found.append(setting)
        if isinstance(setting.kind, Tables):
            inner = setting.kind.of.settings().values()
            found += [replace(each, name=f"{setting.name}.N.{each.name}") for each in inner]
    return found


def _rule(setting: Setting) -> str:
    words = "the settings below" if isinstance(setting.kind, Table) else setting.kind.words
    return f"{words}{', or left out' if setting.optional else ''}"


def _default(setting: Setting) -> str:
    if setting.default is None:
        return "left out"
    plain = setting.default.to_dict() if isinstance(setting.default, Declared) else setting.default
    return f"`{json.dumps(plain)}`"


def _option(setting: Setting) -> str:
    return f"`--{setting.option}`" if setting.option else "`--model`" if setting.name == "model" else ""


def job_states() -> str:
    """The table of a job's legal transitions, as a state diagram."""
    ends = (f"  {state} --> [*]" for state in JobState if state in OVER)
    moves = (f"  {state} --> {after}" for state in JobState for after in JobState if after in TRANSITIONS[state])
    return "\n".join(["```mermaid", "stateDiagram-v2", f"  [*] --> {JobState.ACCEPTED}", *moves, *ends, "```"])


PARTS = {
    "job states": job_states,
    "configuration": configuration,
    "limits": limits,
    "schedules": schedules,
    "imports sdxl_lab": lambda: diagram("sdxl_lab"),
    "imports service": lambda: diagram("service"),
    "calls": calls,
    "errors": errors,
    "settings": settings,
    "cost": cost.table,
    "figures": measure.figures,
}


def renewed(page: str) -> str:
    """A page with its generated parts up to date. KeyError for an unknown part."""
    return PART.sub(lambda part: f"<!-- generated: {part[1]} -->\n{PARTS[part[1]]()}\n<!-- end -->", page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(renewed(path.read_text()))
