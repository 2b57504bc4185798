"""Measures the private memory of a program, for the tests of the memory that writing and loading take."""

from __future__ import annotations

# The beginning of a program that measures itself. Only private memory of the process is counted: not the
# pages of a mapped file, since the system takes them back at need.
WATCHING = """
import json, sys, threading
from pathlib import Path

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

def watched(work):
    # (result of work, peak bytes above the start)
    start, peaks, done = anonymous(), [0], threading.Event()

    def watch():
        while not done.wait(0.001):
            peaks.append(anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = work()
    done.set()
    watcher.join()
    return result, max(peaks) - start
"""
