"""What the model wrote: functions that were run, and the middles of lines beside what stands there."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

from kwaicoder_jax.evaluation import infilling
from kwaicoder_jax.evaluation.report import quantities as q
from kwaicoder_jax.evaluation.report.markup import Html, element, join
from kwaicoder_jax.evaluation.report.material import Material

FUNCTIONS, INFILLINGS = 6, 6
LINES_BEFORE, LINES_AFTER = 7, 5


def functions(material: Material) -> Html:
    """For each benchmark: a table of all outcomes, and the code of a few samples."""
    return join(_benchmark(name, rows) for name, rows in material.outcomes.items() if rows)


def _benchmark(name: str, rows: list[dict[str, Any]]) -> Html:
    tasks: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        tasks.setdefault(row["task_id"], []).append(row)
    passed = sum(row.get("status") == "passed" for row in rows)
    known = any("status" in row for row in rows)
    text = f"{len(rows)} samples of {len(tasks)} tasks"
    text += f", {passed} passed ({q.percent(passed / len(rows))})." if known else "; outcomes were not recorded."
    shown = _choose(tasks)
    code = element("div", *[_function(row) for row in shown], class_="pairs")
    note = "Below, one sample a task in the benchmark's order"
    note += ": first tasks with a sample that passed, then tasks without." if passed else "."
    note += " Shaded: what the model wrote."
    return join(
        [
            element("h3", f"{name}: functions completed by the model"),
            element("p", text, " One square a sample: filled when it passed its tests." if known else ""),
            _squares(tasks) if known else "",
            element("p", note),
            code,
        ]
    )


def _choose(tasks: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One sample a task: tasks with a sample that passed, then the others; at most half of each while both exist."""
    passed = [next(r for r in rows if r.get("status") == "passed") for rows in tasks.values()
              if any(r.get("status") == "passed" for r in rows)]  # fmt: skip
    failed = [rows[0] for rows in tasks.values() if all(r.get("status") != "passed" for r in rows)]
    half = max(math.ceil(FUNCTIONS / 2), FUNCTIONS - len(failed))
    first = passed[:half]
    return first + failed[: FUNCTIONS - len(first)]


def _squares(tasks: dict[str, list[dict[str, Any]]]) -> Html:
    cells = []
    for task_id, rows in tasks.items():
        boxes = [
            element("i", class_="box passed" if row.get("status") == "passed" else "box", title=row.get("status", ""))
            for row in rows
        ]
        cells.append(element("div", element("span", *boxes), element("code", task_id.rsplit("/", 1)[-1])))
    return element("div", *cells, class_="squares")


def _function(row: dict[str, Any]) -> Html:
    status = row.get("status", "not recorded")
    detail = row.get("detail", "")
    head = element("div", element("code", row["task_id"]), _verdict(status, status == "passed"), class_="head")
    written = element("mark", row["completion"].rstrip() or " ", class_="given")
    code = element("pre", element("code", row.get("prompt", ""), written))
    why = element("div", textwrap.shorten(detail, 160, placeholder=" …"), class_="why") if detail else ""
    return element("article", head, code, why)


def _verdict(word: str, good: bool) -> Html:
    return element("span", word, class_="verdict good" if good else "verdict")


def infillings(material: Material) -> Html:
    """A few infillings, exact ones first, with the number of all."""
    rows = [{**row, "number": number} for number, row in enumerate(material.infillings, start=1)]
    if not rows:
        return Html("")
    exact = [row for row in rows if _exact(row)]
    others = sorted((row for row in rows if not _exact(row)), key=lambda row: -_similarity(row))
    half = max(math.ceil(INFILLINGS / 2), INFILLINGS - len(others))
    # Beside the exact ones: evenly from the most to the least similar, so that the choice flatters nobody.
    rest = _spread(others, INFILLINGS - len(exact[:half]))
    text = (
        f"{len(rows)} spans of validation documents, {len(exact)} matched exactly ({q.percent(len(exact) / len(rows))}). "
        "Shown: at most three exact ones, then others spread from the most to the least similar. "
    )
    legend = join(
        [element("mark", "what stands there", class_="want"), " ", element("mark", "the model", class_="given")]
    )
    return join(
        [
            element("h3", "Fill in the middle of a line"),
            element("p", text, legend),
            element("div", *[_infilling(row) for row in [*exact[:half], *rest]], class_="pairs"),
        ]
    )


def _spread(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    if count >= len(rows):
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / max(count - 1, 1))] for i in range(count)]


def _exact(row: dict[str, Any]) -> bool:
    return row["middle"].rstrip() == infilling.first_line(row["completion"]).rstrip()


def _similarity(row: dict[str, Any]) -> float:
    wanted = row["middle"].rstrip()
    return infilling.edit_similarity(wanted, infilling.first_line(row["completion"]).rstrip()[: 4 * len(wanted) + 100])


def _infilling(row: dict[str, Any]) -> Html:
    before, after = row["prefix"].split("\n"), row["suffix"].split("\n")
    prefix = ("…\n" if len(before) > LINES_BEFORE else "") + "\n".join(before[-LINES_BEFORE:])
    suffix = "\n".join(after[:LINES_AFTER]) + ("\n…" if len(after) > LINES_AFTER else "")
    word = "exact" if _exact(row) else f"similarity {_similarity(row):.2f}"
    answer = element("mark", infilling.first_line(row["completion"]) or "(nothing)", class_="given")
    answer = element("div", element("span", "the model"), element("code", answer), class_="answer")
    code = element("pre", element("code", prefix, element("mark", row["middle"], class_="want"), suffix))
    head = element("div", element("span", f"span {row['number']}"), _verdict(word, _exact(row)), class_="head")
    return element("article", head, code, answer)
