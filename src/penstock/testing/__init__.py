"""What a test of a penstock program needs: time that jumps, cancellation at every step."""

from penstock.testing.cancellation import act_at_every_step, cancel_at_every_step
from penstock.testing.virtual_clock import ThreadLatch, VirtualClockLoop, run_in_virtual_time

__all__ = [
    "ThreadLatch",
    "VirtualClockLoop",
    "act_at_every_step",
    "cancel_at_every_step",
    "run_in_virtual_time",
]
