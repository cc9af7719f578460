"""What a `prepare_data` section says of places and of what is done to their documents."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments import fields, sections
from experiments.contract import Context
from kwaicoder_jax import files
from kwaicoder_jax.data import cleaning, curate, quality, reading
from kwaicoder_jax.data.decontamination import Settings as Decontamination
from kwaicoder_jax.data.deduplication import Settings as Deduplication
from kwaicoder_jax.data.engine import runners, tally
from kwaicoder_jax.data.engine.store import Store
from kwaicoder_jax.data.sources import Source
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.evaluation.report import curation as page

DEFAULTS: Mapping[str, Any] = {
    "reading": {}, "cleaning": {}, "deduplication": {}, "decontamination": None, "quality": None
}  # fmt: skip
ENGINE: Mapping[str, Any] = {"kind": "local", "workers": 0, "options": ()}
NAMES = ("places", *DEFAULTS, "engine", "store")


class Curation(NamedTuple):
    """What became of the places.

    Attributes:
      sources: for `data.prepare`.
      summary: keys of the stage's summary.
    """

    sources: dict[str, Source]
    summary: dict[str, int]


def run(context: Context) -> Curation:
    """Curates the section's places; writes curation.json, report.html and a trained scorer into the stage's folder.

    The store stands beside the stage's folder, which a bad field or --restart removes: hours of work are not in it.
    """
    named = context.section.get("places") or {}
    if not named:
        return Curation({}, {})
    places = [reading.from_config(name, value) for name, value in named.items()]
    if twice := sorted(set(named) & set(context.section["sources"])):
        raise UserError("is a source as well", where=f"prepare_data.places.{twice[0]}", remedy="give it another name")
    engine = {**ENGINE, **(context.section.get("engine") or {})}
    runner = runners.chosen(engine["kind"], engine["workers"], engine["options"])
    store = Store(Path(context.section.get("store") or str(context.workdir / "store")))

    def progress(step: str, done: int, total: int) -> None:
        if done == total:
            context.display.line(f"{step}: {done} shards")

    curation, measured = settings(context.section)
    if curation.benchmarks is None:
        context.display.line("no decontamination.folder is named: documents are compared with no benchmark")
    curated = curate.curate(places, store, curation, runner, progress)
    if measured and curation.quality is not None:
        curated.stages["score"]["held_out"] = measured
        files.write_bytes(context.folder / "scorer.npz", curation.quality.scorer.encoded())
    files.write_json(context.folder / "curation.json", curated.stages)
    files.write_text(context.folder / "report.html", page.build(curated.stages))
    return Curation(curated.sources(store), summary(curated.stages))


def settings(section: Mapping[str, Any]) -> tuple[curate.Curation, dict[str, float]]:
    """The stages as the section has them, None leaves one out; and how well a scorer does that was trained for them."""
    section, folder, decontamination = {**DEFAULTS, **section}, None, Decontamination()
    if section["decontamination"] is not None:
        values = dict(section["decontamination"])
        folder = values.pop("folder", None)
        if folder is not None and not Path(folder).is_dir():  # known before hours of reading
            raise UserError("is not a folder", where=f"prepare_data.decontamination.folder: {folder}")
        decontamination = _of(Decontamination, values, "prepare_data.decontamination")
    clean, unique = section["cleaning"], section["deduplication"]
    scores, measured = _quality(section["quality"])
    curation = curate.Curation(
        options=_of(reading.Options, section["reading"], "prepare_data.reading"),
        cleaner=None if clean is None else cleaning.Cleaner.from_config(clean),
        deduplication=None if unique is None else _of(Deduplication, unique, "prepare_data.deduplication"),
        benchmarks=None if folder is None else Path(folder),
        decontamination=decontamination,
        quality=scores,
    )
    return curation, measured


def _quality(section: Mapping[str, Any] | None) -> tuple[curate.Quality | None, dict[str, float]]:
    """A scorer that was saved, or one that is trained from labels."""
    if section is None:
        return None, {}
    fields.check(fields.of_class(sections.Quality), section, "prepare_data.quality")
    values = sections.Quality(**section)
    if values.scorer is not None and values.labels is not None:
        raise UserError("names a scorer and labels", where="prepare_data.quality", remedy="name one of the two files")
    if values.scorer is None and values.labels is None:
        return None, {}
    if values.labels is not None:
        scorer, measured = quality.fit(quality.read(Path(values.labels)))
    else:
        scorer, measured = quality.Scorer.decoded(_bytes(Path(str(values.scorer)))), {}
    return curate.Quality(scorer, values.drop, values.of), measured


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read ({error})", where=f"prepare_data.quality.scorer: {path}") from error


def _of(cls: Any, values: Mapping[str, Any], where: str) -> Any:
    """A dataclass of a section's values, lists as tuples; UserError for a field that it has not, or of another type."""
    known = fields.of_class(cls)
    kinds = {name: frozenset if "frozenset" in str(field.hint) else tuple for name, field in known.items()}
    values = {
        name: kinds.get(name, tuple)(value) if isinstance(value, list | tuple) else value
        for name, value in values.items()
    }
    fields.check(known, values, where)
    return cls(**values)


def summary(stages: Mapping[str, Any]) -> dict[str, int]:
    """Documents that each stage left."""
    found = {"documents_read": _kept(stages["read"], "out")}
    if "clean" in stages:
        found["documents_clean"] = _kept(stages["clean"], "out")
    if "deduplicate" in stages:
        found["documents_unique"] = stages["deduplicate"]["dropped"]["kept"][0]
    if "decontaminate" in stages:
        found["documents_uncontaminated"] = stages["decontaminate"]["dropped"]["kept"][0]
    if "filter" in stages:
        found["documents_good"] = _kept(stages["filter"], "out")
    return found


def _kept(facts: Mapping[str, Any], kind: str) -> int:
    return tally.totals(facts["counts"]).get("", {}).get(kind, [0, 0])[0]
