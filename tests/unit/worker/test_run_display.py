"""What the displays write, rendered into strings."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from paramesh_worker import display as displays
from paramesh_worker.display import LiveDisplay, PlainDisplay, print_failure, print_summary, progress_line, render
from paramesh_worker.progress import EpochView, Group, Server, Summary, View, Worker
from rich.console import Console

VIEW = View(
    elapsed_s=83,
    phase="training",
    steps=1234,
    steps_per_s=41.26,
    samples=79_000,
    samples_per_s=2637.4,
    workers=(Worker(1, 0, "local/0", "active", 617, 39_500), Worker(2, 1, "local/1", "idle", 617, 39_500)),
    groups=(Group("g", "ssp", 0, 610, 617, 8, 8, 0, (1,)),),
    epochs=(EpochView("", 2, 1000, 1000), EpochView("", 3, 1000, 580)),
    figures=(("loss", 0.123456),),
    servers=(Server("ps-0", True, 3_200_000, 0, 0, 1.5e6, 2e3), Server("ps-1", False, 999, 0, 0)),
)


def drawn(view: View, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(render(view, "digits.py"))
    return console.file.getvalue()


def test_the_panel_shows_everything():
    text = drawn(VIEW)
    for part in (
        "digits.py", "1,234 steps", "41.3 steps/s", "2,637 samples/s", "epoch 3", "58%", "580 of 1,000",
        "loss 0.1235", "clock gap 7 of 8 allowed (widest 8)", "0 active", "1 idle", "ps-0", "3.2 MB", "1.5 MB/s",
        "2.0 kB/s", "✗ ps-1", "ssp · 1:23",
    ):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_the_panel_never_runs_over_the_terminals_edge(width: int):
    assert max(len(line) for line in drawn(VIEW, width).splitlines()) <= width


def test_before_the_first_step_the_phase_is_the_headline():
    text = drawn(View(phase="waiting for workers (1 of 2 joined)"))
    assert "waiting for workers (1 of 2 joined)" in text
    assert "steps/s" not in text


def test_trouble_is_said():
    text = drawn(replace(VIEW, restarts=2, evictions=1, coordinator_away=True))
    assert "2 restarts" in text
    assert "1 eviction " in text
    assert "coordinator is away; training goes on" in text


def test_many_workers_are_folded():
    workers = tuple(Worker(i, i, f"local/{i}", "active", 0, 0) for i in range(100))
    text = drawn(replace(VIEW, workers=workers))
    assert "and 88 more" in text
    assert len(text.splitlines()) < 30


def test_a_script_cannot_write_markup_into_the_panel():
    assert "[red]x[/red]" in drawn(replace(VIEW, figures=(("[red]x[/red]", 1.0),)))


def test_the_progress_line():
    assert progress_line(VIEW) == (
        "step=1234 steps/s=41.3 epoch=3 (58%) loss=0.1235 workers=1/2 active servers=1 (3.2 MB)"
        " clock=gap 7 of 8 allowed (widest 8)"
    )


def plain(monkeypatch) -> tuple[PlainDisplay, io.StringIO, io.StringIO, list[float]]:
    now = [100.0]
    monkeypatch.setattr(displays.time, "monotonic", lambda: now[0])
    out, err = io.StringIO(), io.StringIO()
    return PlainDisplay(Console(file=out), Console(file=err)), out, err, now


def test_plain_output_keeps_the_streams_apart_and_untouched(monkeypatch):
    display, out, err, _ = plain(monkeypatch)
    display.output(1, [b"[worker 0] \x1b[31mred\x1b[0m [bold]", b"x" * 300])
    display.output(2, [b"[worker 0] oh"])
    assert out.getvalue() == "[worker 0] \x1b[31mred\x1b[0m [bold]\n" + "x" * 300 + "\n"
    assert err.getvalue() == "[worker 0] oh\n"


def test_plain_progress_comes_every_few_seconds_and_only_when_it_changed(monkeypatch):
    display, out, _, now = plain(monkeypatch)
    shown = []
    for second in range(31):
        now[0] = 100.0 + second
        display.update(replace(VIEW, elapsed_s=float(second), steps=min(second, 20)))
        shown.append(out.getvalue().count("step="))
    assert shown[4] == 0
    assert shown[5] == 1
    assert shown[20] == 4
    assert shown[30] == 4


def test_plain_phases_come_at_once_and_once(monkeypatch):
    display, out, _, _ = plain(monkeypatch)
    for phase in ("starting", "starting", "waiting", "waiting"):
        display.update(View(phase=phase))
    assert out.getvalue() == "[ps-run] 0:00 starting\n[ps-run] 0:00 waiting\n"


def test_live_output_scrolls_above_the_panel_and_the_panel_goes():
    console = Console(file=io.StringIO(), width=60, force_terminal=True, color_system="standard")
    display = LiveDisplay(console, "digits.py")
    display.output(1, [b"[worker 0] \x1b[31mred\x1b[0m and [bold] stays"])
    display.update(VIEW)
    display.close()
    text = console.file.getvalue()
    assert "[worker 0] \x1b[31mred\x1b[0m and [bold] stays" in text
    assert "1,234" in text
    assert text.rindex("\x1b[2K") > text.rindex("1,234"), "the panel is erased at the end"


def test_the_summary():
    console = Console(file=io.StringIO(), width=80, color_system=None)
    epochs = (EpochView("", 0, 100, 100), EpochView("", 1, 100, 40))
    summary = Summary(12.34, 300, 25.0, 9000, (("loss", 0.25),), epochs, 0, 1, 2, 3_200_000)
    print_summary(console, summary, ending="digits.py is done", good=True, logs="/tmp/logs")
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["wall", "time", "12.3", "s"] in lines
    assert ["steps", "300", "(25", "per", "second),", "2", "of", "them", "skipped"] in lines
    assert ["samples", "9,000"] in lines
    assert ["epochs", "1", "complete"] in lines
    assert ["loss", "0.25"] in lines
    assert ["restarts", "1"] in lines
    assert ["logs", "/tmp/logs"] in lines


def test_a_failure_names_the_process_its_lines_and_its_log():
    console = Console(file=io.StringIO(), width=40, color_system=None)
    print_failure(console, "worker 1 failed: exited with code 1", ["Traceback", "[x] " * 20], "/tmp/w.log")
    text = console.file.getvalue()
    assert text.startswith("worker 1 failed: exited with code 1\n")
    assert "its last 2 lines (all of them: /tmp/w.log):\n" in text
    assert "  | " + "[x] " * 20 + "\n" in text
