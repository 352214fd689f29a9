"""How large a size may be: rules by what they remember.

`fixed` remembers nothing, `moments` averages, `ranks` quantiles; `combine` makes rules of rules. A rule
sees arrays of sizes, never a tree, and works for a block of any shape.
"""

from optaxclip.thresholds.combine import at_least as at_least
from optaxclip.thresholds.combine import at_most as at_most
from optaxclip.thresholds.combine import jointly as jointly
from optaxclip.thresholds.combine import patient as patient
from optaxclip.thresholds.combine import plausible as plausible
from optaxclip.thresholds.combine import switch as switch
from optaxclip.thresholds.combine import with_fallback as with_fallback
from optaxclip.thresholds.fixed import as_threshold as as_threshold
from optaxclip.thresholds.fixed import as_thresholds as as_thresholds
from optaxclip.thresholds.fixed import constant as constant
from optaxclip.thresholds.fixed import negated as negated
from optaxclip.thresholds.fixed import relative as relative
from optaxclip.thresholds.fixed import scheduled as scheduled
from optaxclip.thresholds.moments import ema as ema
from optaxclip.thresholds.moments import growth as growth
from optaxclip.thresholds.moments import log_zscore as log_zscore
from optaxclip.thresholds.moments import mean_to_rms as mean_to_rms
from optaxclip.thresholds.moments import second_moment as second_moment
from optaxclip.thresholds.moments import window_zscore as window_zscore
from optaxclip.thresholds.moments import zscore as zscore
from optaxclip.thresholds.ranks import quantile as quantile
from optaxclip.thresholds.ranks import quantile_sketch as quantile_sketch
from optaxclip.thresholds.ranks import quantile_tracker as quantile_tracker
from optaxclip.thresholds.ranks import remember as remember
