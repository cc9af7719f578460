"""Numbers as people read them: a sensible count of digits, and always a unit."""

import math

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
SPACE = "\u00a0"  # between a number and its unit: never a line break


def _significant(value: float, digits: int = 3) -> str:
    """Three significant digits without an exponent, whole numbers whole."""
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if decimals and float(text) == int(float(text)) else text


def _scaled(value: float, names: tuple[str, ...]) -> tuple[str, str]:
    power = 0
    while abs(value) >= 999.5 and power < len(names) - 1:
        value, power = value / 1000, power + 1
    return _significant(value), names[power]


def count(value: float) -> str:
    """Parameters or tokens: 950, 21.3 k, 1.71 M, 23.4 B."""
    number, name = _scaled(value, ("", "k", "M", "B", "T"))
    return f"{number}{SPACE}{name}" if name else number


def flops(value: float) -> str:
    """Floating-point operations: 243 GFLOP."""
    number, name = _scaled(value, ("", "k", "M", "G", "T", "P", "E", "Z", "Y"))
    return f"{number}{SPACE}{name}FLOP"


def storage(value: float) -> str:
    """Bytes in powers of ten: 1.79 GB."""
    number, name = _scaled(value, ("", "k", "M", "G", "T"))
    return f"{number}{SPACE}{name}B"


def duration(seconds: float) -> str:
    """Time: 0.8 s, 67 s, 12.4 min, 3.2 h, 4.1 d."""
    for limit, unit, name in ((100, 1, "s"), (6000, 60, "min"), (172_800, 3600, "h"), (math.inf, 86_400, "d")):
        if seconds < limit:
            value = seconds / unit
            return f"{value:.0f}{SPACE}{name}" if value >= 10 and name == "s" else f"{value:.1f}{SPACE}{name}"
    return f"{seconds}{SPACE}s"


def whole(value: float) -> str:
    """An exact count with separators: 4,978."""
    return f"{round(value):,}"


def loss(value: float) -> str:
    """Nats per token, three decimals."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.3f}"


def change(value: float) -> str:
    """A difference of losses with its sign; a difference below the digits shown says so."""
    if not math.isfinite(value):
        return "not finite"
    return "±0.000" if abs(value) < 5e-4 else f"{value:+.3f}".replace("-", "−")


def percent(share: float) -> str:
    """A share between 0 and 1 as 12.5 %."""
    return f"{100 * share:.1f}{SPACE}%"


def scientific(value: float) -> str:
    """A small number: 4.4 × 10⁻⁷."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}{SPACE}×{SPACE}10{str(int(exponent)).translate(_SUPERSCRIPT)}"
