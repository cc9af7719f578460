"""Which licence a text or a name is: SPDX expressions from licence files, notices and what metadata call them.

A text is known by phrases that only it has; two licences in one text both hold ("A AND B"); the rest is unknown ("").
"""

import re

# fmt: off
PERMISSIVE = frozenset({
    "0BSD", "AFL-3.0", "Apache-1.1", "Apache-2.0", "Artistic-2.0", "BlueOak-1.0.0", "BSD-1-Clause", "BSD-2-Clause",
    "BSD-3-Clause", "BSD-4-Clause", "BSL-1.0", "CC0-1.0", "CC-BY-4.0", "CNRI-Python", "curl", "FTL", "HPND", "ICU", "ISC",
    "libpng-2.0", "MIT", "MIT-0", "MulanPSL-2.0", "NCSA", "OFL-1.1", "OpenSSL", "PHP-3.01", "PostgreSQL", "PSF-2.0",
    "Python-2.0", "Ruby", "TCL", "Unicode-3.0", "Unlicense", "UPL-1.0", "Vim", "W3C", "WTFPL", "X11", "Zlib", "ZPL-2.1",
})
# fmt: on

# Phrases of normalised text that only the licence, or a notice that places a file under it, has.
_TEXTS = tuple(
    (name, re.compile(pattern))
    for name, pattern in (
        ("MPL-2.0", r"mozilla public license,? (?:version|v\.) ?2\.0"),
        ("MPL-1.1", r"mozilla public license,? version 1\.1"),
        ("EPL-2.0", r"eclipse public license -? ?v(?:ersion)?\.? ?2\.0"),
        ("EPL-1.0", r"eclipse public license -? ?v(?:ersion)?\.? ?1\.0"),
        ("CDDL-1.0", r"common development and distribution license"),
        ("EUPL-1.2", r"european union public license v\. ?1\.2"),
        ("GFDL-1.3", r"gnu free documentation license,? version 1\.3"),
        ("GFDL-1.2", r"gnu free documentation license,? version 1\.2"),
        ("SSPL-1.0", r"server side public license"),
        ("BUSL-1.1", r"business source license 1\.1"),
        ("Elastic-2.0", r"elastic license 2\.0"),
        ("CC-BY-NC-4.0", r"creative commons attribution-?noncommercial|attribution-noncommercial 4\.0"),
        ("CC-BY-SA-4.0", r"creative commons attribution-?sharealike|attribution-sharealike 4\.0"),
        ("CC-BY-ND-4.0", r"creative commons attribution-?noderiv|attribution-noderivatives 4\.0"),
        ("CC-BY-4.0", r"creative commons attribution (?:international )?4\.0|attribution 4\.0 international"),
        ("CC0-1.0", r"cc0 1\.0 universal|creative commons cc0"),
        ("Apache-2.0", r"apache license,? (?:version|v\.?) ?2\.0"),
        ("Apache-1.1", r"the apache software license, version 1\.1"),
        ("Artistic-2.0", r"the artistic license 2\.0"),
        ("Artistic-1.0", r"the artistic license (?!2)preamble"),
        ("Unlicense", r"free and unencumbered software released into the public domain"),
        ("WTFPL", r"do what the fuck you want to public license"),
        ("BSL-1.0", r"boost software license"),
        ("PSF-2.0", r"python software foundation license version 2"),
        ("OFL-1.1", r"sil open font license,? version 1\.1"),
        ("PostgreSQL", r"postgresql license"),
        ("MulanPSL-2.0", r"mulan psl v2"),
        ("UPL-1.0", r"universal permissive license"),
        ("ZPL-2.1", r"zope public license \(?zpl\)? version 2\.1"),
        ("NCSA", r"university of illinois ncsa"),
        ("Zlib", r"altered source versions must be plainly marked as such"),
        ("HPND", r"to use, copy, modify,? and distribute this software and its documentation for any purpose"),
        ("ISC", r"to use, copy, modify,? and (?:or )?distribute this software for any purpose .{20,90}provided that"),
        ("0BSD", r"to use, copy, modify,? and (?:or )?distribute this software for any purpose .{20,60}granted\. "),
        ("MIT", r"permission is hereby granted, free of charge.{40,700}this permission notice"),
        (
            "MIT-0",
            r"permission is hereby granted, free of charge(?!.{40,700}this permission notice).{40,700}without restr",
        ),
    )
)
# A GNU text names others of its family: only its title counts, or a notice that places something "under the terms of".
_GNU_TITLE = re.compile(
    r"gnu (affero |lesser |library )?general public license version (\d(?:\.\d)?), (?:\d+ )?[a-z]+ \d{4}"
)
_GNU_NOTICE = re.compile(
    r"under (the terms of )?(?:version (\d(?:\.\d)?) of )?the gnu (affero |lesser |library )?general public license"
    r"(?:.{0,120}?version (\d(?:\.\d)?))?"
)
_FAMILY = {"": "GPL", "affero ": "AGPL", "lesser ": "LGPL", "library ": "LGPL"}
_BSD = "redistribution and use in source and binary forms"
_REPLACED = (
    (re.compile(r"[*#/;!<>|\"“”`´_=~]+|--+|\.\. "), " "),
    (re.compile(r"[‘’]"), "'"),
    (re.compile(r"\s+"), " "),
)
_TAG = re.compile(
    r"SPDX-License-Identifier:[ \t]*([A-Za-z0-9.+() -]{2,200}?)[ \t]*(?:[^A-Za-z0-9.+() -]|-->|$)", re.MULTILINE
)


def normalised(text: str) -> str:
    """Lower case, one space between words, no comment marks, straight quotation marks."""
    text = text.lower()
    for pattern, new in _REPLACED:
        text = pattern.sub(new, text)
    return text.replace("licence", "license")


def of_text(text: str) -> str:
    """Returns the SPDX expression of a licence's text or of a notice, "" where none is recognised.

    GNU licences are named by their version alone, without "-only" or "-or-later": a text cannot tell.
    """
    if tag := _TAG.search(text[:3000]):
        return _tidy(tag[1])
    words = normalised(text[:200_000])
    found = {name for name, pattern in _TEXTS if pattern.search(words)} | _gnu(words)
    if "PSF-2.0" in found:
        found -= {"HPND", "0BSD"}  # the history that goes with it
    if _BSD in words and "Apache-1.1" not in found:
        endorse = re.search(r"neither the names? .{1,300}? may be used to endorse|may not be used to endorse", words)
        advert = "all advertising materials mentioning features" in words
        found.add("BSD-4-Clause" if advert else "BSD-3-Clause" if endorse else "BSD-2-Clause")
    return " AND ".join(sorted(found))


def _gnu(words: str) -> set[str]:
    found = {(family, version) for family, version in _GNU_TITLE.findall(words)}
    if not found:
        notices = _GNU_NOTICE.findall(words)
        found = {(family, before or after) for terms, before, family, after in notices if terms or before or after}
        if any(version for _, version in found):
            found = {(family, version) for family, version in found if version}
    defaults = {"GPL": "2", "LGPL": "2.1", "AGPL": "3"}
    names = set()
    for family, version in found:
        name = _FAMILY[family]
        version = version or defaults[name]
        names.add(f"{name}-{version if '.' in version else version + '.0'}")
    return names


def of_header(text: str) -> str:
    """What the first lines of a file say of itself: a tag, or a notice that names a licence; "" mostly."""
    head = text[:3000]
    if "SPDX-License-Identifier" in head and (tag := _TAG.search(head)):
        return _tidy(tag[1])
    if "icen" not in head and "ICEN" not in head:
        return ""
    match = re.search(r"GNU\s+(?:\W*\s)?(?:Lesser|Library|Affero)?\s*General\W+(?:\W*\s)?Public\s+Licen[cs]e", head)
    return of_text(head) if match else ""


# What metadata call a licence, without "the", "license", "version" and punctuation.
_NAMES = {
    "Apache-2.0": "apache|apache 2|apache2|apache 2.0|apache software|apache software 2.0|asl 2.0|apache v2",
    "MIT": "expat|mit x11",
    "MIT-0": "mit no attribution",
    "ISC": "isc iscl",
    "PSF-2.0": "python software foundation|psf|psfl|python",
    "BSD-3-Clause": "bsd|new bsd|modified bsd|revised bsd|bsd new|bsd 3 clause|3 clause bsd|bsd 3 clause new or revised",
    "BSD-2-Clause": "simplified bsd|bsd 2 clause|2 clause bsd",
    "BSL-1.0": "boost|boost software 1.0|boost software 1.0 bsl 1.0",
    "MPL-2.0": "mpl|mpl 2|mpl 2.0|mozilla public 2.0|mozilla public 2.0 mpl 2.0",
    "Zlib": "zlib libpng",
    "Unlicense": "unlicense unlicense|public domain",
    "CC0-1.0": "cc0|cc0 1.0 universal|cc0 1.0 universal cc0 1.0 public domain dedication",
    "GPL-2.0": "gpl|gplv2|gpl v2|gpl 2|gplv2+|gnu gpl|gnu general public gpl|gnu general public v2 gplv2|"
    "gnu general public v2 or later gplv2+",
    "GPL-3.0": "gplv3|gpl v3|gpl 3|gplv3+|gnu gplv3|gnu general public v3 gplv3|gnu general public v3 or later gplv3+",
    "LGPL-2.1": "lgpl|lgplv2.1|gnu lgpl|gnu library or lesser general public lgpl|gnu lesser general public v2 lgplv2",
    "LGPL-3.0": "lgplv3|lgpl v3|lgplv3+|gnu lesser general public v3 lgplv3|"
    "gnu lesser general public v3 or later lgplv3+",
    "AGPL-3.0": "agpl|agplv3|gnu affero general public v3|gnu affero general public v3 or later agplv3+",
    "ZPL-2.1": "zpl|zope public|zpl 2.1",
    "Artistic-2.0": "artistic 2.0",
}
_IDENTIFIERS = {name.lower(): name for name in (*PERMISSIVE, *(name for name, _ in _TEXTS), *_NAMES)}
_WORDS = _IDENTIFIERS | {word: name for name, words in _NAMES.items() for word in words.split("|")}
OPERATOR = re.compile(r"\s*(\(|\)|\bAND\b|\bOR\b|\bWITH\b)\s*")


def of_name(name: str) -> str:
    """Returns the SPDX expression for what metadata call a licence, as in "Apache License 2.0" or "MIT OR Apache-2.0"."""
    name = " ".join(name.split())
    if len(name) > 200:
        return of_text(name)
    plain = re.sub(r"\b(?:the|licen[cs]e|version)\b|[^a-z0-9.+]+", " ", name.lower())
    if found := _IDENTIFIERS.get(name.lower()) or _WORDS.get(" ".join(plain.split())):
        return found
    parts = [part for part in OPERATOR.split(name) if part]
    if len(parts) > 1 or re.fullmatch(r"[A-Za-z]+[A-Za-z0-9.+]*-[A-Za-z0-9.+-]+", name):
        return _tidy(name)
    return ""


def _tidy(expression: str) -> str:
    names = {"(": "(", ")": ")", "AND": "AND", "OR": "OR", "WITH": "WITH"}
    parts = [part for part in OPERATOR.split(expression) if part]
    if sum(part == "(" for part in parts) != sum(part == ")" for part in parts):
        parts = [part for part in parts if part not in "()"]
    if any(not re.fullmatch(r"[A-Za-z0-9.+-]+|[()]", part) for part in parts):
        return ""
    words = [names.get(part) or _WORDS.get(part.lower(), part) for part in parts]
    return " ".join(words).replace("( ", "(").replace(" )", ")")
