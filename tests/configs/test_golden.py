"""Resolved configs, word for word: what a change of a config changes shows in the change of these files.

To accept a change: python -m tests.configs.test_golden
"""

import importlib
import json
import pathlib

import pytest

GOLDEN = pathlib.Path(__file__).parent / "golden"
VARIANTS = {
    "curate": ("curate", ""),
    "demo": ("demo", ""),
    "smollm2_135m": ("smollm2_135m", "full"),
    "kwaicoder_23b_a4b": ("kwaicoder_23b_a4b", ""),
    "kwaicoder_23b_a4b_qwen_v5e": ("kwaicoder_23b_a4b", "qwen,v5e-256"),
}


def resolved(name):
    module, argument = VARIANTS[name]
    get_config = importlib.import_module(f"configs.{module}").get_config
    config = get_config(argument) if argument else get_config()
    return json.dumps(config.to_dict(), indent=1, sort_keys=True) + "\n"


@pytest.mark.parametrize("name", VARIANTS)
def test_a_config_is_what_it_was(name):
    assert resolved(name) == (GOLDEN / f"{name}.json").read_text(), "see this file's docstring"


if __name__ == "__main__":
    for each in VARIANTS:
        (GOLDEN / f"{each}.json").write_text(resolved(each))
