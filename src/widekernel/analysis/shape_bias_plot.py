"""The picture of shape bias: for each category, and over all, how often observers go by shape."""

from __future__ import annotations

from collections.abc import Sequence

from widekernel.analysis.shape_bias import CATEGORIES, ShapeBias, is_person
from widekernel.figures import new_figure, to_png

_PERSON = "#b2182b"
_COLORS = ("#1f5fbf", "#1a9850", "#7b3294", "#e08214", "#01665e", "#5e4fa2", "#8c510a", "#4d4d4d")
_MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">")


def plot(results: Sequence[ShapeBias], highlighted: Sequence[str] = ()) -> bytes:
    """Draw shape bias by category, with a vertical line for each observer's bias over all stimuli.

    Args:
        results: shape bias of the observers; those of people have one color and no entry of their own in the legend.
        highlighted: observers that are drawn larger, such as the networks that were just measured.

    Returns:
        a PNG file.
    """
    figure = new_figure(9.5, 7.5)
    axes = figure.add_subplot()
    positions = {name: len(CATEGORIES) - 1 - number for number, name in enumerate(CATEGORIES)}
    styles = _styles(results)
    named: set[str] = set()
    for result in sorted(results, key=lambda one: one.observer in highlighted):
        color, marker = styles[result.observer]
        person, large = is_person(result.observer), result.observer in highlighted
        label = "people" if person else f"{result.observer} ({100 * result.overall.bias:.0f} %)"
        axes.scatter(
            [counts.bias for counts in result.by_category.values()],
            [positions[name] for name in result.by_category],
            s=70 if large else 34,
            color=color,
            marker=marker,
            alpha=1.0 if large else 0.7,
            edgecolors="black" if large else "none",
            linewidths=0.8,
            label=None if label in named else label,
            zorder=3 if large else 2,
        )
        axes.axvline(result.overall.bias, color=color, linewidth=2.0 if large else 1.0, alpha=0.9 if large else 0.5)
        named.add(label)
    axes.set_yticks(list(positions.values()), list(positions))
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("share of decisions for the shape, among those for shape or texture")
    axes.set_ylabel("category of the shape")
    axes.grid(axis="y", linewidth=0.4, alpha=0.6)
    axes.text(0.0, 1.01, "texture", transform=axes.transAxes, ha="left", va="bottom")
    axes.text(1.0, 1.01, "shape", transform=axes.transAxes, ha="right", va="bottom")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    return to_png(figure, dpi=120)


def _styles(results: Sequence[ShapeBias]) -> dict[str, tuple[str, str]]:
    """Return color and marker of every observer; networks cycle through both."""
    styles, number = {}, 0
    for result in results:
        if is_person(result.observer):
            styles[result.observer] = (_PERSON, "o")
        else:
            styles[result.observer] = (_COLORS[number % len(_COLORS)], _MARKERS[number // len(_COLORS) % len(_MARKERS)])
            number += 1
    return styles
