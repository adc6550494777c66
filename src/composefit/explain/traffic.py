"""How many bytes a rank sends to the others: from the plan, since none is running.

Of the algorithms that NCCL and gloo use for large messages, in which every rank sends as much as it
receives. What ranks tell each other besides (losses, weights, whether all agree) is some hundred
bytes an effect and is left out.
"""

from __future__ import annotations


def all_reduce(size: int, ranks: int) -> int:
    """Adding up `size` bytes in a ring: each rank sends 2 (n - 1) / n of them.

    Source: Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations
    (2009).

    Example:
        >>> all_reduce(800, 1), all_reduce(800, 2), all_reduce(800, 4)
        (0, 800, 1200)
    """
    return 2 * (ranks - 1) * size // ranks


def reduce_scatter(size: int, ranks: int) -> int:
    """Adding up `size` bytes of which each rank keeps its part: (n - 1) / n of them.

    Example:
        >>> reduce_scatter(800, 4)
        600
    """
    return (ranks - 1) * size // ranks


def all_gather(size: int, ranks: int) -> int:
    """Bringing together `size` bytes in all, of which each rank has its part: (n - 1) / n of them.

    Example:
        >>> all_gather(800, 4)
        600
    """
    return (ranks - 1) * size // ranks
