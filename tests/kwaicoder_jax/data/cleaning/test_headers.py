"""Banners go, all else stays; the code means the same."""

import pytest

from kwaicoder_jax.data.cleaning import headers
from tests.kwaicoder_jax.data.cleaning.slow_statistics import same_code

MIT = """Copyright (c) 2020 The Authors

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software to deal in the Software without restriction.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND.
"""
HASHED = "".join(f"# {line}".rstrip() + "\n" for line in MIT.splitlines())
SLASHED = HASHED.replace("#", "//")
STARRED = "/*\n" + HASHED.replace("#", " *") + " */\n"
CODE = "x = 1\n# Copyright of the rest\n"


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("python", HASHED + "\n" + CODE, CODE),
        ("python", "#!/usr/bin/env python\n# -*- coding: utf-8 -*-\n" + HASHED + CODE, None),
        ("python", "# pylint: disable=all\n" + HASHED + "\n# What this does.\n" + CODE, None),
        ("python", HASHED + "#\n# pylint: disable=all\n" + CODE, "#\n# pylint: disable=all\n" + CODE),
        ("python", '"""Copyright 2020, a docstring."""\n' + CODE, '"""Copyright 2020, a docstring."""\n' + CODE),
        ("python", "# A licence-free description of the file.\nx = 1\n", "x = 1\n"),
        ("python", "# Only what it does.\nx = 1\n", "# Only what it does.\nx = 1\n"),
        ("c", STARRED + "\nint x;\n", "int x;\n"),
        ("c", SLASHED + "#include <a.h>\n", "#include <a.h>\n"),
        ("c", STARRED + "/* What it does, in words. */\nint x;\n", "/* What it does, in words. */\nint x;\n"),
        ("c", "/* Copyright 2020 */ int x;\n", "/* Copyright 2020 */ int x;\n"),
        ("c", "/* Copyright 2020, and never closed\nint x;\n", "/* Copyright 2020, and never closed\nint x;\n"),
        ("go", "//go:build linux\n\n" + SLASHED + "\npackage a\n", "//go:build linux\n\npackage a\n"),
        ("html", "<!DOCTYPE html>\n<!-- Copyright 2020 -->\n<p>\n", "<!DOCTYPE html>\n<p>\n"),
        ("php", "<?php\n" + STARRED + "f();\n", "<?php\nf();\n"),
        ("lua", "-- Copyright 2020 me\nreturn 1\n", "return 1\n"),
        ("css", "/*! licence MIT */\na { b: c }\n", "a { b: c }\n"),
        ("", HASHED + CODE, HASHED + CODE),
        ("json", HASHED, HASHED),
    ],
)
def test_what_goes_and_what_stays(language, text, expected):
    found, banners = headers.strip(text, language)
    if expected is None:  # all but the banner
        expected = text.replace(HASHED, "")
    assert found == expected
    assert banners == (found != text)
    assert headers.strip(found, language) == (found, 0)
    assert headers.strip(text, language, handling="keep") == (text, 0)


def test_a_description_in_the_banner_stays():
    text = "/*\n * tree.c: balanced trees with ranks.\n *\n * Copyright 1999 someone\n */\nint x;\n"
    assert headers.strip(text, "c") == ("/*\n * tree.c: balanced trees with ranks.\n */\nint x;\n", 1)


def test_shortened_to_the_identifier():
    text = "#!/bin/sh\n" + HASHED + "ls\n"
    assert headers.strip(text, "shell", "MIT", "shorten")[0] == "#!/bin/sh\n# SPDX-License-Identifier: MIT\nls\n"
    assert headers.strip(STARRED + "int x;\n", "c", "MIT", "shorten")[0] == "// SPDX-License-Identifier: MIT\nint x;\n"
    assert headers.strip(STARRED + "int x;\n", "c", "", "shorten")[0] == "int x;\n"


def test_real_files_mean_the_same(library):
    changed = 0
    for text in library.values():
        found, banners = headers.strip(text, "python")
        assert headers.strip(found, "python")[1] == 0
        changed += banners > 0
        assert same_code(text, found)
        assert len(found) <= len(text)
        assert (found == text) == (banners == 0)
    assert changed > 10


@pytest.mark.parametrize(
    "text", ["", "\n", "#", "/*", "/**/", "//", "<!--", "# copyright", "/* copyright", "/* licence */"]
)
def test_edges(text):
    for language in ("python", "c", "html", "php", "lua"):
        headers.strip(text, language)
