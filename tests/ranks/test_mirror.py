"""Objects whose copies are changed elsewhere, and that are then as if they had been changed here.

Elsewhere is the same process: the copies are made from a file, as in another one.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from composefit.ranks.mirror import Mirror, Sent
from composefit.ranks.parcels import pack, unpack


class Trip:
    """Sends objects, lets `work` change the copies, and puts the changes in place."""

    def __init__(self, folder: Path, *roots: Any, data: Any = None) -> None:
        self.folder, self.roots, self.data = folder, roots, data
        self.lost: list[tuple[str, Exception]] = []

    def run(self, work: Callable[..., Any]) -> Any:
        """What `work(*copies)` returns, with the caller's own objects in it."""
        sent = Sent()

        def parts() -> Any:
            yield self.roots
            self.until, sent.contents = len(sent.objects), False
            yield self.data
            yield sent.objects

        pack(self.folder / "there", parts(), sent.known)
        copies, data, objects = unpack(self.folder / "there")
        mirror = Mirror(objects, self.until)
        result = work(*copies) if self.data is None else work(*copies, data)
        modules = [one for one in copies if isinstance(one, nn.Module)]
        always = [t for one in modules for t in (*one.parameters(), *one.buffers())]

        def back() -> Any:
            yield result
            yield list(mirror.changes(copies, always))

        pack(self.folder / "back", back(), mirror.known)
        self.changed = []
        result, changes = unpack(self.folder / "back", sent.resolve)
        for number, content, left_out in changes:
            self.changed.append(sent.objects[number])
            sent.apply(number, content, left_out)
        self.lost = mirror.lost
        return result


class Thing:
    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


def test_containers_that_the_user_holds_have_grown(tmp_path: Path) -> None:
    a_list: list[int] = [1]
    inner: dict[str, Any] = {"list": a_list}
    thing = Thing(inner=inner, names={"a"})
    names = thing.names

    def work(copy: Thing) -> None:
        copy.inner["list"].append(2)
        copy.inner["new"] = copy.inner["list"]
        copy.names.add("b")

    Trip(tmp_path, thing).run(work)
    assert a_list == [1, 2]
    assert thing.inner is inner
    assert inner["new"] is a_list
    assert names == {"a", "b"}


def test_an_attribute_that_is_bound_anew_leaves_the_old_object_alone(tmp_path: Path) -> None:
    before = [1]
    thing = Thing(items=before, gone=1)

    def work(copy: Thing) -> None:
        copy.items = [2]
        del copy.gone

    Trip(tmp_path, thing).run(work)
    assert before == [1]
    assert vars(thing) == {"items": [2]}


def test_other_containers_of_the_standard_library_and_arrays(tmp_path: Path) -> None:
    thing = Thing(
        queue=deque([1, 2], maxlen=2),
        count=Counter("aab"),
        lists=defaultdict(list),
        order=OrderedDict(a=1, b=2),
        array=np.zeros(3),
    )
    held = dict(vars(thing))

    def work(copy: Thing) -> None:
        copy.queue.append(3)
        copy.count.update("b")
        copy.lists["x"].append(1)
        copy.order.move_to_end("a")
        copy.array[1] = 5

    Trip(tmp_path, thing).run(work)
    assert all(getattr(thing, name) is one for name, one in held.items())
    assert (list(thing.queue), thing.queue.maxlen) == ([2, 3], 2)
    assert thing.count == {"a": 2, "b": 2}
    assert thing.lists == {"x": [1]}
    assert thing.lists["y"] == []
    assert list(thing.order) == ["b", "a"]
    assert thing.array.tolist() == [0, 5, 0]


def test_parameters_and_buffers_stay_the_objects_that_they_are(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    module.register_buffer("passing", torch.zeros(2), persistent=False)
    held: list[Tensor] = [*module.parameters(), *module.buffers()]
    view = module[0].weight.detach()[0]

    def work(copy: Any) -> None:
        copy(torch.randn(8, 2)).sum()  # running_mean changes without a new version
        with torch.no_grad():
            for parameter in copy.parameters():
                parameter.add_(1)
        copy.passing = torch.ones(2)  # another tensor, under the same name
        copy[0].weight.requires_grad_(False)
        copy.eval()

    before = [one.clone() for one in held]
    Trip(tmp_path, module).run(work)
    there = [*module.parameters(), *module.buffers()]
    assert all(one is other for one, other in zip(held, there, strict=True))
    assert all(not torch.equal(one, was) for one, was in zip(held, before, strict=True))
    assert torch.equal(view, before[0][0] + 1)
    assert not module[0].weight.requires_grad
    assert not module[1].training


def test_a_parameter_of_another_dtype_or_shape_is_taken(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    weight = module.weight

    def work(copy: nn.Linear) -> None:
        copy.to(torch.bfloat16)
        copy.bias = nn.Parameter(torch.zeros(5))

    Trip(tmp_path, module).run(work)
    assert module.weight is weight
    assert weight.dtype == torch.bfloat16
    assert module.bias.shape == (5,)


def test_new_parts_of_a_module_arrive_and_hooks_stay(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    calls: list[int] = []
    module.register_forward_hook(lambda *arguments: calls.append(1))

    def work(copy: nn.Sequential) -> None:
        copy.append(nn.Linear(2, 3))
        copy.note = "made there"
        copy.register_forward_hook(print)

    Trip(tmp_path, module).run(work)
    assert module(torch.ones(1, 2)).shape == (1, 3)
    assert module.note == "made there"
    assert calls == [1]


def test_a_metric_goes_on_where_it_was(tmp_path: Path) -> None:
    metric = MeanMetric()
    metric.update(1.0)
    Trip(tmp_path, metric).run(lambda copy: copy.update(3.0))
    assert metric.compute() == 2
    metric.update(5.0)
    assert metric.compute() == 3


def test_an_optimizer_that_comes_back_steps_the_callers_parameters(tmp_path: Path) -> None:
    module = nn.Linear(2, 1)

    def work(copy: nn.Module) -> torch.optim.Optimizer:
        optimizer = torch.optim.Adam(copy.parameters(), lr=0.1)
        copy(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return optimizer

    optimizer = Trip(tmp_path, module).run(work)
    assert optimizer.param_groups[0]["params"][0] is module.weight
    assert optimizer.state[module.weight]["step"] == 1


def test_lists_that_functions_close_over_grow_and_the_functions_stay(tmp_path: Path) -> None:
    seen: list[int] = []
    count = 0

    def hook(value: int) -> None:
        nonlocal count
        count += 1
        seen.append(value)

    class Local:
        def work(self) -> None:
            hook(8)

    thing = Thing(hook=hook, local=Local())

    def work(copy: Thing) -> None:
        copy.hook(7)
        copy.local.work()

    Trip(tmp_path, thing).run(work)
    assert seen == [7, 8]
    assert count == 2
    assert thing.hook is hook
    assert type(thing.local) is Local


def test_lists_that_only_methods_know_grow(tmp_path: Path) -> None:
    seen: list[int] = []

    class Local:
        def work(self) -> None:
            seen.append(1)

    Trip(tmp_path, Local()).run(lambda copy: copy.work())
    assert seen == [1]


def test_data_goes_there_and_does_not_come_back(tmp_path: Path) -> None:
    data = Thing(rows=torch.zeros(3), read=0)
    thing = Thing()

    def work(copy: Thing, data_there: Thing) -> None:
        copy.data = data_there
        data_there.read += 1
        data_there.rows.fill_(1)

    trip = Trip(tmp_path, thing, data=data)
    trip.run(work)
    assert thing.data is data
    assert data.read == 0
    assert data.rows.sum() == 0


def test_tensors_that_nobody_has_changed_are_not_sent_back(tmp_path: Path) -> None:
    thing = Thing(big=torch.zeros(1000), counted=torch.zeros(1))
    trip = Trip(tmp_path, thing)
    trip.run(lambda copy: copy.counted.add_(1))
    assert [one for one in trip.changed if isinstance(one, Tensor)] == [thing.counted]
    assert thing.counted == 1


def test_what_cannot_be_sent_back_is_left_out_and_all_else_comes(tmp_path: Path) -> None:
    module = nn.Linear(1, 1)
    module.kept = "mine"
    thing = Thing(module=module, log=[])

    def work(copy: Thing) -> None:
        copy.module.kept = threading.Lock()
        copy.module.other = 1
        copy.log.append(threading.Lock())
        copy.log.append(2)
        with torch.no_grad():
            copy.module.weight.fill_(9)

    trip = Trip(tmp_path, thing, module)
    trip.run(lambda copy, _: work(copy))
    assert module.kept == "mine"
    assert module.other == 1
    assert module.weight == 9
    assert thing.log == [2]
    assert {name for name, _ in trip.lost} == {"an item of a list", "Linear.kept"}


def test_what_an_object_keeps_to_itself_stays(tmp_path: Path) -> None:
    class Writer:
        def __init__(self) -> None:
            self.lock = threading.Lock()
            self.rows: list[int] = []

        def __getstate__(self) -> dict[str, Any]:
            return {**vars(self), "lock": None}

    writer = Writer()
    lock = writer.lock
    Trip(tmp_path, writer).run(lambda copy: copy.rows.append(1))
    assert writer.rows == [1]
    assert writer.lock is lock
