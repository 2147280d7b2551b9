"""Small claims whose experiments measure nothing, in a module so that a claim's process can import them."""

from __future__ import annotations

import functools
import importlib
import math
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dropkit.claims import Chart, Claim, Findings, Measured, Results, Rule, Series, Setting
from dropkit.claims.record import Unfinished, outcome_of
from dropkit.errors import MissingPackageError

SIZES = (100.0, 300.0, 1000.0, 3000.0, 10000.0)
PLACES = tuple(map(float, range(40)))
RATES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
LINE = Chart(
    "line", "Gain over seeds; bars are intervals of level 95 %.", "rate p", "gain in percent",
    (Series("gain", RATES, tuple(3 * p * (1 - p) for p in RATES), (0.1,) * 9),),
)  # fmt: skip
SCALES = Chart(
    "scales", "Both axes logarithmic, two measured lines beside their predictions, and a published level.",
    "training rows", "excess loss in nats per row",
    (
        Series("without dropout", SIZES, tuple(30 / n for n in SIZES), tuple(9 / n for n in SIZES)),
        Series("with dropout, p = 0.5", SIZES, tuple(10 / n for n in SIZES), tuple(20 / n for n in SIZES)),
        Series("predicted without", SIZES, tuple(28 / n for n in SIZES), style="predicted"),
        Series("predicted with", SIZES, tuple(11 / n for n in SIZES), style="predicted"),
    ),
    x_log=True, y_log=True, level=0.01, level_name="published (Srivastava et al., 2014)",
)  # fmt: skip
BARS = Chart(
    "bars", "Weights inside a group of copies; bars are two standard errors.", "method", "weight",
    (
        Series("first copy", (0, 1, 2, 3), (0.5, 0.4, 0.45, 0.9), (0.05, 0.04, 0.1, 0.2), "bars"),
        Series("second copy", (0, 1, 2, 3), (0.48, 0.42, -0.45, math.nan), (0.05, 0.04, 0.1, 0.2), "bars"),
    ),
    x_names=("dropout", "ridge regression", "elastic net", "lasso with a long name"),
)  # fmt: skip
POINTS = Chart(
    "points", "One point for each seed.", "a label on the x axis that is long enough to be broken in two",
    "a label on the y axis that is long enough to be broken, too",
    tuple(
        Series(f"seed {k} of a long run", PLACES, tuple(math.sin(x / 5 + k) for x in PLACES), style="points")
        for k in range(3)
    ),
)  # fmt: skip
KINDS = Chart(
    "kinds", "Many names; the page sets them one below the other.", "kind of dropout", "measured over its law",
    (
        Series("mean", tuple(PLACES[:12]), tuple(1 + x / 500 for x in PLACES[:12]), (0.01,) * 12, "points"),
        Series("variance", tuple(PLACES[:12]), (1.0,) * 11 + (math.nan,), (0.02,) * 12, "bars"),
        Series("foreseen", tuple(PLACES[:12]), (1.005,) * 12, style="predicted"),
    ),
    x_names=tuple(f"KindOfDropout{k}d" for k in range(12)), level=1.0, level_name="law",
)  # fmt: skip
RULES = (
    Rule("gain", "test error without dropout minus with, percent", "above"),
    Rule("law", "variance over masks, in a²", "equal", relative=0.2),
    Rule("published", "test error of the published run, percent", "shown"),
)
GOOD = {
    "gain": Measured(1.2, 0.2, degrees=4),
    "law": Measured(1.0, 0.1, 1.05),
    "published": Measured(1.06, 0.0),
}


def declared(name: str, experiment: object, title: str = "", **options: object) -> Claim:
    """A claim with rules of every kind."""
    return Claim(
        name=name, title=title or f"The claim {name}", article="Dropping units makes a network generalise.",
        prediction="Test error with dropout lies below test error without: Var = (s² + p μ²) / (B q).",
        condition="Few rows for many weights.", rules=RULES, experiment=experiment, **options,
    )  # fmt: skip


def findings(figures: Mapping[str, Measured] = GOOD, charts: tuple[Chart, ...] = (LINE,)) -> Findings:
    """What an experiment hands back."""
    return Findings(
        figures, charts, data="none: figures by hand", setup="No network was trained.",
        remarks=("Nothing was measured here.", "A second remark."),
    )  # fmt: skip


def holds(setting: Setting) -> Findings:
    """Holds; numpy's numbers stand where floats are asked for."""
    figures = GOOD | {"gain": Measured(np.float32(1.25), np.float64(0.2), degrees=setting.seeds - 1)}
    return findings(figures)


def falls(setting: Setting, *, gain: float = 0.1) -> Findings:
    """A gain that is not seen."""
    return findings(GOOD | {"gain": Measured(gain, 0.2, degrees=setting.seeds - 1)})


def prints(setting: Setting) -> Findings:
    """Talks while it runs, and tells its threads and seeds by its figures."""
    import torch

    sys.stdout.write("to be thrown away\n")
    figures = GOOD | {
        "published": Measured(torch.get_num_threads(), float(os.environ["OMP_NUM_THREADS"])),
        "law": Measured(setting.seed, 0.0, 3.0),
    }
    return findings(figures)


def raises(setting: Setting) -> Findings:
    """A mistake of a library."""
    raise ValueError("the figures\nwent astray")


def lacks(setting: Setting) -> Findings:
    """A package that nobody has."""
    raise MissingPackageError("needs figment, which is not installed: pip install 'dropkit[figment]'")


def imports(setting: Setting) -> Findings:
    """Another, without a word of its own."""
    importlib.import_module("no_such_package_anywhere")

    return findings()


def dies(setting: Setting) -> Findings:
    """Ended from outside."""
    os.kill(os.getpid(), signal.SIGKILL)
    return findings()


def misfits(setting: Setting) -> Findings:
    """Figures that the claim does not ask for."""
    return findings({"gain": Measured(1.0, 0.1)})


def counts(setting: Setting) -> Findings:
    """Leaves a letter in a file each time, to tell how often it ran."""
    with Path(os.environ["CLAIM_COUNTER"]).open("a", encoding="utf-8") as file:
        file.write("x")
    return findings()


def sleeps(setting: Setting) -> Findings:
    """Says that it runs, and does not end."""
    Path(os.environ["CLAIM_COUNTER"]).write_text(str(os.getpid()), encoding="utf-8")
    time.sleep(600)
    return findings()


HOLDS = declared("holds_here", holds)
FALLS = declared("falls", falls, "A gain that is not seen")
OPPOSITE = declared("opposite", functools.partial(falls, gain=-2.0), "A gain that is a loss")
PRINTS = declared("prints", prints)
RAISES = declared("raises", raises)
LACKS = declared("lacks", lacks)
IMPORTS = declared("imports", imports, extras=("measure", "claims"))
DIES = declared("dies", dies)
MISFITS = declared("misfits", misfits)
COUNTS = declared("counted", counts)
SLEEPS = declared("sleeps", sleeps, seconds=100)

HOSTILE = "</svg><script>alert('x')</script>"


def made(claim: Claim, found: Findings, setting: Setting = Setting()) -> object:  # noqa: B008 - frozen
    """An outcome without a process."""
    return outcome_of(claim, found, setting, (("dropkit", "0.1.0"), ("torch", "2.13.0")), "0" * 64)


def results(hostile: bool = False) -> Results:
    """Every verdict, every kind of chart, a failure and a claim without its package."""
    within = GOOD | {"law": Measured(1.0, 0.01, 1.12)}
    opposite = GOOD | {"gain": Measured(-2.0, 0.2, degrees=4), "law": Measured(math.nan, 0.1, 1.0)}
    outcomes = [
        made(HOLDS, findings(charts=(LINE, SCALES))),
        made(FALLS, findings(GOOD | {"gain": Measured(0.1, 0.2, degrees=4)}, (BARS,))),
        made(declared("within", holds, "A law that is nearly kept"), findings(within, (POINTS, LINE, BARS))),
        made(OPPOSITE, findings(opposite, (SCALES, KINDS))),
    ]
    if hostile:
        chart = Chart("line", HOSTILE, HOSTILE, HOSTILE, (Series(HOSTILE, (0.0, 1.0), (0.0, 1.0)), *LINE.series),
                      x_names=(HOSTILE, "\u202eb"), level=0.5, level_name=HOSTILE)  # fmt: skip
        claim = Claim("hostile", HOSTILE, HOSTILE, HOSTILE, HOSTILE, (Rule("gain", HOSTILE, "above"),), holds)
        chart = Chart(**{**{f: getattr(chart, f) for f in chart.__slots__}, "series": chart.series[:1]})
        outcomes.append(made(claim, Findings({"gain": GOOD["gain"]}, (chart,), HOSTILE, HOSTILE, (HOSTILE,))))
    left = (
        Unfinished("raises", "A claim that fails", "failed", "ValueError: the figures went astray"),
        Unfinished(
            "lacks", "A claim without its package", "not run", "needs figment: pip install 'dropkit[figment]'"
        ),
    )
    return Results(Setting(), tuple(outcomes), left)
