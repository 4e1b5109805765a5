"""What a test of a penstock program needs: time that jumps, cancellation at every step, a service that is simulated."""

from penstock.testing.cancellation import act_at_every_step, cancel_at_every_step
from penstock.testing.simulated_service import Answer, Quota, SimulatedService, lognormal, mixture
from penstock.testing.virtual_clock import ThreadLatch, VirtualClockLoop, run_in_virtual_time

__all__ = [
    "Answer",
    "Quota",
    "SimulatedService",
    "ThreadLatch",
    "VirtualClockLoop",
    "act_at_every_step",
    "cancel_at_every_step",
    "lognormal",
    "mixture",
    "run_in_virtual_time",
]
