"""What a run logs: reduced over shards and ranks, kept on the device until somebody reads it."""

from composefit.logs.logs import LoggingShard, Logs

__all__ = ["LoggingShard", "Logs"]
