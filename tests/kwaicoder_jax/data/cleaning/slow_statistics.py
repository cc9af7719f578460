"""The statistics once more, in plain Python over characters and words: what the vectorised ones are held against."""

import ast
import collections
import io
import re
import tokenize

IDEOGRAPHS = 0x2E80


def words(text, joining=""):
    """Pairs of (start, word)."""
    found, start = [], None
    for place, character in enumerate(text + " "):
        ideograph = character.isalpha() and ord(character) >= IDEOGRAPHS
        inside = character.isalpha() or character.isdigit() or character == joining
        if start is not None and (not inside or ideograph):
            found.append((start, text[start:place]))
            start = None
        if ideograph:
            found.append((place, character))
        elif inside and start is None:
            start = place
    return found


def lines(text):
    pieces = text.split("\n")
    return pieces[:-1] if pieces[-1] == "" else pieces


def top(tokens, n):
    counts = collections.Counter(zip(*(tokens[i:] for i in range(n))))
    most = max(counts.values(), default=0)
    if most < 4:
        return 0.0
    return max(most * sum(map(len, gram)) for gram, count in counts.items() if count == most) / sum(map(len, tokens))


def repeated(tokens, n):
    grams = list(zip(*(tokens[i:] for i in range(n))))
    counts = collections.Counter(grams)
    covered = {place + turn for place, gram in enumerate(grams) if counts[gram] > 1 for turn in range(n)}
    return sum(len(tokens[place]) for place in covered) / max(sum(map(len, tokens)), 1)


def repeated_lines(text):
    bare = ["".join(line.split()) for line in lines(text)]
    bare = [line for line in bare if line]
    counts = collections.Counter(bare)
    return sum(counts[line] > 1 and len(line) > 1 for line in bare) / max(len(bare), 1)


def begins(text, pattern):
    full = [line for line in lines(text) if line.strip()]
    return sum(bool(re.match(rf"\s*(?:{pattern})", line)) for line in full) / max(len(full), 1)


def plain(text):
    """What needs no syntax, by the statistics' names."""
    found, rows = words(text), lines(text)
    tokens = [word for _, word in found]
    spelled = [word for word in tokens if not (word[0].isalpha() and ord(word[0]) >= IDEOGRAPHS)]
    visible = [character for character in text if not character.isspace()]
    result = {
        "size": len(text.encode()),
        "characters": len(text),
        "words": len(tokens),
        "lines": len(rows),
        "longest_line": max(map(len, rows), default=0),
        "mean_line": sum(map(len, rows)) / max(len(rows), 1),
        "mean_word": sum(map(len, spelled)) / len(spelled) if spelled else float("nan"),
        "letters": sum(map(str.isalpha, visible)) / max(len(visible), 1),
        "digits": sum(map(str.isdigit, visible)) / max(len(visible), 1),
        "white_space": sum(map(str.isspace, text)) / max(len(text), 1),
        "replacements": text.count("\ufffd") / max(len(text), 1),
        "hex_words": sum(map(len, re.findall("0[xX][0-9a-fA-F]+", text))) / max(len(text), 1),
        "repeated_lines": repeated_lines(text),
        "imports": begins(text, r"(import|from)(?![^\W_])"),
        "passes": begins(text, r"pass(?![^\W_])"),
    }
    names = [name for _, name in words(text, joining="_")]
    result |= {f"top_{n}grams": top(names, n) for n in (2, 3, 4)}
    return result | {f"repeated_{n}grams": repeated(names, n) for n in range(5, 11)}


def python_comments(text):
    """Characters in comments and docstrings, and in strings that are neither, by Python's own tokeniser."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    comments = strings = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        length = starts[token.end[0] - 1] + token.end[1] - starts[token.start[0] - 1] - token.start[1]
        if token.type == tokenize.COMMENT:
            comments += length
        elif token.type == tokenize.STRING:
            prefix = re.match("[a-zA-Z]*", token.string)[0]
            body = token.string[len(prefix) :]
            docstring = body.startswith(('"""', "'''")) and not token.line[: token.start[1]].strip()
            if docstring and prefix.lower() in ("", "r", "u") and len(prefix) + token.start[1] < 100:
                comments += length - len(prefix)
            else:
                strings += length - len(prefix)
    return comments, strings


def same_code(one, other):
    """Whether two Python texts mean the same to the parser."""
    return ast.dump(ast.parse(one)) == ast.dump(ast.parse(other))
