"""Gradient clipping for JAX: every method is scope x norm x threshold rule x response."""

from optaxclip import norms as norms
from optaxclip import responses as responses
from optaxclip import scopes as scopes
from optaxclip import thresholds as thresholds
from optaxclip._clip import clip as clip
from optaxclip._types import ClipState as ClipState
from optaxclip._types import Context as Context
from optaxclip._types import Norm as Norm
from optaxclip._types import Reading as Reading
from optaxclip._types import Scope as Scope
from optaxclip._types import Threshold as Threshold
from optaxclip.methods import adaptive_grad_clip as adaptive_grad_clip
from optaxclip.methods import clip_by_block_rms as clip_by_block_rms
from optaxclip.methods import clip_by_global_norm as clip_by_global_norm
from optaxclip.methods import clip_by_norm as clip_by_norm
from optaxclip.methods import clip_by_value as clip_by_value
