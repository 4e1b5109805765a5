"""How values are spread: quantiles of any number of values in a little, bounded memory.

The buckets are those of DDSketch (Masson, Rim, Lee: "DDSketch: a fast and fully-mergeable quantile sketch with
relative-error guarantees", PVLDB 12, 2019). With the relative error `a` and `g = (1 + a) / (1 - a)`, bucket `i` holds
the values `v` with

    g ** (i - 1) < v <= g ** i,    that is    i = ceil(log(v) / log(g))

and answers for all of them with `e = g ** (i - 1) * (1 + a)`. At the lower border `e / v = 1 + a`, at the upper border
`e / v = (1 + a) / g = 1 - a`, between them something between: so `|e - v| <= a * v` for every value of the bucket.

Two histograms of the same `a` have the same buckets, so adding the counts merges them without any further error: `a`
is a constant and not a parameter.

**Memory**: one entry of a dict (about 100 bytes) for each bucket that was hit. Service latencies from 1 ms to 100 s
have some 231 buckets; all normal floats together have 28,358, and zero has one: at most 3 MB, whatever is recorded.
"""

import math
import sys
from dataclasses import dataclass

# The answer to "p99 is 412 ms" is not another one for 402 or 422 ms; half of it costs twice the buckets.
RELATIVE_ERROR = 0.025

_GAMMA = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
_BUCKETS_PER_E = 1 / math.log(_GAMMA)

# Below the smallest normal float the relative error of the floats themselves exceeds ours.
_SMALLEST = sys.float_info.min
_LARGEST = sys.float_info.max

# No value's bucket: the lowest of those is -14,164.
_ZERO_BUCKET = -(10**6)


@dataclass(frozen=True, slots=True)
class Distribution:
    """A frozen summary of a histogram. All but `count` are in the unit of the values, and NaN if count is 0."""

    count: int
    mean: float
    min: float
    p50: float
    p90: float
    p99: float
    p999: float
    max: float


class Histogram:
    """Counts values in logarithmic buckets: count, total, mean, minimum and maximum exactly, quantiles within 2.5 %.

    Values are finite and not negative, in whatever unit. Zero and subnormal numbers (below 2.3e-308) share a bucket
    that answers 0.

    **Threads**: none of the methods may run while another one runs on the same histogram. For many threads, give each
    its own and `merge` them. **Blocking**: never. **Cost**: 0.3 us for each `record`; the other methods walk the
    buckets that were hit, some hundred as a rule.
    """

    __slots__ = ("_counts", "_max", "_min", "_total")

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._total = 0.0
        self._min = math.inf
        self._max = -math.inf

    def record(self, value: float) -> None:
        """Count one value.

        Raises:
            ValueError: it is negative, infinite or not a number. A negative duration comes from two clocks that were
                mixed up, and to count it as zero would hide that.
        """
        # Chained comparisons, because NaN fails all of them and so never reaches the logarithm.
        if _SMALLEST <= value <= _LARGEST:
            bucket = math.ceil(math.log(value) * _BUCKETS_PER_E)
        elif 0 <= value < _SMALLEST:
            bucket = _ZERO_BUCKET
        else:
            raise ValueError(f"a histogram holds finite values that are not negative, found {value!r}")
        try:
            self._counts[bucket] += 1
        except KeyError:
            self._counts[bucket] = 1
        self._total += value
        if value < self._min:
            self._min = value
        if value > self._max:
            self._max = value

    def merge(self, other: "Histogram") -> None:
        """Count all that `other` has counted, too; `other` stays as it is."""
        for bucket, count in other._counts.items():
            self._counts[bucket] = self._counts.get(bucket, 0) + count
        self._total += other._total
        self._min = min(self._min, other._min)
        self._max = max(self._max, other._max)

    @property
    def count(self) -> int:
        """How many values were recorded."""
        return sum(self._counts.values())

    @property
    def total(self) -> float:
        """Their sum; 0 if there are none."""
        return self._total

    @property
    def mean(self) -> float:
        """Their mean; NaN if there are none."""
        return self._total / self.count if self._counts else math.nan

    @property
    def min(self) -> float:
        """The smallest, exactly; NaN if there are none."""
        return self._min if self._counts else math.nan

    @property
    def max(self) -> float:
        """The largest, exactly; NaN if there are none."""
        return self._max if self._counts else math.nan

    def quantile(self, q: float) -> float:
        """The value of rank `max(1, ceil(q * count))`, within 2.5 %: at least the share `q` is not larger.

        `q` is from 0 to 1; 0 gives the minimum and 1 the maximum, both exactly. NaN if nothing was recorded.

        Raises:
            ValueError: `q` is not from 0 to 1.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"a quantile is a share from 0 to 1, found {q!r}; p99 is quantile(0.99)")
        return self._quantiles((q,))[0]

    def snapshot(self) -> Distribution:
        """A frozen summary as of now."""
        p50, p90, p99, p999 = self._quantiles((0.5, 0.9, 0.99, 0.999))
        return Distribution(self.count, self.mean, self.min, p50, p90, p99, p999, self.max)

    def _quantiles(self, ascending: tuple[float, ...]) -> list[float]:
        """All in one walk over the sorted buckets."""
        if not self._counts:
            return [math.nan] * len(ascending)
        count = self.count
        buckets = iter(sorted(self._counts.items()))
        bucket, covered = next(buckets)
        values = []
        for q in ascending:
            rank = max(1, math.ceil(q * count))
            while covered < rank:
                bucket, counted = next(buckets)
                covered += counted
            values.append(self._value(bucket, rank, count))
        return values

    def _value(self, bucket: int, rank: int, count: int) -> float:
        if rank == 1:
            return self._min
        if rank == count:
            return self._max
        # The bucket of the smallest or largest value may answer outside of what was recorded.
        return min(max(_estimate(bucket), self._min), self._max)

    def __repr__(self) -> str:
        d = self.snapshot()
        return f"<Histogram count={d.count} mean={d.mean:.4g} p50={d.p50:.4g} p99={d.p99:.4g} max={d.max:.4g}>"


def _estimate(bucket: int) -> float:
    """The value within `RELATIVE_ERROR` of all values of the bucket."""
    if bucket == _ZERO_BUCKET:
        return 0.0
    # The lower border is a float that exists; the upper one of the topmost bucket is not.
    return math.exp((bucket - 1) / _BUCKETS_PER_E) * (1 + RELATIVE_ERROR)
