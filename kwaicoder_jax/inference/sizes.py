"""How many rows and slots an engine has: powers of two, so that few programs are compiled."""

from collections.abc import Sequence

from kwaicoder_jax import models
from kwaicoder_jax.inference.requests import Generation

SMALLEST_PROMPT = 32  # slots; below it another compiled program costs more than the padding
SMALLEST_CACHE = 128
PREFILL_CHUNK = 512  # tokens run at once: bounds scores to H * 512 * S floats, and how long other rows wait
TOGETHER = (1, 4, 16)  # prompts that are run as one: every choice is one more program of each length
AHEAD = 128
PATIENCE = 64  # steps that a cache is twice too large before it shrinks


def bucket(length: int, smallest: int = 1) -> int:
    """The compiled size that holds `length`: the next power of two, at least `smallest`."""
    return max(smallest, 1 << (length - 1).bit_length())


def prompt_chunk(config: models.ModelConfig, slots: int, most: int = PREFILL_CHUNK) -> int:
    """Tokens that are run at once of prompts of so many slots."""
    # Frequencies that depend on a document's length want all of it at once.
    return slots if models.is_dynamic(config) else min(slots, most)


class Sizes:
    """Decides the size of the cache from what is in it.

    Attributes:
      max_rows: the most rows.
    """

    def __init__(self, max_rows: int, max_tokens: int, ahead: int, fixed_rows: bool, row_shares: int):
        self.max_rows = row_shares * bucket(-(-max_rows // row_shares))
        self._max_slots, self._ahead = bucket(max_tokens, SMALLEST_CACHE), ahead
        self._fewest = self.max_rows if fixed_rows else row_shares
        self._smallest_prompt = max(SMALLEST_PROMPT, bucket(row_shares))  # every device has a token to work on
        self._idle = 0  # steps for which less would have done

    def prompt_slots(self, length: int) -> int:
        """Slots to run a prompt in."""
        return bucket(length, self._smallest_prompt)

    def prompts_together(self, slots: int, wanted: int) -> int:
        """How many of the `wanted` prompts of `slots` slots are run as one: few choices, and not more tokens than fit."""
        return max(share for share in TOGETHER if share <= max(1, min(wanted, PREFILL_CHUNK // slots)))

    def fitting(self, members: Sequence[Generation], waiting: int, rows: int, slots: int) -> tuple[int, int]:
        """The rows and slots to go on with, for the members' next token.

        Grows when it has to, and then ahead; shrinks when half would have done for PATIENCE steps.

        Args:
          members: the generations that have a row or are about to get one.
          waiting: how many others could use one.
          rows: what there is now.
          slots: what there is now.
        """
        wanted_rows = self._fewest * bucket(-(-min(self.max_rows, len(members) + waiting) // self._fewest))
        ahead = max(min(each.length + self._ahead, each.longest) for each in members)
        wanted_slots = min(self._max_slots, bucket(ahead, SMALLEST_CACHE))
        if len(members) > rows or max(each.length for each in members) + 1 > slots:
            return max(wanted_rows, rows), max(wanted_slots, slots)
        self._idle = self._idle + 1 if wanted_rows <= rows // 2 or wanted_slots <= slots // 2 else 0
        if self._idle < PATIENCE:
            return rows, slots
        self._idle = 0
        return min(wanted_rows, rows), min(wanted_slots, slots)
