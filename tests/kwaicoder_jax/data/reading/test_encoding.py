import codecs
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kwaicoder_jax.data.reading.encoding import decode, settle

SAMPLES = {
    "shift_jis": ["# これは設定ファイルを読み込む関数です\nx = 1\n", "// 配列の要素数を返す\nint n;\n"],
    "euc_jp": ["# これは設定ファイルを読み込む関数です\nx = 1\n", "// 配列の要素数を返す\nint n;\n"],
    "euc_kr": ["# 설정 파일을 읽는 함수입니다\nx=1\n", "// 배열의 크기를 반환한다\n"],
    "gb18030": ["# 读取配置文件的函数\nx=1\n", "// 返回数组的长度，如果为空则返回零。\n", "/* 测试 */"],
    "cp1251": ["# Функция читает файл конфигурации\nx=1\n", "// Возвращает длину массива\n"],
    "koi8-r": ["# Функция читает файл конфигурации\nx=1\n"],
    "cp1252": ["# café\n", "// Größe der Straße\n", "# by José Núñez – “quoted”\n", "/* © 2009 Müller */"],
}


@pytest.mark.parametrize(("encoding", "text"), [(name, text) for name, texts in SAMPLES.items() for text in texts])
def test_guesses(encoding, text):
    assert decode(text.encode(encoding)) == (text, encoding, False, "")
    assert decode(text.encode()) == (text, "utf-8", False, "")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_marks(encoding):
    assert decode(("\ufeff" + "naïve 😀\r\n").encode(encoding)) == ("naïve 😀\n", encoding, False, "")


def test_declarations():
    assert decode("# -*- coding: iso-8859-15 -*-\nx = '€'\n".encode("iso-8859-15")).text.endswith("'€'\n")
    assert decode("#!/bin/x\n# vim: fileencoding=cp866\n# привет\n".encode("cp866")).text.endswith("привет\n")
    assert decode('<?xml version="1.0" encoding="windows-1250"?><a>łódź</a>'.encode("cp1250")).text.endswith("łódź</a>")
    assert decode('<html><meta charset="gbk"><p>编码</p>'.encode("gbk")).text.endswith("编码</p>")
    assert decode("; -*- coding: iso-2022-jp -*-\n日本\n".encode("iso2022_jp")).text.endswith("日本\n")
    utf8 = "# coding: latin-1\nx = '日本'\n"  # a declaration that outlived a conversion
    assert decode(utf8.encode()) == (utf8, "utf-8", False, "")
    for trick in ("rot13", "zip", "unicode_escape", "idna", "undefined", "nonsense"):
        assert decode(f"# coding: {trick}\nx = 'é'\n".encode("latin-1")).encoding == "cp1252"


def test_refusals():
    assert decode(b"a\0b").reason == "null_bytes"
    assert decode(b"\x81\x8d\x8f\x90\x9d" * 10).reason == "undecodable"
    assert decode(codecs.BOM_UTF16_LE + b"\x00\xd8a\0").reason == "undecodable"
    assert settle("a\ud800b").reason == "surrogates"


def test_mojibake_is_mended_line_by_line():
    good, bad = "naïve — “quoted” Ã is a letter", "naïve — “quoted”"
    broken = bad.encode().decode("cp1252", "replace")
    text, _, repaired, reason = decode(f"{good}\n{broken}\n".encode())
    assert (repaired, reason) == (True, "")
    assert text.splitlines()[0] == good
    assert "naïve" in text.splitlines()[1]
    assert decode(f"{good}\n".encode()) == (f"{good}\n", "utf-8", False, "")


def test_real_python_files_decode_as_the_interpreter_reads_them():
    import tokenize

    checked = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:150]:
        with tokenize.open(path) as file:
            assert decode(path.read_bytes())[:1] == (file.read(),)
        checked += 1
    assert checked > 100


@given(st.binary(max_size=300))
def test_any_bytes_give_a_text_or_a_reason(raw):
    decoded = decode(raw)
    assert bool(decoded.reason) != bool(decoded.encoding)
    decoded.text.encode()
    assert "\r" not in decoded.text
    assert "\0" not in decoded.text


@given(st.text())
def test_utf8_comes_back(text):
    decoded = decode(text.encode())
    if not decoded.reason and not decoded.repaired:
        assert decoded.text == text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").removeprefix(
            "\ufeff"
        ).removesuffix("\x1a")
