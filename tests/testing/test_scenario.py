"""Scenario files and their runs: that they are read as written, repeat themselves, and count what happened."""

import dataclasses
import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from penstock import Retry, UsageError
from penstock.gate.breaker import Breaker
from penstock.testing.scenario import (
    METRICS,
    Best,
    Expectation,
    Finding,
    Result,
    Scenario,
    best_static,
    check,
    limits_between,
    load_scenario,
    run_scenario,
    run_with_fixed_limit,
)
from penstock.testing.simulated_service import Quota

SMALL = """
title = "Small"
about = "Four servers of 20 ms behind a path of 30 ms."
duration = 4.0

[service]
servers = 4
service_time = 0.02
path = 0.03

[[load]]
kind = "backlog"
jobs = 40

[[window]]
name = "steady"
start = 1.0
stop = 4.0

[[expect]]
metric = "throughput_share"
window = "steady"
at_least = 0.95
"""


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Scenario]:
    def load(text: str = SMALL, best: Mapping[str, Mapping[str, Any]] | None = None) -> Scenario:
        path = tmp_path / "small.toml"
        path.write_text(text, encoding="utf-8")
        return load_scenario(path, best)

    return load


Load = Callable[..., Scenario]


def value_of(result: Result, metric: str, window: str = "steady", since: float = 0.0) -> float:
    return METRICS[metric](result, Expectation(metric, window, -math.inf, math.inf, since))


# --- files ---


def test_a_file_says_what_the_service_is_what_is_asked_and_what_is_expected(load: Load) -> None:
    scenario = load(best={"steady": {"limit": 10, "throughput": 200.0, "mean": 0.05, "p99": 0.05}})
    assert (scenario.name, scenario.title, scenario.duration) == ("small", "Small", 4.0)
    assert scenario.service == {"servers": 4, "service_time": 0.02, "path": 0.03}
    assert (scenario.loads[0].kind, scenario.loads[0].start, scenario.loads[0].stop) == ("backlog", 0.0, 4.0)
    assert scenario.best == {"steady": Best(10, 200.0, 0.05, 0.05)}
    assert (scenario.clients, scenario.gate, scenario.sweep, scenario.long) == (1, {}, None, False)
    assert str(scenario.expectations[0]) == "throughput_share in steady: at least 0.95"


def test_service_times_quotas_changes_and_gates_are_read_too(load: Load) -> None:
    text = SMALL.replace("[service]", "sweep = [8, 12]\nlong = true\nclients = 3\n[service]\nquota = { amount = 9.0 }")
    text = text.replace("service_time = 0.02", "service_time = { mean = 0.02, sigma = 0.0 }")
    text += """
[[change]]
at = 2.0
service_time = [{ share = 1.0, mean = 0.5, sigma = 0.0 }]

[gate]
timeout = 5.0
breaker = false
"""
    scenario = load(text)
    assert (scenario.sweep, scenario.long, scenario.clients) == ((8, 12), True, 3)
    assert scenario.service["quota"] == Quota(9.0)
    assert scenario.gate == {"timeout": 5.0, "breaker": None}
    drawn = []
    for time in (scenario.service["service_time"], scenario.changes[0].conditions["service_time"]):
        assert callable(time)
        drawn.append(time(random.Random(1)))
    assert drawn == pytest.approx([0.02, 0.5])


@pytest.mark.parametrize(
    ("was", "now", "message"),
    [
        ("duration = 4.0", "", "KeyError: 'duration'"),
        ('kind = "backlog"', 'sort = "backlog"', "TypeError"),
        ('metric = "throughput_share"', 'metric = "speed"', "unknown metric"),
        ('window = "steady"', 'window = "never"', "unknown metric or window"),
        ('kind = "backlog"', 'kind = "poisson"', "with a rate"),
        ('kind = "backlog"', 'kind = "backlogs"', "expected the kind"),
        ('title = "Small"', 'title = "Small"\nfriend = 1', "friend"),
    ],
)
def test_a_mistake_in_a_file_is_told_with_its_path(load: Load, was: str, now: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        load(SMALL.replace(was, now))
    assert "small.toml" in str(error.value)


def test_an_expectation_tells_its_range() -> None:
    texts = [str(Expectation("jain", "w", low, high, 0.0)) for low, high in [(1, math.inf), (-math.inf, 2), (1, 2)]]
    assert texts == ["jain in w: at least 1", "jain in w: at most 2", "jain in w: at least 1, at most 2"]
    finding = Finding(Expectation("jain", "w", 0.5, 1.0, 0.0), 0.25)
    assert not finding.met
    assert str(finding) == "jain in w: at least 0.5, at most 1; found 0.25"
    assert not Finding(finding.expectation, math.nan).met, "nothing seen is no success"


# --- runs ---


def test_a_run_repeats_itself_to_the_bit_and_another_seed_differs(load: Load) -> None:
    scenario = load(SMALL.replace("service_time = 0.02", "service_time = { mean = 0.02, sigma = 1.0 }"))

    def seen(seed: int) -> tuple[Any, ...]:
        client = run_scenario(scenario, seed=seed).clients[0]
        return client.limit, client.succeeded, client.latencies

    assert seen(1) == seen(1)
    assert seen(1) != seen(2)


def test_the_random_module_is_left_as_it_was(load: Load) -> None:
    random.seed(5)
    run_scenario(load())
    after = random.random()
    random.seed(5)
    assert random.random() == after


def test_a_fixed_limit_of_the_gate_holds_and_everything_is_counted(load: Load) -> None:
    """Ten in flight is the knee: 200 a second."""
    result = run_scenario(load(), limit=10)
    assert set(result.series("limit")) == {10}
    assert max(result.series("in_flight")) == 10
    assert result.throughput(1.0, 4.0) == pytest.approx(200, rel=0.02)
    assert value_of(result, "mean_limit") == 10
    assert (value_of(result, "limit_drift"), value_of(result, "limit_variation")) == (0, 0)
    assert result.count("attempts", 0, 4) == pytest.approx(result.count("succeeded", 0, 4), abs=10)
    assert result.latencies(1.0, 4.0)[-1] == pytest.approx(0.05, abs=1e-6)
    assert result.service.counts.served >= result.count("succeeded", 0, 4)


def test_numbers_are_relative_to_the_best_fixed_limit(load: Load) -> None:
    best = {"steady": {"limit": 20, "throughput": 400.0, "mean": 0.1, "p99": 0.025}}
    result = run_scenario(load(best=best), limit=10)
    assert value_of(result, "throughput_share") == pytest.approx(0.5, rel=0.02)
    assert value_of(result, "mean_ratio") == pytest.approx(0.5, rel=0.02)
    assert value_of(result, "p99_ratio") == pytest.approx(2, rel=0.02)
    assert value_of(result, "reached_after") == math.inf
    assert [finding.met for finding in check(result)] == [False]


def test_without_a_best_fixed_limit_there_is_nothing_to_be_relative_to(load: Load) -> None:
    result = run_scenario(load(), limit=10)
    with pytest.raises(UsageError, match="best_static"):
        check(result)
    with pytest.raises(UsageError, match="no quota"):
        value_of(result, "quota_share")
    with pytest.raises(UsageError, match="no sweep"):
        best_static(load())


def test_what_is_reached_is_measured_from_a_change_on(load: Load) -> None:
    """From 2 s on there are servers: the first whole half second of answers ends a little after 2.5 s."""
    best = {"steady": {"limit": 10, "throughput": 200.0, "mean": 0.05, "p99": 0.05}}
    text = SMALL.replace("service_time = 0.02", "service_time = 0.02\nhole = true")
    scenario = load(text + "\n[[change]]\nat = 2.0\nhole = false\n[gate]\ntimeout = 0.5\nbreaker = false", best)
    result = run_scenario(scenario, limit=10, retry=Retry(attempts=1))
    assert value_of(result, "throughput_share", "steady") < 0.7
    assert value_of(result, "reached_after", since=2.0) == pytest.approx(0.75, abs=0.25)
    assert value_of(result, "first_answer_after", since=2.0) == pytest.approx(0.25, abs=0.25)
    assert value_of(result, "first_answer_after", since=1.0) == pytest.approx(1.25, abs=0.25)
    assert value_of(result, "reached_after_first_answer", since=2.0) == pytest.approx(0.5, abs=0.25)
    assert value_of(result, "first_answer_after", since=99.0) == math.inf
    assert value_of(result, "reached_after_first_answer", since=99.0) == math.inf
    assert result.count("failed", 0, 2) == 30
    assert result.count("jobs_failed", 0, 2) == 30


def test_refusals_and_failures_are_counted(load: Load) -> None:
    text = SMALL.replace("path = 0.03", "path = 0.03\nunavailable = 0.3\nquota = { amount = 40.0, burst = 4.0 }")
    result = run_with_fixed_limit(load(text), 8)
    counted = {name: result.count(name, 0, 4) for name in ("attempts", "refused", "failed", "succeeded")}
    assert min(counted.values()) > 50
    assert counted["attempts"] == pytest.approx(counted["refused"] + counted["failed"] + counted["succeeded"], abs=8)
    assert value_of(result, "refused_share") == pytest.approx(counted["refused"] / counted["attempts"], rel=0.1)
    assert value_of(result, "quota_share") == pytest.approx(1.0, rel=0.1)
    assert value_of(result, "jobs_succeeded_share") == pytest.approx(
        counted["succeeded"] / counted["attempts"], rel=0.1
    )
    assert value_of(result, "attempts_per_second") == pytest.approx(result.count("attempts", 1, 4) / 3)


def test_retries_are_counted_apart(load: Load) -> None:
    text = SMALL.replace("path = 0.03", "path = 0.03\nunavailable = 0.3")
    result = run_scenario(load(text), limit=10, retry=Retry(attempts=20, wait=0.0, budget=None), breaker=None)
    assert value_of(result, "amplification") == pytest.approx(1 / 0.7, rel=0.1)
    assert value_of(result, "jobs_succeeded_share") == 1
    assert result.count("attempts", 0, 4) > result.count("first_attempts", 0, 4) > result.count("succeeded", 0, 4) - 1


def test_nothing_asked_is_no_amplification(load: Load) -> None:
    result = run_scenario(load(SMALL.replace("jobs = 40", "jobs = 40\nstart = 3.9")), limit=1)
    quiet = dataclasses.replace(result.scenario.windows["steady"], start=0.0, stop=3.0)
    scenario = dataclasses.replace(result.scenario, windows={"steady": quiet})
    quiet_result = dataclasses.replace(result, scenario=scenario)
    assert value_of(quiet_result, "amplification") == 0
    assert value_of(quiet_result, "refused_share") == 0
    assert value_of(quiet_result, "attempts_per_second") == 0
    assert math.isnan(_p99_of(quiet_result))


def _p99_of(result: Result) -> float:
    best = {"steady": Best(1, 1.0, 1.0, 1.0)}
    return value_of(dataclasses.replace(result, scenario=dataclasses.replace(result.scenario, best=best)), "p99_ratio")


@pytest.mark.parametrize("kind", ["steady", "poisson"])
def test_jobs_can_come_at_their_own_times(load: Load, kind: str) -> None:
    text = SMALL.replace('kind = "backlog"', f'kind = "{kind}"\nrate = 100.0\nstart = 1.0\nstop = 3.0')
    result = run_scenario(load(text), limit=10)
    first = result.count("first_attempts", 0, 4)
    assert first == (199 if kind == "steady" else pytest.approx(200, abs=45))
    assert result.count("first_attempts", 1, 3.25) == first
    assert result.count("jobs_succeeded", 0, 4) == pytest.approx(first, abs=12)


def test_a_backlog_can_end_before_the_scenario_does(load: Load) -> None:
    result = run_scenario(load(SMALL.replace("jobs = 40", "jobs = 40\nstop = 2.0")), limit=10)
    assert result.throughput(0, 2) == pytest.approx(200, rel=0.05)
    assert result.count("first_attempts", 2.5, 4) == 0


def test_jobs_that_come_at_their_own_times_can_fail(load: Load) -> None:
    text = SMALL.replace('kind = "backlog"', 'kind = "steady"\nrate = 100.0').replace(
        "path = 0.03", "path = 0.03\nbroken = 1.0"
    )
    result = run_scenario(load(text), limit=10, retry=Retry(attempts=1), breaker=None)
    assert value_of(result, "jobs_succeeded_share") == 0
    assert result.count("jobs_failed", 0, 4) > 300


def test_jobs_that_fail_at_once_do_not_stop_time(load: Load) -> None:
    """An open breaker that fails fast, and a backlog without end."""
    text = SMALL.replace("path = 0.03", "path = 0.03\nbroken = 1.0")
    result = run_scenario(load(text), limit=4, breaker=Breaker(fail_fast=True), retry=Retry(attempts=1))
    assert result.count("attempts", 1, 4) == 0
    assert result.count("jobs_failed", 1, 4) > 0


def test_several_clients_share_a_service(load: Load) -> None:
    result = run_scenario(load(SMALL.replace("duration", "clients = 2\nduration")), limit=5)
    assert set(result.series("limit")) == {10}
    assert result.throughput(1.0, 4.0) == pytest.approx(200, rel=0.02)
    assert value_of(result, "jain") == pytest.approx(1, abs=0.01)


def test_an_error_in_a_run_comes_out_of_it(load: Load) -> None:
    class Broken:
        def limiter(self, now: float, most: int | None, rng: random.Random) -> Any:
            raise ZeroDivisionError("broken rule")

    with pytest.raises(ZeroDivisionError, match="broken rule"):
        run_scenario(load(), limit=Broken())


# --- fixed limits ---


def test_without_a_gate_only_the_limit_holds(load: Load) -> None:
    """No retry, and no pause after a refusal: one of eight is too many for a cap that all but one fit into."""
    scenario = load(SMALL.replace("path = 0.03", "path = 0.03\nunavailable = 0.5") + "\n[gate]\ntimeout = 5.0")
    result = run_with_fixed_limit(scenario, 8)
    assert set(result.series("limit")) == {8}
    assert result.count("attempts", 0, 4) == result.count("first_attempts", 0, 4)
    assert result.count("failed", 0, 4) > 100


def test_the_best_fixed_limit_is_the_knee(load: Load) -> None:
    """Four servers of 20 ms behind a path of 30 ms: ten. A window in which nothing happens has none."""
    text = SMALL.replace("duration", "sweep = [8, 13]\nduration").replace(
        "[[expect]]", '[[window]]\nname = "at once"\nstart = 0.0\nstop = 0.0\n\n[[expect]]'
    )
    text = text.replace("stop = 0.0", "stop = 0.025")
    best = best_static(load(text))
    assert set(best) == {"steady"}
    assert best["steady"].limit == 10
    assert best["steady"].throughput == pytest.approx(200, rel=0.02)
    assert json.loads(json.dumps(best["steady"]._asdict()))["limit"] == 10


def test_a_limit_that_is_refused_often_is_not_the_best(load: Load) -> None:
    """Beyond the cap more gets through only because more is refused."""
    text = SMALL.replace("duration", "sweep = [8, 16]\nduration").replace("path = 0.03", "path = 0.03\ncap = 4")
    assert best_static(load(text))["steady"].limit <= 12


def test_limits_to_try_grow_by_some_per_cent() -> None:
    assert limits_between(1, 5) == [1, 2, 3, 4, 5]
    assert limits_between(95, 110) == [95, 102, 109, 110]


def test_a_gate_sees_the_headers_of_answers_and_refusals(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the service says of its quota reaches the gate by both."""
    seen: list[str] = []

    def read(headers: Mapping[str, str], *, now: float) -> None:
        seen.append(headers["RateLimit"])

    monkeypatch.setattr("penstock.gate.gate.hints_of", read)
    text = SMALL.replace("path = 0.03", 'path = 0.03\nquota = { amount = 5.0, per = 60.0, headers = "ratelimit" }')
    result = run_scenario(load(text), limit=10)
    assert sorted(set(seen)) == [f'"default";r={left};t=60' for left in range(5)]
    assert len(seen) == result.count("succeeded", 0, 4) + result.count("refused", 0, 4)
