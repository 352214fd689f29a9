"""Threshold rules: how large a size may be.

The modules are named for what their rules remember: `fixed` nothing, `moments` averages, `ranks`
quantiles. `combine` builds rules from rules. A rule sees arrays of sizes of any shape, never a
tree.
"""

from optaxclip.thresholds.combine import at_least as at_least
from optaxclip.thresholds.combine import at_most as at_most
from optaxclip.thresholds.combine import by_global_norm as by_global_norm
from optaxclip.thresholds.combine import ignore_outliers as ignore_outliers
from optaxclip.thresholds.combine import join as join
from optaxclip.thresholds.combine import reset_after as reset_after
from optaxclip.thresholds.combine import with_fallback as with_fallback
from optaxclip.thresholds.fixed import ranked as ranked
from optaxclip.thresholds.fixed import relative_to_params as relative_to_params
from optaxclip.thresholds.moments import ema as ema
from optaxclip.thresholds.moments import growth as growth
from optaxclip.thresholds.moments import log_zscore as log_zscore
from optaxclip.thresholds.moments import mean_to_rms as mean_to_rms
from optaxclip.thresholds.moments import rms_multiple as rms_multiple
from optaxclip.thresholds.moments import window_zscore as window_zscore
from optaxclip.thresholds.moments import zscore as zscore
from optaxclip.thresholds.ranks import quantile as quantile
from optaxclip.thresholds.ranks import quantile_sketch as quantile_sketch
from optaxclip.thresholds.ranks import quantile_tracker as quantile_tracker

__all__ = [
    "at_least",
    "at_most",
    "by_global_norm",
    "ignore_outliers",
    "join",
    "reset_after",
    "with_fallback",
    "ranked",
    "relative_to_params",
    "ema",
    "growth",
    "log_zscore",
    "mean_to_rms",
    "rms_multiple",
    "window_zscore",
    "zscore",
    "quantile",
    "quantile_sketch",
    "quantile_tracker",
]


def __dir__() -> list[str]:
    return __all__
