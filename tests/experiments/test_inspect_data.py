"""Batches on a page of text, as a command."""

import pytest

from tests.experiments import commands


def test_rows_of_a_stage(finished):
    output = commands.run("inspect_data", finished, "--stage=cpt", "--rows=3")
    assert output.count("segment 1,") == 3
    assert "cpt, " in output
    again = commands.run("inspect_data", finished, "--stage=cpt", "--rows=3")
    assert again == output
    assert commands.run("inspect_data", finished, "--rows=1", "--skip=1") != commands.run(
        "inspect_data", finished, "--rows=1"
    )


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--stage=upcycle", "'upcycle' does not train; use one of"),
        ("--phase=nowhere", "'nowhere' is no phase"),
        ("--rows=0", "--rows"),
    ],
)
def test_what_is_refused(finished, more, words):
    output = commands.run("inspect_data", finished, more, status=2)
    assert output.startswith("error: ")
    assert output.count("\n") == 1
    assert words in output


def test_without_a_corpus(tmp_path):
    assert "there is no corpus here" in commands.run("inspect_data", tmp_path, status=2)
