import pytest

from composefit.loggers import Logger


def test_a_logger_needs_log_metrics_and_nothing_else() -> None:
    class Kept(Logger):
        def __init__(self) -> None:
            self.rows: list[tuple[int, dict[str, float]]] = []

        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            self.rows.append((step, metrics))

    kept = Kept()
    kept.log_hyperparams({"lr": 0.1})
    kept.log_metrics({"loss": 1.0}, 3)
    kept.finalize("finished")
    assert kept.rows == [(3, {"loss": 1.0})]

    class Nothing(Logger):
        pass

    with pytest.raises(TypeError, match="log_metrics"):
        Nothing()  # type: ignore[abstract]
