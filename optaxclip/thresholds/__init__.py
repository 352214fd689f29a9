"""How large a size may be: rules by what they remember.

`fixed` remembers nothing, `combine` makes rules of rules. A rule sees arrays of
sizes, never a tree, and works for a block of any shape.
"""

from optaxclip.thresholds.combine import at_least as at_least
from optaxclip.thresholds.combine import at_most as at_most
from optaxclip.thresholds.combine import switch as switch
from optaxclip.thresholds.fixed import as_threshold as as_threshold
from optaxclip.thresholds.fixed import as_thresholds as as_thresholds
from optaxclip.thresholds.fixed import constant as constant
from optaxclip.thresholds.fixed import negated as negated
from optaxclip.thresholds.fixed import relative as relative
from optaxclip.thresholds.fixed import scheduled as scheduled
