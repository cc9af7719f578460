from importlib import metadata
from pathlib import Path

import pytest

from kwaicoder_jax.data.reading import licence_texts, licences
from kwaicoder_jax.data.reading.licence_texts import PERMISSIVE, of_header, of_name, of_text
from kwaicoder_jax.data.reading.licences import Finder, allowed, is_licence_file

MIT = """Permission is hereby granted, free of charge, to any person obtaining a copy of this software, to deal in the
Software without restriction. The above copyright notice and this permission notice shall be included in all copies."""
BSD_2 = "Redistribution and use in source and binary forms, with or without modification, are permitted"
BSD_3 = BSD_2 + ". Neither the name of X nor the names of its contributors may be used to endorse or promote products"
GPL_NOTICE = """# This program is free software; you can redistribute it and/or modify
# it under the terms of the GNU General Public License as published by the Free Software Foundation; either
# version 3 of the License, or (at your option) any later version.
"""


def test_texts():
    assert of_text(MIT) == "MIT"
    assert of_text(BSD_2) == "BSD-2-Clause"
    assert of_text(BSD_3) == "BSD-3-Clause"
    assert of_text(f"{MIT}\n\n{BSD_3}") == "BSD-3-Clause AND MIT"
    assert of_text(GPL_NOTICE) == "GPL-3.0"
    python = "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2\nPermission to use, copy, modify, and distribute this software and"
    assert (
        of_text(python + "\nits documentation for any purpose and without fee is hereby granted. GPL-compatible")
        == "PSF-2.0"
    )
    assert of_text("All rights reserved. Ask before you copy.") == ""


@pytest.mark.skipif(not Path("/usr/share/common-licenses").is_dir(), reason="needs Debian's folder of licences")
def test_full_texts_of_the_gnu_family_and_others():
    names = {
        **{"Apache-2.0": "Apache-2.0", "BSD": "BSD-3-Clause", "CC0-1.0": "CC0-1.0", "GFDL-1.3": "GFDL-1.3"},
        **{"GPL-1": "GPL-1.0", "GPL-2": "GPL-2.0", "GPL-3": "GPL-3.0", "LGPL-2": "LGPL-2.0", "LGPL-2.1": "LGPL-2.1"},
        **{"LGPL-3": "LGPL-3.0", "MPL-1.1": "MPL-1.1", "MPL-2.0": "MPL-2.0", "Artistic": "Artistic-1.0"},
    }
    folder = Path("/usr/share/common-licenses")
    found = {name: of_text((folder / name).read_text()) for name in names if (folder / name).exists()}
    assert found == {name: names[name] for name in found}
    assert found


def test_texts_agree_with_what_installed_packages_declare():
    """Two roads to one licence: the text in a package's folder and the expression in its metadata."""
    agreed, differed = 0, []
    for distribution in metadata.distributions():
        declared = of_name(distribution.metadata["License-Expression"] or "")
        files = [
            file for file in distribution.files or () if ".dist-info" in str(file) and is_licence_file(file.as_posix())
        ]
        if declared in ("MIT", "Apache-2.0", "BSD-3-Clause", "BSD-2-Clause", "ISC", "MPL-2.0") and len(files) == 1:
            text = Path(str(distribution.locate_file(files[0])))
            found = of_text(text.read_text(errors="replace")) if text.exists() else declared
            agreed += found == declared
            if declared not in found.split(" AND "):
                differed.append((distribution.metadata["Name"], declared, found))
    assert agreed >= 20
    assert len(differed) <= 2, differed


def test_names():
    assert (
        of_name("Apache License, Version 2.0") == of_name("Apache 2.0 License") == of_name("apache-2.0") == "Apache-2.0"
    )
    assert of_name("MIT License") == of_name("The MIT License") == "MIT"
    assert of_name("BSD 2-Clause License") == "BSD-2-Clause"
    assert of_name("3-Clause BSD License") == "BSD-3-Clause"
    assert of_name("mit OR Apache-2.0") == "MIT OR Apache-2.0"
    assert of_name("Apache-2.0 WITH LLVM-exception") == "Apache-2.0 WITH LLVM-exception"
    assert of_name("UNKNOWN") == of_name("see the file") == of_name("") == ""
    assert of_name(MIT) == "MIT"  # some put the text there


def test_headers():
    assert of_header("/* SPDX-License-Identifier: ((GPL-2.0 WITH Linux-syscall-note) OR BSD-2-Clause) */\n").endswith(
        "OR BSD-2-Clause)"
    )
    assert of_header("<!-- SPDX-License-Identifier: MIT -->\n") == "MIT"
    assert of_header(GPL_NOTICE + "import os\n") == "GPL-3.0"
    assert of_header("# Licensed as the rest of it, see LICENSE\n") == ""
    assert of_header("x = 1\n" * 1000 + GPL_NOTICE) == ""


@pytest.mark.parametrize(
    ("expression", "answer"),
    [
        ("MIT", True),
        ("GPL-3.0", False),
        ("MIT AND BSD-3-Clause", True),
        ("MIT AND GPL-2.0", False),
        ("MIT OR GPL-2.0", True),
        ("GPL-2.0 OR MIT AND BSD-3-Clause", True),
        ("(MIT OR GPL-2.0) AND LGPL-2.1", False),
        ("(MIT OR GPL-2.0) AND ISC", True),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("GPL-2.0-or-later WITH Classpath-exception-2.0", False),
        ("", False),
        ("MIT MIT", False),
        ("MIT AND", False),
        ("((((MIT", True),
    ],
)
def test_allowed(expression, answer):
    assert allowed(expression, PERMISSIVE) is answer
    assert allowed("GPL-2.0-or-later", {"GPL-2.0"})


def test_no_copyleft_is_permissive():
    known = {name for name, _ in licence_texts._TEXTS}
    copyleft = {
        name for name in known if name.startswith(("MPL", "EPL", "CDDL", "EUPL", "GFDL", "SSPL", "BUSL", "Elastic"))
    }
    assert not PERMISSIVE & (copyleft | {"GPL-2.0", "GPL-3.0", "LGPL-2.1", "AGPL-3.0", "CC-BY-NC-4.0", "CC-BY-SA-4.0"})


def test_the_nearest_licence_holds():
    finder = Finder(
        {"LICENSE": MIT, "vendor/zlib/COPYING": BSD_3, "gpl/COPYING": GPL_NOTICE, "gpl/LICENSE.mit": MIT},
        {"js/package.json": b'{"license": "ISC"}', "broken/package.json": b"{"},
    )
    assert finder.of("a/b/c.py") == "MIT"
    assert finder.of("vendor/zlib/src/a.c") == "BSD-3-Clause"
    assert finder.of("vendor/other/a.c") == "MIT"
    assert finder.of("gpl/a.c") == "GPL-3.0 AND MIT"
    assert finder.of("js/a.js") == "MIT", "a text above comes before metadata"
    assert Finder({}, {"js/package.json": b'{"license": "ISC"}'}).of("js/lib/a.js") == "ISC"
    assert Finder({"LICENSES/MIT.txt": MIT}, {}).of("a.py") == "MIT"
    assert Finder({}, {}).of("a.py") == ""


def test_installed_packages_are_spoken_for_by_their_record():
    record = b"flask/app.py,sha256=x,1\nflask.pth,,\nflask-3.dist-info/METADATA,,\n../../bin/flask,,\n"
    metadata = {
        "flask-3.dist-info/METADATA": b"Name: flask\nLicense-Expression: BSD-3-Clause\n\ntext",
        "flask-3.dist-info/RECORD": record,
        "other-1.dist-info/RECORD": b"other/a.py,,\n",
    }
    finder = Finder({"LICENSE": MIT}, metadata)  # a stray one beside all packages
    assert finder.of("flask/sub/app.py") == "BSD-3-Clause"
    assert finder.of("flask.pth") == "BSD-3-Clause"
    assert finder.of("other/a.py") == "MIT"


def test_metadata():
    python = b"Metadata-Version: 2.1\nName: a\nClassifier: License :: OSI Approved :: MIT License\nLicense: UNKNOWN\n\n"
    assert licences.of_metadata("a/PKG-INFO", python) == "MIT"
    assert licences.of_metadata("Cargo.toml", b'[package]\nlicense = "MIT/Apache-2.0"\n') == "MIT OR Apache-2.0"
    assert licences.of_metadata("pyproject.toml", b'[project]\nlicense = {text = "BSD-3-Clause"}\n') == "BSD-3-Clause"
    for raw in (b"\xff", b"[", b"{}", b"[]", b"null", b'{"license": 3}', b"[" * 100_000):
        for name in ("package.json", "Cargo.toml", "METADATA"):
            assert licences.of_metadata(name, raw) == ""


def test_names_of_licence_files():
    for name in (
        "LICENSE",
        "LICENCE.txt",
        "COPYING.LESSER",
        "license.md",
        "LICENSE-MIT",
        "UNLICENSE",
        "a/licenses/x.txt",
    ):
        assert is_licence_file(name), name
    for name in ("license.py", "licenses/check.py", "copying_files.c", "relicense", "README"):
        assert not is_licence_file(name), name
