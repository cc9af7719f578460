"""Lines of progress where there is no terminal."""

from experiments import display


def test_what_is_done_is_said_once(capsys):
    with display.Display().progress(2, "MB") as update:
        for done in (1, 2, 2, 2):
            update(done)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("2/2 MB, ")
    with display.Display().progress(2, "MB", says_end=False) as update:
        update(2)
    assert capsys.readouterr().err == ""


def test_lines_are_at_least_ten_seconds_apart(capsys, monkeypatch):
    now = iter([0.0, 1.0, 1.0, 11.0, 11.0, 12.0, 12.0])  # the bar's making, then twice an update
    monkeypatch.setattr(display.time, "monotonic", lambda: next(now))
    with display.Display().progress(100, "MB") as update:
        for done in (10, 20, 30):
            update(done)
    assert capsys.readouterr().err.splitlines() == ["20/100 MB, 1.0/s, 80 s left"]
