"""Tables of few values for many: one-dimensional k-means, for thousands of groups at a time.

    tables, codes = kmeans(weight.view(-1, 16 * weight.shape[1]), bits=4)
    tables.gather(1, codes.long())                         # weight again, in 16 values per group

In one dimension a cluster is an interval, so sums over it are differences of prefix sums. The
values of a group become sorted points, each with a weight: bins of a histogram, or the sorted
values themselves where bins would be too coarse. Dynamic programming over candidate cuts then
finds the best intervals, and Lloyd's iteration moves their ends to where they belong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from llm_coreml.errors import UnsupportedError

FP16_MAX = 65504.0

# Values worked on at a time, and the elements of what is made of them in one go: large enough to
# hide the cost of a call, small enough for a cache.
_PIECE = 1 << 21
_BLOCK = 1 << 18
_BINS = 1024
_PER_BIN = 2  # with fewer values per bin, sorting them takes no more time
# Largest share of the squared error that the spread within bins may amount to.
_COARSE = 2e-3
# Cuts that are tried: all of so few points; else so many for each entry, more where the points are
# few and uneven, of which an interval spans so many times its share at most.
_EXACT = 128
_CANDIDATES, _MORE_CANDIDATES, _MOST_CANDIDATES = 8, 16, 512
_REACH = 4
_STEPS = 24


def kmeans(
    values: torch.Tensor, bits: int, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give every group the table of `2**bits` values with the least squared error.

    The tables are within a fraction of a percent of the optimum, and exact for groups of up to 128
    values, but for the rounding of their entries to fp16. Entries that a group does not need repeat
    others. On a CPU the result is the same every time, and that of a group does not depend on the
    groups beside it; elsewhere sums may be added in another order.

    Args:
        values: `[groups, n]`, any floating type and strides, on any device.
        bits: 1 to 8.
        weights: `[groups, n]`, not negative: what the squared error of each value counts. Where
            all of a group's are zero, they count as one.

    Returns:
        Tables `[groups, 2**bits]`, fp32 numbers that fp16 holds, ascending; and codes
        `[groups, n]`, uint8: for each value the nearest entry, of two equally near ones the lower.

    Raises:
        UnsupportedError: a value or weight is not finite, a weight is negative, or a value is
            beyond fp16.
    """
    groups, n = values.shape
    entries = 2**bits
    tables = values.new_zeros((groups, entries), dtype=torch.float32)
    codes = values.new_zeros((groups, n), dtype=torch.uint8)
    step = max(1, _PIECE // max(n, _BINS))
    for start in range(0, groups if n else 0, step):
        piece = slice(start, start + step)
        part = values[piece].to(torch.float32).contiguous()
        _check(part)
        weight = None if weights is None else _relative(weights[piece].to(torch.float32))
        _cluster(part, entries, weight, tables[piece], codes[piece])
    return tables, codes


def _check(values: torch.Tensor) -> None:
    low, high = (float(bound) for bound in torch.aminmax(values))
    if not -FP16_MAX <= low <= high <= FP16_MAX:  # also where one is NaN
        raise UnsupportedError(
            f"a value is {low if not low >= -FP16_MAX else high:g}; a codebook holds fp16 numbers, "
            f"which end at {FP16_MAX:g}. Use another scheme for it, or scale the weights."
        )


def _relative(weights: torch.Tensor) -> torch.Tensor:
    """Return `weights` over a power of two, so that the largest of a group lies in [1, 2)."""
    low, high = (float(bound) for bound in torch.aminmax(weights))
    if not 0 <= low <= high < float("inf"):
        raise UnsupportedError(
            f"a weight is {low if not low >= 0 else high:g}; the weights of values are finite and "
            "not negative."
        )
    largest = weights.amax(1, keepdim=True)
    exponent = torch.frexp(largest).exponent - 1
    return torch.where(largest > 0, torch.ldexp(weights, -exponent), 1.0)


def _cluster(
    values: torch.Tensor,
    entries: int,
    weights: torch.Tensor | None,
    tables: torch.Tensor,
    codes: torch.Tensor,
) -> None:
    """Fill `tables` and `codes` for one piece: by histogram, then by sorting where that is coarse.

    Shapes are those of `kmeans`.
    """
    rest = torch.arange(len(values), device=values.device)
    if values.shape[1] >= _PER_BIN * _BINS:
        bins = Bins.of(values)
        points, spread = bins.points(values, weights)
        found, error = _tables(points, entries, values.shape[1] < 8 * _BINS)
        tables.copy_(found)
        codes.copy_(bins.codes(values, _middles(found)))
        rest = (spread > _COARSE * error).nonzero()[:, 0]
    if len(rest):
        chosen = values[rest]
        points = _sorted(chosen, None if weights is None else weights[rest])
        found, _ = _tables(points, entries, uneven=True)
        tables[rest] = found
        codes[rest] = torch.searchsorted(_middles(found), chosen).to(torch.uint8)


def _middles(tables: torch.Tensor) -> torch.Tensor:
    return (tables[:, :-1] + tables[:, 1:]) / 2


class Points(NamedTuple):
    """Weighted positions of each group, `[groups, count]`, fp64, ascending."""

    positions: torch.Tensor
    weights: torch.Tensor


def _sorted(values: torch.Tensor, weights: torch.Tensor | None) -> Points:
    if weights is None:
        ordered = torch.sort(values, dim=1).values.to(torch.float64)
        return Points(ordered, torch.ones_like(ordered))
    ordered, order = torch.sort(values, dim=1, stable=True)
    return Points(ordered.to(torch.float64), weights.gather(1, order).to(torch.float64))


@dataclass(frozen=True)
class Bins:
    """Bins of values: even about the centre, wider and wider outward, without end.

    A value at distance `d` of the centre is put at `d / (|d| + scale)`, which lies in (-1, 1).
    """

    centre: torch.Tensor  # [groups, 1]
    scale: torch.Tensor  # [groups, 1]
    index: torch.Tensor  # [groups, n] int32: of each value, into all groups' bins

    @classmethod
    def of(cls, values: torch.Tensor) -> Bins:
        """Choose bins for `values` `[groups, n]` fp32, and put each value into its bin."""
        some = values[:, :: values.shape[1] // _BINS].to(torch.float64)
        mean = some.mean(1, keepdim=True)
        scale = (some - mean).abs().mean(1, keepdim=True).mul_(4).clamp_(min=1e-30)
        centre, scale = mean.to(torch.float32), scale.to(torch.float32)
        return cls(centre, scale, _bin(values, centre, scale))

    def points(
        self, values: torch.Tensor, weights: torch.Tensor | None
    ) -> tuple[Points, torch.Tensor]:
        """Return a point for each bin, and what squared error bins hide `[groups]`, about.

        A point is at the mean of the bin's values; where there are none, at the point before.
        """
        count = self._sums(None)
        held = count if weights is None else self._sums(weights)
        sums = self._sums(values) if weights is None else self._sums(values * weights)
        means = sums.div_(held).masked_fill_(held == 0, -torch.inf)
        lowest = means.masked_fill(held == 0, torch.inf).amin(1, keepdim=True)
        positions = torch.cummax(means, 1).values.maximum(lowest)
        end = torch.linspace(-1, 1, _BINS + 1, device=values.device, dtype=torch.float64)[1:-1]
        width = (end / (1 - end.abs())).diff()
        # A value alone in its bin, however wide, is at its point. The outermost bins have no end.
        crowded = count > 1
        spread = (held * crowded)[:, 1:-1] @ width.square_() * self.scale[:, 0].square() / 12
        spread.masked_fill_(crowded[:, [0, -1]].any(1), torch.inf)
        return Points(positions, held), spread

    def _sums(self, terms: torch.Tensor | None) -> torch.Tensor:
        """Return the sums of `terms` `[groups, n]` by bin, or the counts, `[groups, bins]` fp64."""
        sums = self.scale.new_zeros((len(self.index), _BINS), dtype=torch.float64)
        for block in _blocks(self.index):
            rows = sums[block[0]]
            index = (self.index[block] - block[0].start * _BINS).view(-1)
            term = None if terms is None else terms[block].to(torch.float64).view(-1)
            rows += torch.bincount(index, term, minlength=rows.numel()).view_as(rows)
        return sums

    def codes(self, values: torch.Tensor, middles: torch.Tensor) -> torch.Tensor:
        """Return for each value the number of `middles` `[groups, entries - 1]` below it.

        It is the same for all values of a bin unless a middle lies in it, too.
        """
        cut = _bin(middles, self.centre, self.scale)
        cuts = torch.bincount(cut.view(-1), minlength=len(values) * _BINS).view(-1, _BINS)
        below = cuts.cumsum(1).sub_(cuts).to(torch.uint8)
        codes = below.view(-1).index_select(0, self.index.view(-1))
        unsure = (cuts > 0).view(-1).index_select(0, self.index.view(-1)).nonzero()[:, 0]
        asked = values.view(-1).index_select(0, unsure)
        number = codes.index_select(0, unsure).to(torch.int64)
        ends = torch.nn.functional.pad(middles, (0, 1), value=float("inf"))
        row = unsure.div(values.shape[1], rounding_mode="floor").mul_(ends.shape[1])
        while True:
            above = asked > ends.view(-1).index_select(0, row + number)
            if not above.any():
                break
            number += above
        codes.index_copy_(0, unsure, number.to(torch.uint8))
        return codes.view_as(values)


def _bin(values: torch.Tensor, centre: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the index of each of `values` into all groups' bins, int32; see `Bins`."""
    index = torch.empty_like(values, dtype=torch.int32)
    first = torch.arange(len(values), device=values.device, dtype=torch.int32) * _BINS
    for block in _blocks(values):
        distance = values[block] - centre[block[0]]
        share = distance.div_(distance.abs().add_(scale[block[0]]))
        index[block] = share.mul_(_BINS / 2 - 0.25).add_(_BINS / 2)
    return index.add_(first.unsqueeze(1))


def _blocks(values: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield slices of rows and columns that make up `values` in blocks that fit a cache.

    A block is of one row or of whole rows, so that the blocks of a row are always the same.
    """
    groups, n = values.shape
    rows = max(1, _BLOCK // max(n, 1))
    for top in range(0, groups, rows):
        for left in range(0, n, _BLOCK):
            yield slice(top, top + rows), slice(left, left + _BLOCK)


def _tables(points: Points, entries: int, uneven: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tables `[groups, entries]`, fp32 numbers that fp16 holds, and squared errors."""
    centre = points.positions[:, points.positions.shape[1] // 2].unsqueeze(1)
    points = Points(points.positions - centre, points.weights)
    sums = Sums.of(points)
    cuts = _best_cuts(sums, _candidates(points, entries, uneven), entries)
    means, error = _lloyd(points, sums, cuts)
    return (means + centre).to(torch.float16).to(torch.float32), error


class Sums(NamedTuple):
    """Prefix sums over the points of each group, `[groups, count + 1]` fp64, from 0 on."""

    weight: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor

    @classmethod
    def of(cls, points: Points) -> Sums:
        """Sum weights, weighted positions and weighted squares of positions."""
        first = points.weights * points.positions
        terms = (points.weights, first, first * points.positions)
        return cls(*(torch.nn.functional.pad(term.cumsum(1), (1, 0)) for term in terms))

    def at(self, cuts: torch.Tensor) -> Sums:
        """Return the sums up to `cuts` `[groups, any]`."""
        return Sums(*(term.gather(1, cuts) for term in self))


def _candidates(points: Points, entries: int, uneven: bool) -> torch.Tensor:
    """Return where intervals may end, `[groups, candidates + 1]`: numbers of points before a cut.

    The best intervals of a density f have lengths in proportion to f^(-1/3); candidates are spread
    in the same way.
    """
    positions, weights = points
    count = positions.shape[1]
    wanted = min(entries * (_MORE_CANDIDATES if uneven else _CANDIDATES), _MOST_CANDIDATES)
    if count <= max(wanted, _EXACT):
        return torch.arange(count + 1, device=positions.device).repeat(len(positions), 1)
    gaps = torch.diff(positions, dim=1, prepend=positions[:, :1])
    measure = (weights * gaps.square()).to(torch.float32).pow_(1 / 3)
    for _ in range(3):  # no gap, however wide, needs more than one candidate
        mean = measure.sum(1, keepdim=True, dtype=torch.float64) / wanted
        measure = measure.minimum(mean.to(torch.float32))
    total = measure.to(torch.float64).cumsum(1)
    share = torch.arange(1, wanted, device=positions.device) / wanted
    inner = torch.searchsorted(total, share * total[:, -1:])
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=count)


def _best_cuts(sums: Sums, candidates: torch.Tensor, entries: int) -> torch.Tensor:
    """Return the ends of the best `entries` intervals `[groups, entries + 1]`, among `candidates`.

    An interval may be empty. None spans more than `reach` candidates, but for the first.
    """
    count = candidates.shape[1]
    every = count == sums.weight.shape[1]
    reach = count - 1 if every else min(_REACH * count // entries, count - 1)
    step = max(1, _BLOCK // (count * reach + 1))
    ends = sums.at(candidates)
    cuts = torch.empty((len(candidates), entries + 1), dtype=torch.int64, device=candidates.device)
    for start in range(0, len(candidates), step):
        piece = slice(start, start + step)
        places = _best_places(Sums(*(term[piece] for term in ends)), entries, reach)
        cuts[piece] = candidates[piece].gather(1, places)
    return cuts


def _best_places(ends: Sums, entries: int, reach: int) -> torch.Tensor:
    """Return which of the candidates whose sums are `ends` are best, `[groups, entries + 1]`."""
    # cost[g, i, m]: squared error of the interval from candidate i - reach + m to candidate i.
    weight, first, second = (term.unsqueeze(2) - _before(term, reach, 0.0) for term in ends)
    cost = second.sub_(first.square_().div_(weight.clamp_(min=1e-300)))
    cost = cost.clamp_(min=0).to(torch.float32)
    whole = ends.second - ends.first.square().div_(ends.weight.clamp(min=1e-300))
    best = whole.clamp_(min=0).to(torch.float32)
    layers = []
    total = torch.empty_like(cost)
    for _ in range(entries - 1):
        layers.append(_before(best, reach, torch.inf))
        best = torch.add(layers[-1], cost, out=total).amin(2)
    groups = torch.arange(len(cost), device=cost.device)
    place = torch.full_like(groups, cost.shape[1] - 1)
    places = [place]
    for layer in reversed(layers):
        place = place - reach + (layer[groups, place] + cost[groups, place]).argmin(1)
        places.append(place)
    return torch.stack([torch.zeros_like(place), *reversed(places)], 1)


def _before(row: torch.Tensor, reach: int, absent: float) -> torch.Tensor:
    """Return a view of the `reach + 1` numbers up to each of `row` `[groups, count]`."""
    padded = torch.nn.functional.pad(row, (reach, 0), value=absent)
    return padded.unfold(1, reach + 1, 1)


def _lloyd(points: Points, sums: Sums, cuts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Move `cuts` to the middles between means; return the means and the groups' squared errors."""
    positions = points.positions
    for step in range(_STEPS):
        within = Sums(*(term.diff(dim=1) for term in sums.at(cuts)))
        lowest = positions.gather(1, cuts[:, :-1].clamp(max=positions.shape[1] - 1))
        highest = positions.gather(1, (cuts[:, 1:] - 1).clamp(min=0))
        means = torch.where(within.weight > 0, within.first / within.weight, lowest)
        means = means.minimum(highest).maximum(lowest)
        inner = torch.searchsorted(positions, _middles(means))
        if step == _STEPS - 1 or torch.equal(inner, cuts[:, 1:-1]):
            break
        cuts = torch.cat((cuts[:, :1], inner, cuts[:, -1:]), 1)
    return means, (within.second - means * within.first).sum(1)
