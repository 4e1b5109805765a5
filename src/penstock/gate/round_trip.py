"""What a gate guards: one exchange with a service, which can be attempted several times."""

from collections.abc import Mapping
from typing import Protocol, TypeVar

from penstock.gate.service import Service
from penstock.permits import Companion, Weight

T_co = TypeVar("T_co", covariant=True)


class RoundTrip(Protocol[T_co]):
    """One exchange with a service. To be derived from: only `attempt`, `repeatable` and `__str__` are to be written."""

    needs: Companion | None = None
    """What it takes together with its permit, such as a thread."""
    weight: Weight = None
    """How much of each rate it takes; None is one request."""
    rtt: float | None = None
    """Set by an attempt that knows better than the gate how long the service took: seconds, without any wait here."""
    headers: Mapping[str, str] | None = None
    """Set by an attempt: what the service answered beside its answer, in which it may tell its rates."""

    async def attempt(self) -> T_co:
        """Do it once."""
        ...

    def repeatable(self, error: Exception, /) -> bool:
        """Whether doing it again after `error` cannot do harm."""
        ...

    def __str__(self) -> str: ...

    async def wait(self, service: Service, *, again: bool) -> None:
        """Wait for a permit and for what it needs. Cancellation leaves nothing taken."""
        await service.take(again=again, needs=self.needs, weight=self.weight)

    def over(self, service: Service) -> None:
        """An attempt is over, or did not begin: give the permit back, as soon as nothing of it runs any more."""
        service.give_back()

    def why_waiting(self, _service: Service) -> str | None:
        """Why it may wait in vain, if that is known."""
        return None


def headers_of(value: object) -> Mapping[str, str] | None:
    """The headers that an answer or an error of any HTTP library carries; None where there are none."""
    if value is None or type(value) in _WITHOUT_HEADERS:
        return None
    try:
        headers = getattr(value, "headers", None)
    except Exception:  # noqa: BLE001  # a property of the user's: its mistake must not end the round trip
        return None
    return headers if isinstance(headers, Mapping) else None


_WITHOUT_HEADERS = frozenset({dict, list, str, bytes, int, float, bool, tuple})
