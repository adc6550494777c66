"""The fixture with which a test of a fault says what the table of `docs/reliability.md` shows."""

import pytest

from tests.faults import table
from tests.faults.table import Part


class Tells:
    """Called once by one test of each entry: `tells(found)`, with what was raised."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self.node = request.node
        self.collected = request.config.pluginmanager.has_plugin(table.PLUGIN)

    def __call__(self, *parts: Part) -> None:
        """The parts, text or errors, are the entry's row; where it is not being written, it is."""
        text = table.told(*parts)
        self.node.user_properties.append((table.PLUGIN, text))
        if not self.collected:
            number = table.number_of(self.node.name)
            found = table.rows(table.written()).get(number)
            assert found is not None and found[1] == text, (
                f"docs/reliability.md is not current, write it with {table.COMMAND}"
            )


@pytest.fixture
def tells(request: pytest.FixtureRequest) -> Tells:
    return Tells(request)
