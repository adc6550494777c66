"""Ranks: the processes of one job, how they find each other, talk, and end together."""

from composefit.ranks.world import PeerFailed, World, join

__all__ = ["PeerFailed", "World", "join"]
