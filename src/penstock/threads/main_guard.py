"""What a script starts, started once: not again by each worker process that imports the script.

A process that is spawned imports the main module of its parent, to find the functions it is sent. A script without a
main guard would start its run there all over, and send everything again, while the run it belongs to waits.

Guarantees: refused before anything is done. Costs nothing where multiprocessing is not loaded, and does not load it.
Threads: any; what is asked about is the whole process.
"""

import sys

from penstock.errors import UsageError


def refuse_a_child_that_imports(what: str) -> None:
    """Refuse to start `what` in a worker process that is not yet ready, as it imports its parent's main module.

    Never blocks; any thread.

    Raises:
        UsageError: this is such a process.
    """
    multiprocessing = sys.modules.get("multiprocessing.process")
    # The mark that the stdlib's own check for a missing main guard goes by; private, and without it all is as before.
    if multiprocessing is not None and getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UsageError(
            f"{what} was reached in a worker process, which imports this script to find its functions. Keep what "
            f'starts the work under `if __name__ == "__main__":`.'
        )
