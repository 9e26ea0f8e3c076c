"""What a run says about itself: metrics, log lines, progress, summary."""

from pipeline.telemetry.log import Log
from pipeline.telemetry.metrics import MetricsWriter, StepMetrics, read_metrics

__all__ = ["Log", "MetricsWriter", "StepMetrics", "read_metrics"]
