"""`Metric` and `MetricCollection` for `isinstance`, without importing torchmetrics for it.

That takes longer than importing torch: it brings SciPy, matplotlib and Transformers along, where
these are installed. As long as nobody has imported it, nothing is a metric.
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchmetrics import Metric as Metric
    from torchmetrics import MetricCollection as MetricCollection
else:

    class _IfImported(type):
        def __instancecheck__(cls, value: Any) -> bool:
            kind = getattr(sys.modules.get("torchmetrics"), cls.__name__, None)
            return kind is not None and isinstance(value, kind)

    class Metric(metaclass=_IfImported):
        """Stands for `torchmetrics.Metric`."""

    class MetricCollection(metaclass=_IfImported):
        """Stands for `torchmetrics.MetricCollection`."""
