"""Cancel a program at every point at which it can be cancelled, and look whether it cleans up each time.

Cancellation bugs hide between two events of one iteration of the loop: the permit was handed over but its new owner
did not run yet, and just then the owner is cancelled. A step here is therefore one iteration of the event loop, not one
`await` of the task: a cancel arrives between becoming ready and running as well as while still waiting.

Each run has a loop, a task and a state of its own, so a program of n steps costs n + 2 runs, about n * n
iterations: keep scenarios small, a few jobs and not a few hundred.
"""

import asyncio
import contextlib
import gc
import inspect
import math
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar, overload

from penstock.errors import DeadlockError, UsageError
from penstock.testing.task_location import location, locations
from penstock.testing.virtual_clock import VirtualClockLoop

S = TypeVar("S")

# Virtual seconds. Arbitrary, because every await in a `finally` has a bound and all bounds of ours are shorter.
PATIENCE = 60.0

# Iterations of the loop. Arbitrary, because a scenario of so many steps would take minutes: it is a mistake.
MAX_STEPS = 10_000


@overload
def cancel_at_every_step(
    scenario: Callable[[], Coroutine[Any, Any, object]],
    *,
    check: Callable[[], object] | None = None,
    patience: float = PATIENCE,
    loop_factory: Callable[[], VirtualClockLoop] = VirtualClockLoop,
) -> int: ...


@overload
def cancel_at_every_step(
    scenario: Callable[[S], Coroutine[Any, Any, object]],
    *,
    arrange: Callable[[], S],
    check: Callable[[S], object] | None = None,
    patience: float = PATIENCE,
    loop_factory: Callable[[], VirtualClockLoop] = VirtualClockLoop,
) -> int: ...


def cancel_at_every_step(
    scenario: Callable[..., Coroutine[Any, Any, object]],
    *,
    arrange: Callable[[], Any] | None = None,
    check: Callable[..., object] | None = None,
    patience: float = PATIENCE,
    loop_factory: Callable[[], VirtualClockLoop] = VirtualClockLoop,
) -> int:
    """Run `scenario` once undisturbed, then once for each of its steps, cancelled after that step.

    After every run these must hold: the scenario has finished or ended cancelled, within `patience`; no other task is
    left over; no error went to the loop's exception handler; `check` agrees. To be called outside any loop; blocks.

        def test_a_permit_survives_cancellation():
            async def scenario(gate):
                async with asyncio.TaskGroup() as group:
                    for _ in range(3):
                        group.create_task(gate.call(asyncio.sleep, 1))

            def check(gate):
                return all(key.in_flight == 0 for key in gate.statistics().values())

            cancel_at_every_step(scenario, arrange=lambda: Gate("x", limit=2), check=check)

    Args:
        scenario: an async function, called anew for each run.
        arrange: makes fresh state for a run; `scenario` and `check` are called with it. Without it they get nothing.
        check: called after every run, outside the loop; it raises or returns False if something is wrong.
        patience: virtual seconds that the scenario may go on after its cancel.
        loop_factory: makes the loop for each run.

    Returns:
        The number of steps at which the scenario was cancelled.

    Raises:
        AssertionError: a condition did not hold; says after which step, and on which line the scenario stood then.
        UsageError: called from inside a running loop, or with a coroutine object.
        Exception: the scenario's own, if it fails undisturbed.
    """
    sweep = _Sweep(scenario, arrange, check, patience, loop_factory)
    return sweep.run("cancelled", lambda task, _: task.cancel(), may_end_cancelled=True)


@overload
def act_at_every_step(
    scenario: Callable[[], Coroutine[Any, Any, object]],
    action: Callable[[], object],
    *,
    check: Callable[[], object] | None = None,
    patience: float = PATIENCE,
    loop_factory: Callable[[], VirtualClockLoop] = VirtualClockLoop,
) -> int: ...


@overload
def act_at_every_step(
    scenario: Callable[[S], Coroutine[Any, Any, object]],
    action: Callable[[S], object],
    *,
    arrange: Callable[[], S],
    check: Callable[[S], object] | None = None,
    patience: float = PATIENCE,
    loop_factory: Callable[[], VirtualClockLoop] = VirtualClockLoop,
) -> int: ...


def act_at_every_step(
    scenario: Callable[..., Coroutine[Any, Any, object]],
    action: Callable[..., object],
    *,
    arrange: Callable[[], Any] | None = None,
    check: Callable[..., object] | None = None,
    patience: float = PATIENCE,
    loop_factory: Callable[[], VirtualClockLoop] = VirtualClockLoop,
) -> int:
    """As `cancel_at_every_step`, with `action` in place of the cancel: close something, change a limit, stop a server.

    `action` is called on the loop's thread between two iterations, with the state of `arrange` if there is one. The
    scenario must then finish without an error: it catches what the action may do to it.
    """
    sweep = _Sweep(scenario, arrange, check, patience, loop_factory)
    return sweep.run("disturbed", lambda _, state: action(*state), may_end_cancelled=False)


_State = tuple[Any, ...]
_Disturbance = Callable[[asyncio.Task[object], _State], object]


class _Sweep:
    """All runs of one scenario. Its state is a tuple: the one argument of the user's functions, or none."""

    def __init__(
        self,
        scenario: Callable[..., Coroutine[Any, Any, object]],
        arrange: Callable[[], Any] | None,
        check: Callable[..., object] | None,
        patience: float,
        loop_factory: Callable[[], VirtualClockLoop],
    ) -> None:
        _refuse_coroutine_object(scenario)
        _refuse_running_loop()
        self.scenario = scenario
        self.check = check
        self.patience = patience
        self.loop_factory = loop_factory
        self._arrange = arrange
        self.stray_errors: list[str] = []

    def arrange(self) -> _State:
        return () if self._arrange is None else (self._arrange(),)

    def run(self, verb: str, disturb: _Disturbance, *, may_end_cancelled: bool) -> int:
        _Trial(self, "undisturbed", None, disturb, may_end_cancelled=False).run()
        step = 1
        while _Trial(self, f"{verb} after step {step}", step, disturb, may_end_cancelled=may_end_cancelled).run():
            step += 1
        # An exception that nobody retrieved is reported when its future dies, which may take a collection.
        gc.collect()
        self.refuse_stray_errors()
        return step - 1

    def refuse_stray_errors(self) -> None:
        if self.stray_errors:
            raise AssertionError("\n".join(self.stray_errors))


class _Overdue(Exception):
    """A run goes on for too long."""


class _Trial:
    """One run of the scenario, disturbed after step `step` (None: not at all), and the judgement of it."""

    def __init__(
        self, sweep: _Sweep, title: str, step: int | None, disturb: _Disturbance, *, may_end_cancelled: bool
    ) -> None:
        self._sweep = sweep
        self._title = title
        self._step = step
        self._disturb = disturb
        self._may_end_cancelled = may_end_cancelled
        self._stood = ""
        self._iterations = 0
        self._deadline = math.inf
        self._disturbed = False

    def run(self) -> bool:
        """Run the scenario in a loop of its own. Whether it was disturbed before it had finished.

        Raises:
            AssertionError: something is amiss afterwards.
        """
        self._state = self._sweep.arrange()
        self._loop = self._sweep.loop_factory()
        self._loop.set_exception_handler(self._note_stray_error)
        self._loop.iteration_hook = self._before_iteration
        self._runner = asyncio.Runner(loop_factory=lambda: self._loop)
        self._task = self._runner.get_loop().create_task(self._sweep.scenario(*self._state), name="scenario")
        try:
            self._run_to_end()
            self._judge_end()
            self._settle()
            self._judge_state()
        except BaseException:
            # What goes wrong in closing after this is a consequence.
            with contextlib.suppress(Exception):
                self._close()
            raise
        self._close()
        self._sweep.refuse_stray_errors()
        return self._disturbed

    def _before_iteration(self) -> None:
        """The loop's hook: disturbs at the chosen step, and ends what would never end."""
        if self._iterations == self._step and not self._disturbed and not self._task.done():
            self._disturbed = True
            self._stood = location(self._task)
            self._allow_more()
            self._disturb(self._task, self._state)
        if self._iterations >= MAX_STEPS or self._loop.time() > self._deadline:
            raise _Overdue
        self._iterations += 1

    def _allow_more(self) -> None:
        self._iterations = 0
        self._deadline = self._loop.time() + self._sweep.patience

    def _run_to_end(self) -> None:
        # Not run_until_complete(task): the errors of the loop and those of the scenario must not be mixed up.
        ended = self._loop.create_future()
        self._task.add_done_callback(lambda _: ended.set_result(None))
        self._drive(ended)

    def _drive(self, awaitable: Awaitable[object]) -> None:
        try:
            self._loop.run_until_complete(awaitable)
        except DeadlockError as error:
            raise self._failure(f"it can never end: {error}") from error
        except _Overdue:
            raise self._failure(
                f"it has not ended within {self._sweep.patience:g} s and {MAX_STEPS:,} steps; "
                f"now it stands at\n{location(self._task)}"
            ) from None

    def _judge_end(self) -> None:
        if self._task.cancelled():
            if not self._may_end_cancelled:
                raise self._failure("it ended cancelled")
        elif (error := self._task.exception()) is not None:
            if self._step is None:
                raise error
            raise self._failure(f"it raised {error!r}") from error
        if left_over := asyncio.all_tasks(self._loop):
            raise self._failure(f"it left tasks behind:\n{locations(left_over)}")

    def _settle(self) -> None:
        """Let threads end and their callbacks run: while they have not, virtual time cannot pass at all."""
        self._allow_more()
        self._drive(asyncio.sleep(math.ulp(self._loop.time())))

    def _judge_state(self) -> None:
        if self._sweep.check is None:
            return
        try:
            agreed = self._sweep.check(*self._state) is not False
        except Exception as error:
            raise self._failure(f"the check failed: {error!r}") from error
        if not agreed:
            raise self._failure("the check returned False")

    def _close(self) -> None:
        self._allow_more()
        self._runner.close()

    def _note_stray_error(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        problem = f"an error reached the loop's exception handler: {context['message']}"
        self._sweep.stray_errors.append(self._told(f"{problem} {context.get('exception')!r}"))

    def _failure(self, problem: str) -> AssertionError:
        return AssertionError(self._told(problem))

    def _told(self, problem: str) -> str:
        stood = f"\n  after that step the scenario stood at\n{self._stood}" if self._stood else ""
        return f"scenario {self._title}: {problem}{stood}"


def _refuse_coroutine_object(scenario: object) -> None:
    if inspect.iscoroutine(scenario):
        scenario.close()
        raise UsageError(
            f"found a coroutine object ({scenario.__qualname__}), expected the async function itself, since it runs "
            f"many times: write `cancel_at_every_step({scenario.__name__}, ...)`"
        )


def _refuse_running_loop() -> None:
    if asyncio._get_running_loop() is not None:
        raise UsageError(
            "called inside a running event loop, expected none, since each run has its own: use `def test`"
        )
