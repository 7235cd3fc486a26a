"""How long tests wait: for events, never to measure how fast a machine is."""

LONG = 600.0
"""Seconds; a safety net under what would otherwise wait for ever on a fault."""

FOREVER = 4 * LONG
"""Seconds; a limit of ours that must not be what ended something within `LONG`."""
