"""The life of a job: accepted, queued, run, watched, settled.

One package, several processes: `serve` (the RPCs), `dispatch` (claims jobs, drives inference), `relay` (outbox and sweeper).
"""
