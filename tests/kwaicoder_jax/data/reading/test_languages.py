import random
import sysconfig
from pathlib import Path

import pytest

from kwaicoder_jax.data.reading import languages
from kwaicoder_jax.data.reading.languages import candidates, is_binary, language_of, named

OBJECTIVE_C = "#import <Foundation/Foundation.h>\n@interface A : NSObject\n- (void)run;\n@end\n"


@pytest.mark.parametrize(
    ("path", "text", "language"),
    [
        ("src/a.py", "", "python"),
        ("A.PY", "", "python"),
        ("a/Makefile", "", "makefile"),
        ("Makefile.in", "", "makefile"),
        ("config.h.in", "#undef HAVE_X\n", "c"),
        ("CMakeLists.txt", "", "cmake"),
        ("notes.txt", "", "text"),
        ("Dockerfile.gpu", "", "dockerfile"),
        ("a.h", "int f(void);\n", "c"),
        ("a.h", "class A {\n public:\n  int b;\n};\n", "cpp"),
        ("a.h", "#include <vector>\nint f();\n", "cpp"),
        ("a.h", '#ifdef __cplusplus\nextern "C" {\n#endif\nint f(void);\n', "c"),
        ("a.h", "/* a class of its own: see above */\nstruct a { int class_; };\n", "c"),
        ("a.h", "/* the virtual address, by using operator * of it */\nint f(void);\n", "c"),
        ("a.h", "// -*- C++ -*-\nint f();\n", "cpp"),
        ("a.h", OBJECTIVE_C, "objective_c"),
        ("a.m", OBJECTIVE_C, "objective_c"),
        ("a.m", "function y = f(x)\n% doubles\ny = 2 * x;\nend\n", "matlab"),
        ("a.pl", "use strict;\nmy $x = 1;\n", "perl"),
        ("a.pl", ":- module(a, [b/1]).\nb(X) :- c(X).\n", "prolog"),
        ("a.ts", "export const a: number = 1;\n", "typescript"),
        ("a.ts", '<?xml version="1.0"?>\n<!DOCTYPE TS>\n', "xml"),
        ("a.v", "module a(input b);\nendmodule\n", "verilog"),
        ("a.v", "Require Import List.\nLemma a : True.\n", "coq"),
        ("run", "#!/usr/bin/env python3\n", "python"),
        ("run", "#!/usr/bin/env -S node --flag\n", "javascript"),
        ("run", "#! /bin/sh -e\n", "shell"),
        ("run", "#!/usr/bin/python3.11\n", "python"),
        ("vector", "// <vector> -*- C++ -*-\n", "cpp"),
        ("run", "<?php echo 1;\n", "php"),
        ("run", "plain words\n", ""),
        ("a.unheard_of", "#!/bin/sh\n", ""),
        (".hidden", "", ""),
        ("", "#!/bin/sh\n", "shell"),
    ],
)
def test_language_of(path, text, language):
    assert language_of(path, text) == language


def test_names_of_public_data_sets():
    spelled = {
        "C++": "cpp",
        "C#": "csharp",
        "Shell": "shell",
        "Jupyter Notebook": "jupyter",
        "Vim Script": "vim_script",
    }
    assert {name: named(name) for name in spelled} == spelled
    assert named("Brainfuck") == ""


def test_table_is_sound():
    kinds = {"programming", "markup", "data", "text"}
    for name, row in languages.LANGUAGES.items():
        assert row.name == name == name.lower()
        assert row.kind in kinds
        assert all(each == each.lower() and "." not in each for each in row.extensions)
    shared = {extension for extension, names in languages._BY_EXTENSION.items() if len(names) > 1}
    assert shared == set(languages._DECISIONS), "an extension of two languages needs content to decide"
    for extension, (decisions, otherwise) in languages._DECISIONS.items():
        assert {name for _, name in decisions} | {otherwise} == set(languages._BY_EXTENSION[extension])


def test_candidates_agree_with_the_decision_on_real_files():
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in (root / "test").rglob("*") if path.is_file())
    for path in random.Random(0).sample(paths, min(300, len(paths))):
        found = candidates(path.name)
        language = language_of(path.name, path.read_bytes().decode("latin-1"))
        assert language == "" or found is None or language in found


def test_binary():
    assert not is_binary("naïve 日本語 😀\n".encode())
    assert not is_binary("a = 'é'\n".encode("latin-1"))
    assert not is_binary("\ufeffa = 1\n".encode("utf-16-le"))
    assert not is_binary(b"\x0c\nold C file\n\x1a")
    assert not is_binary(b"")
    assert is_binary(b"a\0b")
    assert is_binary(bytes(range(1, 32)) * 10)
    assert is_binary(b"\x7fELF\x02\x01\x01")
    assert is_binary(b"%PDF-1.4\ntext\n")


def test_magika_tells_what_names_do_not():
    pytest.importorskip("magika")
    code = "import os\n\n\ndef main():\n    for name in os.listdir('.'):\n        print(name)\n\n\n"
    code += "if __name__ == '__main__':\n    main()\n"
    assert languages.guessed(code.encode()) == "python"
