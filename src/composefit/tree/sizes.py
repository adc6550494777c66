"""How many samples go into each part."""


def even_sizes(samples: int, parts: int, group: int = 1) -> list[int]:
    """Sizes of contiguous parts, as even as groups allow, larger ones first, none empty.

    Parts are cut at multiples of ``group`` only. Samples left over beyond the last whole group stay
    in the last part, so that none holds less than a group, unless there is not even one.

    Args:
        samples: how many there are.
        parts: how many parts are wanted; fewer come back where there are fewer groups.
        group: samples that stay together.

    Returns:
        The number of samples of each part.

    Raises:
        ValueError: if ``parts`` or ``group`` is less than one, or ``samples`` less than zero.

    Example:
        >>> even_sizes(7, 3), even_sizes(2, 4), even_sizes(7, 4, group=2)
        ([3, 2, 2], [1, 1], [2, 2, 3])
    """
    _at_least(0, samples=samples)
    _at_least(1, parts=parts, group=group)
    if samples == 0:
        return []
    groups, rest = divmod(samples, group)
    parts = max(1, min(parts, groups))
    few, larger = divmod(groups, parts)
    sizes = [(few + 1) * group] * larger + [few * group] * (parts - larger)
    sizes[-1] += rest
    return sizes


def shard_sizes(
    samples: int, lanes: int, microbatch: int | None, group: int = 1
) -> list[list[int]]:
    """Sizes of the micro-batches of each lane, contiguous over the lanes in order.

    Args:
        samples: how many there are.
        lanes: places that work side by side (threads, devices); those left without samples are
            left out.
        microbatch: the most samples a micro-batch may hold; None for one per lane.
        group: samples that stay together. What is left over beyond the last whole group may have
            to be a micro-batch by itself, where ``microbatch`` leaves no room for it.

    Returns:
        For each lane that has any, the number of samples of each of its micro-batches.

    Raises:
        ValueError: if ``microbatch`` is less than ``group``, or as :func:`even_sizes`.

    Example:
        >>> shard_sizes(10, 2, microbatch=2)
        [[2, 2, 1], [2, 2, 1]]
    """
    lane_sizes = even_sizes(samples, lanes, group)
    if microbatch is None:
        return [[size] for size in lane_sizes]
    _at_least(1, microbatch=microbatch)
    if microbatch < group:
        raise ValueError(
            f"expected a microbatch of at least one group of {group} samples, got {microbatch}; "
            "raise microbatch_size or lower LoopModule.samples_per_group"
        )
    return [_capped_sizes(size, microbatch, group) for size in lane_sizes]


def _capped_sizes(samples: int, most: int, group: int) -> list[int]:
    groups, rest = divmod(samples, group)
    parts = -(-groups // (most // group))
    # The second try makes room for the rest in the last part.
    for wanted in (parts, parts + 1):
        if wanted and max(sizes := even_sizes(samples, wanted, group)) <= most:
            return sizes
    return [*even_sizes(samples - rest, max(parts, 1), group), rest]


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"expected {name} of at least {least}, got {value}")
