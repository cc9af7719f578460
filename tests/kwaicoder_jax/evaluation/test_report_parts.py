"""Numbers, ticks, escaping and images, each against what was worked out by hand or by another library."""

import io
import math

import numpy as np
import pytest

from kwaicoder_jax.evaluation.report import markup, quantities, raster, svg


@pytest.mark.parametrize(
    ("form", "value", "shown"),
    [
        ("count", 0, "0"), ("count", 950, "950"), ("count", 999.6, "1 k"), ("count", 21_289, "21.3 k"),
        ("count", 999_600, "1 M"), ("count", 1_705_600, "1.71 M"), ("count", 23.4e9, "23.4 B"),
        ("flops", 242_764_087_296, "243 GFLOP"), ("storage", 1_787_015_168, "1.79 GB"), ("storage", 0, "0 B"),
        ("duration", 0.84, "0.8 s"), ("duration", 67.06, "67 s"), ("duration", 744, "12.4 min"),
        ("duration", 11_520, "3.2 h"), ("duration", 354_240, "4.1 d"),
        ("whole", 4978, "4,978"), ("loss", 7.4316, "7.432"), ("change", 1e-5, "±0.000"), ("change", -0.1234, "−0.123"),
        ("change", 0.0084, "+0.008"), ("percent", 0.125, "12.5 %"), ("scientific", 4.383e-7, "4.4 × 10⁻⁷"),
        ("scientific", 0, "0"), ("scientific", 12.0, "1.2 × 10¹"),
    ],
)  # fmt: skip
def test_quantities(form, value, shown):
    assert getattr(quantities, form)(value).replace(quantities.SPACE, " ") == shown


def test_ticks_are_round_and_inside():
    assert svg.ticks(0, 10, 6) == [0, 2, 4, 6, 8, 10]
    np.testing.assert_allclose(svg.ticks(6.83, 8.31, 6), [7.0, 7.25, 7.5, 7.75, 8.0, 8.25])
    for low, high in ((0, 1e-9), (-3, 8), (1e6, 3.7e6), (5, 5), (2, 1)):
        for most in (2, 5, 9):
            found = svg.ticks(low, high, most)
            assert 1 <= len(found) <= most
            assert all(low - 1e-9 * abs(low) <= tick <= max(high, low) * (1 + 1e-9) for tick in found)
    assert svg.plain([7.0, 7.25, 7.5]) == ["7.00", "7.25", "7.50"]
    assert svg.plain([-1, 0, 1]) == ["−1", "0", "1"]
    assert [name.replace("\u00a0", " ") for name in svg.counts([0, 5e5, 1e6])] == ["0", "0.5 M", "1.0 M"]
    assert svg.counts([0, 10, 20]) == ["0", "10", "20"]


def test_ranges_hold_their_values():
    for values in ([1.0, 2.0], [3.0], [0.0], [], [math.nan, 1.0, math.inf]):
        low, high = svg.padded(values)
        assert low < high
        assert all(low < value < high for value in values if math.isfinite(value))


def test_a_curve_breaks_where_a_value_is_missing():
    plot = svg.Plot(100, 100, (0, 3), (0, 1))
    plot.line([(0, 0.1), (1, math.nan), (2, 0.3), (3, 0.4)], "s0")
    assert plot.render("x").count("<polyline") == 2


def test_escaping_happens_once_and_everywhere():
    cell = markup.element("td", "<b>", markup.element("i", "&"), title='"<')
    assert cell == '<td title="&quot;&lt;">&lt;b&gt;<i>&amp;</i></td>'
    assert markup.escape(markup.escape("<")) == "&lt;"
    assert markup.escape("a\tb\nc\u200b\ufeff\x1b") == "a\tb\nc\\u200b\\ufeff\\u001b"
    assert markup.escape("é 中 🙂") == "é 中 🙂"


def test_png_is_what_matplotlib_reads():
    import matplotlib.image

    rng = np.random.default_rng(0)
    cells_HW4 = rng.integers(0, 256, (5, 7, 4), dtype=np.uint8)
    read_HW4 = matplotlib.image.imread(io.BytesIO(raster.png(cells_HW4)), format="png")
    np.testing.assert_array_equal(np.round(read_HW4 * 255), cells_HW4)


def test_neutral_is_transparent():
    cells = raster.diverging(np.array([[0.0, 0.5, 1.0, 1.5, 2.0, 4.0, np.nan]]))[0]
    assert cells[:, 3].tolist() == [255, 128, 0, 128, 255, 255, 0]
    assert tuple(cells[0, :3]) == raster.BLUE
    assert tuple(cells[4, :3]) == raster.VERMILION
    assert raster.sequential(np.array([[0.0, 1.0, 2.0]]))[0, :, 3].tolist() == [0, 255, 255]


def test_binning_keeps_the_mean():
    values = np.arange(24.0).reshape(2, 12)
    binned = raster.binned(values, 4)
    np.testing.assert_allclose(binned, values.reshape(2, 4, 3).mean(-1), rtol=1e-15)
    assert raster.binned(values, 12) is values
