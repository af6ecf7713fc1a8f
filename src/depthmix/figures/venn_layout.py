"""Where the circles of a Venn diagram lie, and what areas their regions have."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from matplotlib_venn.layout import venn2, venn3

LARGEST_ERROR = 0.05
"""How far a region's share of the area may be from its share of the items in a diagram to scale."""

LEAST_ROOM = 0.03
"""Radius of the disc that must fit into a region for its number, where all regions have area 1."""


@dataclass(frozen=True, kw_only=True)
class VennLayout:
    """Two or three circles, and the regions that they make.

    A region's number is the sum of `2**i` over the circles i around it; 0 is what lies outside.
    """

    centres: Float[np.ndarray, "circles 2"]
    """Where the circles lie."""

    radii: Float[np.ndarray, " circles"]
    """How large they are."""

    shares: Float[np.ndarray, " regions"]
    """Share of each region in the area of all circles; 0 for the region outside."""

    middles: Float[np.ndarray, "regions 2"]
    """Centre of about the largest disc that fits into each region."""

    room: Float[np.ndarray, " regions"]
    """Radius of the disc around `middles`; 0 for a region that is not there."""

    to_scale: bool
    """Whether the areas are those that were asked for."""


def lay_out(counts: Int[np.ndarray, " regions"]) -> VennLayout:
    """Place circles whose regions have areas as the counts, or else room for every number.

    Two circles can have any areas, but not always room to write in. Three have right areas as a
    whole and in pairs, and what the seven regions make of that is measured. If a region's share is
    off by more than 5 points or has no room for its number, all circles are equally large.

    Args:
        counts: Items per region, for two or three circles.

    Returns:
        The layout, which says whether it is to scale.
    """
    num_circles = len(counts).bit_length() - 1
    members = (np.arange(len(counts))[:, None] >> np.arange(num_circles)) & 1
    if (counts @ members).all():  # a method that solves nothing would have no circle
        layout = _place(counts[1:] / counts[1:].sum())
        if layout.to_scale:
            return layout
    return _place(np.ones(len(counts) - 1), to_scale=False)


def visible_point(
    layout: VennLayout, circle: int, goal: tuple[float, float]
) -> tuple[float, float]:
    """Find a point of a circle's line that is near a goal, and outside the other circles."""
    angles = np.linspace(0, 2 * np.pi, 361)
    directions = np.stack([np.cos(angles), np.sin(angles)], -1)
    line = layout.centres[circle] + layout.radii[circle] * directions
    others = np.arange(len(layout.radii)) != circle
    margins = _distances(line, layout.centres[others]) - layout.radii[others]
    # A tenth outside is enough, and worth any way to the goal.
    cost = np.linalg.norm(line - goal, axis=-1) - 10 * np.minimum(margins.min(1), 0.1)
    x, y = line[cost.argmin()].tolist()
    return x, y


def _place(sizes: Float[np.ndarray, " regions"], to_scale: bool | None = None) -> VennLayout:
    """Place circles for these sizes of all regions but the outer one, and measure the regions."""
    algorithm = (venn2 if len(sizes) == 3 else venn3).DefaultLayoutAlgorithm()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of wrong areas, which are measured here
        circles = algorithm(sizes.tolist())
    centres = np.array([(centre.x, centre.y) for centre in circles.centers])
    radii = np.array(circles.radii)
    low, high = (centres - radii[:, None]).min(0), (centres + radii[:, None]).max(0)
    x, y = np.meshgrid(*np.linspace(low, high, 201).T)
    points = np.stack([x, y], -1).reshape(-1, 2)
    outside = _distances(points, centres) - radii
    region = (outside < 0) @ (1 << np.arange(len(radii)))
    regions = range(len(sizes) + 1)
    discs = [np.where(region == number, np.abs(outside).min(1), 0) for number in regions]
    shares = np.array([0, *(np.mean(region[region > 0] == number) for number in regions[1:])])
    room = np.array([disc.max() for disc in discs])
    if to_scale is None:
        seen = (room[1:] >= LEAST_ROOM) | (sizes == 0)
        to_scale = bool(seen.all() and np.abs(shares[1:] - sizes).max() <= LARGEST_ERROR)
    return VennLayout(
        centres=centres,
        radii=radii,
        shares=shares,
        middles=np.array([_middle(points[disc >= 0.95 * disc.max()]) for disc in discs]),
        room=room,
        to_scale=to_scale,
    )


def _middle(points: Float[np.ndarray, "points 2"]) -> Float[np.ndarray, " 2"]:
    """Choose the point that is nearest to the mean of all, which need not be among them."""
    return points[np.hypot(*(points - points.mean(0)).T).argmin()]


def _distances(
    points: Float[np.ndarray, "points 2"], centres: Float[np.ndarray, "circles 2"]
) -> Float[np.ndarray, "points circles"]:
    """Measure how far each point is from each centre."""
    return np.hypot(*(points[:, None] - centres).T).T
