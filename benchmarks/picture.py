"""Draws one picture, described as JSON on standard input, into the file given. Runs where matplotlib is installed."""

from __future__ import annotations

import json
import sys


def draw(picture: dict, path: str) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "penstock", "font.size": 10, "svg.fonttype": "none"})
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for name, points in picture["series"].items():
        if points:
            across, up = zip(*points, strict=True)
            axes.plot(across, up, marker="o", label=name)
    if picture["log_across"]:
        axes.set_xscale("log")
    if picture["log_up"]:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_title(picture["title"])
    axes.set_xlabel(picture["across"])
    axes.set_ylabel(picture["up"])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    draw(json.load(sys.stdin), sys.argv[1])
