"""What differs between two configurations: field by field, and as the table that a pull request shows.

What was measured comes from a comparison's findings or a slot's evidence.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sdxl_lab.config import GenerationConfig, ServingLimits
from sdxl_lab.release.records import Evidence, Findings


def changed_fields(before: GenerationConfig, after: GenerationConfig) -> dict[str, tuple[Any, Any]]:
    """Field by field what differs, nested ones as `refiner.handover`; None where a side has no such field."""
    return changes(flat(_plain(before)), flat(_plain(after)))


def _plain(config: GenerationConfig) -> dict[str, Any]:
    """Its plain values; of a LoRA or an embedding whose sha256 is known its name, since it does not matter where its
    file lies."""
    plain = config.to_dict()
    for table, ref in zip(plain.get("loras", ()), config.loras, strict=True):
        if ref.sha256 is not None:
            for place in ("source", "revision", "file"):
                table.pop(place, None)
            table["name"] = ref.name
    for table, embedding in zip(plain.get("embeddings", ()), config.embeddings, strict=True):
        if embedding.sha256 is not None:
            table.pop("source")
    return plain


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Name by name what differs, as (before, after); None where a side lacks the name."""
    return {
        name: (before.get(name), after.get(name)) for name in {**before, **after} if before.get(name) != after.get(name)
    }


def flat(content: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested values under dotted names; those of a table in a list have its place in them, from 0."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
            value = {str(place): each for place, each in enumerate(value)}
        found |= flat(value, f"{above}{name}.") if isinstance(value, Mapping) else {above + name: value}
    return found


def difference_table(
    before: GenerationConfig | None,
    after: GenerationConfig,
    evidence: Findings | Evidence | None = None,
    limits: tuple[ServingLimits, ServingLimits] | None = None,
) -> str:
    """What a pull request says of a promotion, as Markdown: the settings that change, and with `evidence` the metrics
    and the gates. `limits` are what clients may ask for, before and after; theirs are named as `serving.steps`."""
    changed = changes(flat(_plain(before)) if before else {}, flat(_plain(after)))
    if limits is not None:
        then, now = (flat(side.to_dict(), "serving.") for side in limits)
        changed |= changes(then, now)
    parts = [f"### {f'`{before.short_digest}`' if before else 'a new slot'} → `{after.short_digest}`"]
    rows = [(f"`{name}`", _shown(old), _shown(new)) for name, (old, new) in changed.items()]
    parts.append(_markdown(("setting", "served", "candidate"), rows) if rows else "The settings are the same.")
    if evidence is not None and evidence.metrics:
        head = ("metric", "better", "served", "candidate", "difference [95 %]")
        parts.append(_markdown(head, _metric_rows(evidence)))
        drawn = " x ".join(_count(len(getattr(evidence, names)), names) for names in ("prompts", "seeds"))
        parts.append(f"{drawn}; intervals are over prompts.")
        verdicts = [("pass" if gate.passed else "**fail**", gate.gate, gate.figures) for gate in evidence.gates]
        if verdicts:
            parts.append(_markdown(("", "gate", "figures"), verdicts))
    return "\n\n".join(parts) + "\n"


def _count(number: int, names: str) -> str:
    return f"{number} {names if number != 1 else names.removesuffix('s')}"


def _metric_rows(evidence: Findings | Evidence) -> list[tuple[str, ...]]:
    rows = []
    for name, metric in evidence.metrics.items():
        found = metric.difference
        shown = "" if found is None else f"{found.mean:+.4g} [{found.low:+.4g}, {found.high:+.4g}]"
        means = [_shown(None if side is None else side.mean) for side in (metric.served, metric.candidate)]
        rows.append((f"`{name}`", metric.better or "", *means, shown))
    return rows


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
