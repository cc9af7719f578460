"""Tiny models of transformers, saved once for all tests."""

import pytest

from tests.kwaicoder_jax.huggingface import tiny


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A function from a name of `tiny.MODELS` to its folder, in float32, and the model itself. Not to be changed."""
    made = {}

    def get(name):
        if name not in made:
            place = tmp_path_factory.mktemp("saved") / name
            made[name] = (place, tiny.save(name, place))
        return made[name]

    return get
