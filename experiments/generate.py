"""Completes and infills: the text, and nothing else, on standard output.

python -m experiments.generate --checkpoint=runs/demo/cpt --prompt='def add(a, b):' --max_new_tokens=64
python -m experiments.generate --checkpoint=runs/demo/cpt --prefix='def add(a, b):' --suffix='    return c'
python -m experiments.generate --checkpoint=runs/demo/cpt --file=half_written.py   # <|cursor|> marks the place
python -m experiments.generate --checkpoint=SmolLM2-135M < prompt.txt

Of several answers each ends with a newline, which is added where it lacks; --json gives them as one object a line.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from experiments import command, fields, loading, sections
from experiments.answers import Answer, Writer
from experiments.display import Display
from experiments.stopping import Stop
from kwaicoder_jax import inference
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.inference.text import TextStream

NAME = "generate"
DEFAULTS = dataclasses.asdict(sections.Generate())
CURSOR = "<|cursor|>"
STDIN = "-"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What to go on from; with a suffix, what to fill in before it."""

    text: str
    suffix: str | None = None


def main() -> None:
    """The body of the command."""
    holder = command.define_flags()
    loading.define_flags()
    flags.DEFINE_multi_string("prompt", None, "Text to complete; several are a batch; - (or none) is standard input.")
    flags.DEFINE_string("prefix", None, "Text before the place to fill in, with --suffix.")
    flags.DEFINE_string("suffix", None, "Text behind it.")
    flags.DEFINE_string("file", None, "File in which a mark stands at the place to fill in; - is standard input.")
    flags.DEFINE_string("cursor", CURSOR, "That mark.")
    flags.DEFINE_integer("max_new_tokens", None, f"At most; {DEFAULTS['max_new_tokens']} unless said otherwise.")
    flags.DEFINE_float("temperature", None, "0 (the default) takes the most probable token each time.")
    flags.DEFINE_float("top_p", None, "Draw among the fewest most probable tokens that sum to this probability.")
    flags.DEFINE_integer("top_k", None, "Draw among so many of the most probable tokens; 0 for all.")
    flags.DEFINE_integer("seed", None, "Of the draws.")
    flags.DEFINE_integer("num_samples", None, "Answers to each prompt.")
    flags.DEFINE_multi_string("stop", None, "End before this string; may be given several times.")
    flags.DEFINE_integer("max_rows", None, "Answers that are worked on together.")
    flags.DEFINE_bool("stream", None, "Show text as it comes; on a terminal unless said otherwise.")
    flags.DEFINE_bool("echo", False, "The prompt too, before its answer, and the suffix behind it.")
    flags.DEFINE_bool("json", False, "One JSON object a line: prompt, sample, text, tokens, finish_reason.")
    _name_stdin(sys.argv)

    def work(stop: Stop, display: Display) -> None:
        given = {name: flags.FLAGS["checkpoint" if name == "init_from" else name].value for name in DEFAULTS}
        config = command.tool_config(NAME, holder.value, DEFAULTS, given)
        display.stage(NAME)
        fields.check(fields.of_class(sections.Generate), config[NAME], NAME)
        named = flags.FLAGS
        prompts = read_prompts(named.prompt, named.prefix, named.suffix, named.file, named.cursor)
        loaded = loading.load(config, NAME, command.tool_workdir())
        stream = sys.stdout.isatty() if named.stream is None else named.stream
        count = len(prompts) * config[NAME]["num_samples"]
        writer = Writer(sys.stdout.buffer, count, stream=stream, end_lines=sys.stdout.isatty(), as_json=named.json)
        with _unless_closed():
            run(loaded, config, prompts, writer, display, echo=named.echo)

    command.execute(work, required=(), resumable=False)


def _name_stdin(argv: list[str]) -> None:
    """A `-` alone means --prompt=-, as for other tools."""
    for at, word in enumerate(argv):
        if word == STDIN and argv[at - 1].lstrip("-") not in ("prompt", "file", "prefix", "suffix", "cursor", "stop"):
            argv[at] = f"--prompt={STDIN}"


def read_prompts(
    prompt: Sequence[str] | None = None,
    prefix: str | None = None,
    suffix: str | None = None,
    file: str | None = None,
    cursor: str = CURSOR,
) -> list[Prompt]:
    """What the flags ask for; UserError if they contradict each other or name what cannot be read."""
    kinds = {
        "--prompt": bool(prompt),
        "--prefix/--suffix": prefix is not None or suffix is not None,
        "--file": bool(file),
    }
    asked = [name for name, is_given in kinds.items() if is_given]
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)} together", remedy="give one of them")
    if file:
        return [_at_cursor(_read(file), cursor, file)]
    if asked == ["--prefix/--suffix"]:
        if suffix is None:
            raise UserError("--prefix without --suffix", remedy="give both, or --prompt to complete a text")
        return [Prompt(prefix or "", suffix)]
    texts = list(prompt or [STDIN])
    if texts.count(STDIN) > 1:
        raise UserError("standard input is named twice", where="--prompt", remedy="name it once")
    return [Prompt(_read(STDIN) if text == STDIN else text) for text in texts]


def _at_cursor(text: str, mark: str, file: str) -> Prompt:
    if not mark:
        raise UserError("is empty", where="--cursor", remedy=f"as in --cursor='{CURSOR}'")
    count = text.count(mark)
    if count != 1:
        what = f"the mark {mark} is not in it" if not count else f"the mark {mark} is {count} times in it"
        raise UserError(what, where=file, remedy="put it where text is to be filled in, once; --cursor names another")
    before, _, behind = text.partition(mark)
    return Prompt(before, behind)


def _read(place: str) -> str:
    try:
        if place == STDIN:
            return sys.stdin.buffer.read().decode()
        with open(place, "rb") as file:
            return file.read().decode()
    except UnicodeDecodeError as error:
        where = "standard input" if place == STDIN else place
        raise UserError(f"is not UTF-8 at byte {error.start}", where=where, remedy="give it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{error.strerror}", where=place, remedy="name a file that can be read") from error


def run(
    loaded: loading.Loaded,
    config: Mapping[str, Any],
    prompts: Sequence[Prompt],
    writer: Writer,
    display: Display,
    *,
    echo: bool = False,
) -> None:
    """Answers all prompts; `writer` gets the texts."""
    section = config[NAME]
    seed = config.get("seed", 0) if section["seed"] is None else section["seed"]
    tokens = [
        loaded.prompt(each.text) if each.suffix is None else loaded.infilling(each.text, each.suffix)
        for each in prompts
    ]
    longest = max(map(len, tokens)) + section["max_new_tokens"]
    if (trained := loaded.config.max_length) is not None and longest > trained:
        display.line(
            f"{longest} tokens of prompt and answer are more than the {trained} that the model was trained for"
        )
    engine = loaded.engine(max_rows=min(section["max_rows"], writer.count), max_tokens=longest)
    generations = []
    for index in range(writer.count):
        prompt, sample = divmod(index, section["num_samples"])
        before, behind = (prompts[prompt].text, prompts[prompt].suffix or "") if echo else ("", "")
        text = TextStream(loaded.tokenizer, section["stop"])
        answer = Answer(writer, index, text, before=before, behind=behind, prompt=prompt, sample=sample)
        request = inference.Request(
            tokens[prompt], section["max_new_tokens"], section["temperature"], section["top_k"], section["top_p"],
            loaded.stop_tokens, seed, sample=index, on_token=answer.on_token, on_end=answer.on_end,
        )  # fmt: skip
        generations.append(engine.submit(request))
    alone = generations[0] if writer.count == 1 else None
    if alone is not None and writer.streams:
        engine.run()
        return
    total, unit = (writer.count, "answers") if alone is None else (section["max_new_tokens"], "tokens")
    with display.progress(total, unit, says_end=alone is None) as update:
        while engine.step():
            update(writer.ended if alone is None else len(alone.tokens))


@contextlib.contextmanager
def _unless_closed() -> Iterator[None]:
    """Ends quietly when nobody reads on (`| head -1`)."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end


if __name__ == "__main__":
    main()
