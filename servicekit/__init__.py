"""What a service needs before it has a domain: server, errors, identity, telemetry, database, streams, objects.

Nothing here knows jobs, credits or models. Services import this package and `gen`, never each other.
"""
