"""The gate in closed loop: that it finds by itself what the best fixed limit is, whatever the service does.

Each file of `tests/scenarios` says what the service does and what is expected. Here one seed of the shorter ones is
run; the long form of the suite runs all of them with five seeds, and judges the medians. The mutations at the end show
that the scenarios notice when a rule of the limit is missing.
"""

import faulthandler
import json
import random
import re
import statistics
from collections.abc import Iterable
from pathlib import Path

import pytest

from penstock.gate.adaptive import Adaptive, AdaptiveLimiter
from penstock.gate.cubic import Cubic
from penstock.gate.limiter import LimitChange, Limiter, LimitRule
from penstock.testing.scenario import Finding, Scenario, check, load_scenario, run_scenario

pytestmark = pytest.mark.no_cover  # millions of lines: what they run is covered by the tests of its own

HERE = Path(__file__).parent.parent / "scenarios"
DOCS = Path(__file__).parent.parent.parent / "docs"
BEST = json.loads((HERE / "best_static.json").read_text(encoding="utf-8"))
SCENARIOS = [load_scenario(path, BEST.get(path.stem)) for path in sorted(HERE.glob("*.toml"))]
SEEDS = range(1, 6)


def by_name(name: str) -> Scenario:
    return next(scenario for scenario in SCENARIOS if scenario.name == name)


def missed(findings: list[Finding]) -> list[str]:
    return [str(finding) for finding in findings if not finding.met]


def medians(scenario: Scenario, seeds: Iterable[int]) -> list[Finding]:
    found = [check(run_scenario(scenario, seed=seed)) for seed in seeds]
    return [
        Finding(findings[0].expectation, statistics.median_low(finding.value for finding in findings))
        for findings in zip(*found, strict=True)
    ]


@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if not s.long], ids=lambda s: s.name)
def test_with_no_number_set_a_service_is_used_as_it_should_be(scenario: Scenario) -> None:
    """One seed will do as a rule. Where it misses, chance is ruled out by two more."""
    if missed(check(run_scenario(scenario))):
        assert not missed(medians(scenario, (1, 2, 3)))


@pytest.mark.full
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_over_five_seeds_it_is_no_luck(scenario: Scenario) -> None:
    """The median of each number is in its range."""
    faulthandler.cancel_dump_traceback_later()  # minutes, by design
    assert not missed(medians(scenario, SEEDS))


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_the_page_shows_each_scenario_and_what_is_expected_of_it(scenario: Scenario) -> None:
    """`python tests/scenarios/renew.py` writes it."""
    page = (DOCS / "simulation.md").read_text(encoding="utf-8")
    assert f"({HERE.name}/{scenario.name}.toml)" in page.replace("../tests/", "")
    for expectation in scenario.expectations:
        assert f"| {expectation} |" in page
    picture = (DOCS / "simulation" / f"{scenario.name}.svg").read_text(encoding="utf-8")
    assert len(re.findall("<path", picture)) >= 4, "limit, in flight, mean and 99th percentile"


# --- without a rule, the scenario that needs it fails ---


class WithoutProbe(AdaptiveLimiter):
    """Never looks at what the service does with half as much."""

    def _can_probe(self) -> bool:
        return False


class WithoutCohort(AdaptiveLimiter):
    """Takes whatever comes back next for a sample, whenever it began: the fast ones first."""

    def ended(self, mark: int, now: float, rtt: float | None, dropped: bool) -> LimitChange | None:
        return super().ended(mark if self._waiting else self._cohort, now, rtt, dropped)


class WithErrorsAsSamples(AdaptiveLimiter):
    """Takes a quick refusal for a quick answer."""

    def ended(self, mark: int, now: float, rtt: float | None, dropped: bool) -> LimitChange | None:
        return super().ended(mark, now, 0.03 if rtt is None else rtt, False)  # the path's time


class Mutated(LimitRule):
    def __init__(self, limiter: type[AdaptiveLimiter]) -> None:
        self._limiter = limiter

    def limiter(self, now: float, most: int | None, rng: random.Random) -> Limiter:
        return self._limiter(Adaptive(), now, most, rng)


@pytest.mark.parametrize(("mutation", "name"), [(WithoutProbe, "s06_path"), (WithoutCohort, "s07_bimodal_30_70")])
def test_without_a_rule_its_scenario_fails(mutation: type[AdaptiveLimiter], name: str) -> None:
    assert missed(check(run_scenario(by_name(name), limit=Mutated(mutation))))


def test_without_the_rule_that_errors_are_no_samples_a_hard_cap_is_overrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limiter alone keeps it; the rate that is found by trial would hide what the limiter does."""
    monkeypatch.setattr(Cubic, "throttled", lambda *_: None)

    def refused(limiter: type[AdaptiveLimiter]) -> float:
        findings = check(run_scenario(by_name("s04_hard_cap"), limit=Mutated(limiter)))
        return next(finding.value for finding in findings if finding.expectation.metric == "refused_share")

    assert refused(AdaptiveLimiter) < 0.02
    assert refused(WithErrorsAsSamples) > 0.2
