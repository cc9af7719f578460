"""From the JSON of a completion request to requests for the engine. What is not supported is refused, not ignored."""

import dataclasses
import json
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from experiments.loading import Loaded
from experiments.serve_errors import ApiError
from kwaicoder_jax import inference
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.inference.requests import MOST_ALTERNATIVES
from kwaicoder_jax.inference.text import StopStrings

# Fields of OpenAI's interface that this server knows by one value only: it changes nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
}
IGNORED = ("user",)
MOST_TEMPERATURE = 2.0


@dataclasses.dataclass(frozen=True)
class Call:
    """A completion request, understood.

    Attributes:
      requests: for the engine, one for each answer: all samples of the first prompt, then of the second.
      echoes: of each answer, the text to be repeated before it.
      prompt_tokens: of all prompts.
      stops: strings before which answers end.
      logprobs: whether they are to be reported.
      stream: whether pieces are to be sent as they come.
      include_usage: whether a stream ends with the count of tokens.
      is_empty: no token is asked for: `requests` is empty, and answers are echoes alone.
    """

    requests: tuple[inference.Request, ...]
    echoes: tuple[str, ...]
    prompt_tokens: int
    stops: tuple[str, ...]
    logprobs: bool
    stream: bool
    include_usage: bool
    is_empty: bool = False


def parse(body: bytes, loaded: Loaded, model: str, max_answers: int) -> Call:
    """Reads a request.

    Args:
      body: JSON.
      loaded: the model.
      model: its name.
      max_answers: the most answers to one request.

    Raises:
      ApiError, UserError: what is wrong with it.
    """
    fields = _Fields(_load(body))
    named = fields.take("model", str, model)
    if named != model:
        message = f"there is no model {named!r}; this server has {model!r}"
        raise ApiError(404, message, param="model", code="model_not_found")
    fields.refuse_unsupported()
    samples = fields.take("n", int, 1, lambda x: x >= 1, "1 or more")
    if fields.take("best_of", int, samples) != samples:
        raise ApiError(400, "best_of is not supported; leave it out, or give what n is", param="best_of")
    tokens = fields.take("max_tokens", int, 16, lambda x: x >= 0, "0 or more")
    prompts, texts = _prompts(fields, loaded)
    echo, logprobs = fields.take("echo", bool, False), fields.take("logprobs", int, None, _has_scores, _SCORES)
    if echo and logprobs is not None:
        message = "log probabilities of an echoed prompt are not supported; leave out echo or logprobs"
        raise ApiError(400, message, param="logprobs")
    seed = fields.take("seed", int, None)
    settings: dict[str, Any] = {
        "temperature": fields.take("temperature", float, 1.0, lambda x: 0 <= x <= MOST_TEMPERATURE, "0 to 2"),
        "top_p": fields.take("top_p", float, 1.0, lambda x: 0 < x <= 1, "more than 0, at most 1"),
        "top_k": fields.take("top_k", int, 0, lambda x: 0 <= x < 2**31, "0 (all) or more"),
        "seed": secrets.randbits(31) if seed is None else seed & 0x7FFF_FFFF,
        "stop_tokens": loaded.stop_tokens,
        "logprobs": logprobs,
    }
    stops = fields.take("stop", str | list, ())
    stops = (stops,) if isinstance(stops, str) else tuple(stops)
    stream, include_usage = fields.take("stream", bool, False), _include_usage(fields)
    fields.refuse_unknown()
    if not all(isinstance(stop, str) for stop in stops):
        raise ApiError(400, "stop is a string or a list of strings", param="stop")
    StopStrings(stops)  # how many, and whether they are empty
    count = len(prompts) * samples
    if count > max_answers:
        message = f"{count} answers at once; this server gives at most {max_answers}"
        raise ApiError(400, message, param="n" if samples > 1 else "prompt")
    return Call(
        requests=tuple(
            inference.Request(prompt, tokens, sample=number * samples + sample, **settings)
            for number, prompt in enumerate(prompts)
            for sample in range(samples)
        )
        if tokens
        else (),
        echoes=tuple(text if echo else "" for text in texts for _ in range(samples)),
        prompt_tokens=sum(map(len, prompts)),
        stops=stops, logprobs=logprobs is not None, stream=stream, include_usage=include_usage, is_empty=not tokens,
    )  # fmt: skip


_SCORES = f"0 to {MOST_ALTERNATIVES}"


def _has_scores(count: int) -> bool:
    return 0 <= count <= MOST_ALTERNATIVES


def _load(body: bytes) -> dict[str, Any]:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no number")

    try:
        values = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(values, dict):
        raise ApiError(400, "the body is no JSON object", code="invalid_json")
    return values


def _prompts(fields: "_Fields", loaded: Loaded) -> tuple[list[tuple[int, ...]], list[str]]:
    """The tokens of every prompt, and its text."""
    prompt, suffix = fields.take("prompt", str | list, ""), fields.take("suffix", str, None)
    if isinstance(prompt, list) and _are_tokens(prompt):
        prompt = [prompt]
    several = prompt if isinstance(prompt, list) else [prompt]
    if not several:
        raise ApiError(400, "prompt is an empty list; give one or more", param="prompt")
    if all(isinstance(each, str) for each in several):
        if suffix:
            return [loaded.infilling(text, suffix, "suffix") for text in several], several
        return [loaded.prompt(text, "prompt") for text in several], several
    if not all(isinstance(each, list) and _are_tokens(each) for each in several):
        message = "prompt is a string, a list of strings, a list of token ids, or a list of lists of token ids"
        raise ApiError(400, message, param="prompt")
    if suffix:
        raise ApiError(400, "suffix goes with a prompt that is text, not token ids", param="suffix")
    size = loaded.config.vocab_size
    if outside := [token for ids in several for token in ids if not 0 <= token < size]:
        what = f"token {outside[0]} is outside the vocabulary of {size}"
        raise UserError(what, where="prompt", remedy="encode with the model's own tokenizer")
    return [tuple(ids) for ids in several], [loaded.tokenizer.decode(ids) for ids in several]


def _are_tokens(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(each, int) and not isinstance(each, bool) for each in values)


def _include_usage(fields: "_Fields") -> bool:
    options = _Fields(fields.take("stream_options", dict, {}), "stream_options.")
    wanted = options.take("include_usage", bool, False)
    options.take("include_obfuscation", bool, False)  # padding against eavesdroppers: there is none
    options.refuse_unknown()
    return wanted


class _Fields:
    """A JSON object that is taken apart; null is as good as nothing."""

    def __init__(self, values: Mapping[str, Any], where: str = ""):
        self._values, self._where = {name: x for name, x in values.items() if x is not None}, where

    def take(
        self, name: str, kind: Any, default: Any, accept: Callable[[Any], bool] = lambda x: True, right: str = ""
    ) -> Any:
        """Removes a field and returns it; ApiError if it is not of its type or range."""
        value, where = self._values.pop(name, None), self._where + name
        if value is None:
            return default
        fits = isinstance(value, int | float if kind is float else kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            names = {float: "a number", int: "an integer", bool: "true or false", str: "a string", dict: "an object"}
            raise ApiError(400, f"{where} is not {names.get(kind, 'a string or a list')}", param=where)
        if not accept(value):
            raise ApiError(400, f"{where} is {value!r}, out of range; use {right}", param=where)
        return value

    def refuse_unsupported(self) -> None:
        """ApiError for a field that would change the answer in a way that this server does not know."""
        for name, neutral in NEUTRAL.items():
            value = self._values.pop(name, neutral[0])
            if value not in neutral or isinstance(value, bool):
                raise ApiError(400, f"{name} is not supported; leave it out", param=name, code="unsupported")
        for name in IGNORED:
            self._values.pop(name, None)

    def refuse_unknown(self) -> None:
        """ApiError for what is left."""
        for name in self._values:
            where = self._where + name
            raise ApiError(400, f"there is no field {where!r}; leave it out", param=where, code="unknown_field")
