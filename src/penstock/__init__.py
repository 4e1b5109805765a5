"""penstock: push thousands to millions of records through external services."""

from penstock.clients.aws import boto3_client
from penstock.clients.blocking import BlockingClient
from penstock.clients.exchange import StreamedResponse
from penstock.clients.http import HttpClient
from penstock.clients.pool import Pool, PoolStatistics
from penstock.clients.response import Response
from penstock.context import RunningJob, current_job
from penstock.errors import (
    AllFailed,
    AttemptTimeout,
    BodyTooLarge,
    BudgetReached,
    CircuitOpen,
    ClosedError,
    ConnectionFailed,
    ConnectTimeout,
    DeadlockError,
    HttpStatusError,
    InternalError,
    JobTimeout,
    JournalError,
    NotJson,
    Overloaded,
    PenstockError,
    RecordedError,
    RoundTripError,
    SkipItem,
    TooManyErrors,
    UsageError,
    WrongLoop,
    WrongThread,
)
from penstock.events import Instrument, JobEnded
from penstock.executor.ambient import compute, compute_each, from_thread, spend, to_process, to_thread
from penstock.executor.bridge import BridgeExecutor
from penstock.executor.definition import Job, job
from penstock.executor.executor import Executor
from penstock.executor.ledger import Budget
from penstock.executor.statistics import ExecutorStatistics, StreamStatistics
from penstock.executor.stream import Stream
from penstock.executor.synchronous import SyncHttpClient, SyncStreamedResponse
from penstock.gate.adaptive import Adaptive
from penstock.gate.breaker import Breaker
from penstock.gate.gate import Gate
from penstock.gate.limiter import LimitChange, Limiter, LimitRule
from penstock.gate.permit import Permit
from penstock.gate.rate import Rate
from penstock.gate.retry import Retry
from penstock.gate.service import KeyStatistics
from penstock.histogram import Distribution
from penstock.instruments.progress import ProgressLine
from penstock.journal.letters import DeadLetter, dead, results
from penstock.journal.options import Codec, Journal
from penstock.journal.steps import idempotency_key, step
from penstock.outcome import FailureKind, Outcome, classify
from penstock.report import Cause, Report
from penstock.run import run
from penstock.threads.call import AbandonedCall
from penstock.threads.lane import LaneStatistics
from penstock.threads.pull import pull_in_thread

__all__ = [
    "AbandonedCall",
    "Adaptive",
    "AllFailed",
    "AttemptTimeout",
    "BlockingClient",
    "BodyTooLarge",
    "Breaker",
    "BridgeExecutor",
    "Budget",
    "BudgetReached",
    "Cause",
    "CircuitOpen",
    "ClosedError",
    "Codec",
    "ConnectTimeout",
    "ConnectionFailed",
    "DeadLetter",
    "DeadlockError",
    "Distribution",
    "Executor",
    "ExecutorStatistics",
    "FailureKind",
    "Gate",
    "HttpClient",
    "HttpStatusError",
    "Instrument",
    "InternalError",
    "Job",
    "JobEnded",
    "JobTimeout",
    "Journal",
    "JournalError",
    "KeyStatistics",
    "LaneStatistics",
    "LimitChange",
    "LimitRule",
    "Limiter",
    "NotJson",
    "Outcome",
    "Overloaded",
    "PenstockError",
    "Permit",
    "Pool",
    "PoolStatistics",
    "ProgressLine",
    "Rate",
    "RecordedError",
    "Report",
    "Response",
    "Retry",
    "RoundTripError",
    "RunningJob",
    "SkipItem",
    "Stream",
    "StreamStatistics",
    "StreamedResponse",
    "SyncHttpClient",
    "SyncStreamedResponse",
    "TooManyErrors",
    "UsageError",
    "WrongLoop",
    "WrongThread",
    "boto3_client",
    "classify",
    "compute",
    "compute_each",
    "current_job",
    "dead",
    "from_thread",
    "idempotency_key",
    "job",
    "pull_in_thread",
    "results",
    "run",
    "spend",
    "step",
    "to_process",
    "to_thread",
]
