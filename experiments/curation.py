"""What a `prepare_data` section says of places and of what is done to their documents."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments import fields
from experiments.contract import Context
from kwaicoder_jax import files
from kwaicoder_jax.data import cleaning, curate, reading
from kwaicoder_jax.data.decontamination import Settings as Decontamination
from kwaicoder_jax.data.deduplication import Settings as Deduplication
from kwaicoder_jax.data.engine import runners, tally
from kwaicoder_jax.data.engine.store import Store
from kwaicoder_jax.data.sources import Source
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.evaluation.report import curation as page

DEFAULTS: Mapping[str, Any] = {"reading": {}, "cleaning": {}, "deduplication": {}, "decontamination": None}
ENGINE: Mapping[str, Any] = {"kind": "local", "workers": 0, "options": ()}
NAMES = ("places", *DEFAULTS, "engine")


class Curation(NamedTuple):
    """What became of the places.

    Attributes:
      sources: for `data.prepare`.
      summary: keys of the stage's summary.
    """

    sources: dict[str, Source]
    summary: dict[str, int]


def run(context: Context) -> Curation:
    """Curates the section's places; writes curation.json and report.html into the stage's folder."""
    named = context.section.get("places") or {}
    if not named:
        return Curation({}, {})
    places = [reading.from_config(name, value) for name, value in named.items()]
    if twice := sorted(set(named) & set(context.section["sources"])):
        raise UserError("is a source as well", where=f"prepare_data.places.{twice[0]}", remedy="give it another name")
    engine = {**ENGINE, **(context.section.get("engine") or {})}
    runner = runners.chosen(engine["kind"], engine["workers"], engine["options"])
    store = Store(Path(str(context.folder)) / "store")

    def progress(step: str, done: int, total: int) -> None:
        if done == total:
            context.display.line(f"{step}: {done} shards")

    curated = curate.curate(places, store, settings(context.section), runner, progress)
    files.write_json(context.folder / "curation.json", curated.stages)
    files.write_text(context.folder / "report.html", page.build(curated.stages))
    return Curation(curated.sources(store), summary(curated.stages))


def settings(section: Mapping[str, Any]) -> curate.Curation:
    """The stages as the section has them; None leaves one out."""
    section, folder, decontamination = {**DEFAULTS, **section}, None, Decontamination()
    if section["decontamination"] is not None:
        values = dict(section["decontamination"])
        if not (folder := values.pop("folder", None)):
            raise UserError(
                "is missing", where="prepare_data.decontamination.folder", remedy="name one of benchmark files"
            )
        decontamination = _of(Decontamination, values, "prepare_data.decontamination")
    clean, unique = section["cleaning"], section["deduplication"]
    return curate.Curation(
        options=_of(reading.Options, section["reading"], "prepare_data.reading"),
        cleaner=None if clean is None else cleaning.Cleaner.from_config(clean),
        deduplication=None if unique is None else _of(Deduplication, unique, "prepare_data.deduplication"),
        benchmarks=None if folder is None else Path(folder),
        decontamination=decontamination,
    )


def _of(cls: Any, values: Mapping[str, Any], where: str) -> Any:
    """A dataclass of a section's values, lists as tuples; UserError for a field that it has not, or of another type."""
    fields.check(fields.of_class(cls), values, where)
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def summary(stages: Mapping[str, Any]) -> dict[str, int]:
    """Documents that each stage left."""
    found = {"documents_read": _kept(stages["read"], "out")}
    if "clean" in stages:
        found["documents_clean"] = _kept(stages["clean"], "out")
    if "deduplicate" in stages:
        found["documents_unique"] = stages["deduplicate"]["dropped"]["kept"][0]
    if "decontaminate" in stages:
        found["documents_uncontaminated"] = stages["decontaminate"]["dropped"]["kept"][0]
    return found


def _kept(facts: Mapping[str, Any], kind: str) -> int:
    return tally.totals(facts["counts"]).get("", {}).get(kind, [0, 0])[0]
