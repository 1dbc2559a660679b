"""The process of a tracker's library: records on stdin, an answer for each on stdout."""

from __future__ import annotations

import json
import os
import sys

from llm_coreml.eval.trackers.record import Record
from llm_coreml.eval.trackers.sink import Tracker, reason_of


def answer(name: str, place: str) -> None:
    """Log every record of stdin, up to the first that fails.

    Args:
        name: The tracker's.
        place: See `Tracker`.
    """
    records = [Record(**each) for each in json.load(sys.stdin)]
    # The library has nothing to say on stdout, nor do processes that it starts.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        sink = Tracker(name, place).sink()
        for record in records:
            try:
                told = {"where": sink.log(record)}
            except (Exception, SystemExit) as error:
                told = {"error": reason_of(error)}
            print(json.dumps(told), file=answers, flush=True)
            if "error" in told:
                break
