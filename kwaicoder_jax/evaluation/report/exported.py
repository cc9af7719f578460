"""The exported model in transformers: how far its logits are, and what it writes."""

from kwaicoder_jax.evaluation.report import quantities as q
from kwaicoder_jax.evaluation.report.markup import Html, element, join
from kwaicoder_jax.evaluation.report.material import Material


def comparison(material: Material) -> Html:
    """One block a prompt; nothing where it was not compared."""
    found = material.comparison
    if not found:
        return Html("")
    same = sum(text["ours"] == text["transformers"] for text in found["texts"])
    words = (
        f"Loaded with transformers {found['transformers_version']}, the logits differ from the checkpoint's by at most "
        f"{q.scientific(found['max_logit_difference'])}; {same} of {len(found['texts'])} greedy texts are the same."
    )
    return join([element("p", words), *[_text(text) for text in found["texts"]]])


def _text(text: dict[str, str]) -> Html:
    """The prompt, and marked what transformers added to it; and what the checkpoint adds, where that differs."""
    blocks = [_code(text["prompt"], text["transformers"])]
    if text["ours"] != text["transformers"]:
        blocks += [element("p", "The checkpoint itself goes on:"), _code(text["prompt"], text["ours"])]
    return element("div", *blocks, class_="sample")


def _code(prompt: str, made: str) -> Html:
    return element("pre", element("code", prompt, element("mark", made, class_="given")))
