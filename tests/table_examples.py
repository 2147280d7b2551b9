"""Small tables whose law is known, and settings under which a fit takes a second."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dropkit.jobs import FitOptions

QUICK = FitOptions(rate=0.2, members=8, max_epochs=3, effort="quick")


def measurements(rows: int = 120, seed: int = 0) -> pd.DataFrame:
    """Numbers, a category, a date, a yes/no, gaps, and a target `y` that depends on some of them."""
    generator = np.random.default_rng(seed)
    x, z = generator.normal(size=(2, rows)).round(4)
    colour = generator.choice(["red", "green", "blue"], rows)
    frame = pd.DataFrame(
        {
            "x": x,
            "z": z,
            "colour": colour,
            "day": pd.date_range("2020-01-05", periods=rows, freq="37h").strftime("%Y-%m-%d"),
            "fresh": np.where(generator.random(rows) < 0.5, "yes", "no"),
            "y": (2 * x + z + (colour == "red") + generator.normal(size=rows) * 0.3).round(4),
        }
    )
    frame.loc[::17, "z"] = np.nan
    return frame


def kinds(rows: int = 120, seed: int = 0) -> pd.DataFrame:
    """The same with a target `kind` of three classes."""
    frame = measurements(rows, seed)
    kind = np.select([frame["y"] > 1, frame["y"] < -1], ["high", "low"], "middle")
    return frame.drop(columns="y").assign(kind=kind)


def rewrite(model: Path, name: str, content: bytes) -> None:
    """Replace a file of a model as somebody would who also mends the manifest."""
    (model / name).write_bytes(content)
    manifest = json.loads((model / "manifest.json").read_text())
    manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (model / "manifest.json").write_text(json.dumps(manifest))


def change_model(model: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change model.json, and the manifest with it."""
    data = json.loads((model / "model.json").read_text())
    change(data)
    rewrite(model, "model.json", json.dumps(data).encode())
