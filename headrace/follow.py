"""The process of a rank other than 0: started by `headrace.team.Lead`.

It loads its share of the model, makes the same engine, and runs what rank 0 runs, until rank 0 has no more work for it
or has ended. Its tokenizer finds stop strings, which end requests; other text it makes none.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
from multiprocessing.connection import Connection

import torch

from headrace.front import TextFront
from headrace.progress import Stages
from headrace.start import Settings, load_tokenizer, start
from headrace.team import Member, is_refusal, watch_parent


def main() -> int:
    """The whole process. Returns its exit status."""
    device, folder, *words = sys.argv[1:]
    rank, size, fileno, parent, threads, level = map(int, words)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; rank 0 decides what follows
    watch_parent(parent, folder)
    logging.basicConfig(level=level, format=f"%(name)s, rank {rank}: %(message)s")
    if device == "cpu":
        torch.set_num_threads(threads)
    else:
        torch.cuda.set_device(rank)
    member = Member(rank, size, device, Connection(fileno))
    try:
        while (settings := member.next_settings()) is not None:
            _follow(member, settings)
    except (EOFError, ConnectionError):
        return 0  # rank 0 has ended, or has ended this
    except BaseException as error:
        member.failed(error)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # where a rank ends, all end; rank 0 may have been killed
    return 0


def _follow(member: Member, settings: Settings) -> None:
    """One engine, from its options to its end."""
    stages = Stages()
    front = start(settings, load_tokenizer(settings, stages), member, stages)
    while (call := member.next_call()) is not None:
        name, args, kwargs = call
        try:
            result = getattr(front.engine, name)(*args, **kwargs)
        except Exception as error:
            if not is_refusal(error, name):
                raise
            result = error  # rank 0 has told the caller
        _forget(front, result)
        member.done(front.engine, result)


def _forget(front: TextFront, result: object) -> None:
    """Nobody here asks for the text of what has ended."""
    if isinstance(result, list):
        front.forget([request for request in result if request.finish])


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads of collectives may still wait for a rank that is gone
