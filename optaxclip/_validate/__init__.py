"""Argument checks. Every message names the argument, its value, and the fix.

`arguments` checks what users pass to functions that make clips; `trees` checks what `init` and
`update` get; `examples` checks batches of examples; `axes` checks mapped axes; `guards` checks what
guards and monitors watch; `after_step` checks what limits weights; `rules` checks threshold rules
where not all make sense; `combinations` checks arguments that do not fit each other.
"""

from optaxclip._validate.after_step import has_heads as has_heads
from optaxclip._validate.after_step import in_order as in_order
from optaxclip._validate.after_step import is_beyond_zero as is_beyond_zero
from optaxclip._validate.after_step import logits as logits
from optaxclip._validate.after_step import parts as parts
from optaxclip._validate.after_step import zero_inside as zero_inside
from optaxclip._validate.arguments import boundaries as boundaries
from optaxclip._validate.arguments import called as called
from optaxclip._validate.arguments import checks_keywords as checks_keywords
from optaxclip._validate.arguments import count as count
from optaxclip._validate.arguments import function as function
from optaxclip._validate.arguments import keywords as keywords
from optaxclip._validate.arguments import not_both as not_both
from optaxclip._validate.arguments import number as number
from optaxclip._validate.arguments import one_limit as one_limit
from optaxclip._validate.arguments import only_with as only_with
from optaxclip._validate.arguments import option as option
from optaxclip._validate.arguments import part as part
from optaxclip._validate.arguments import renamed as renamed
from optaxclip._validate.arguments import returned as returned
from optaxclip._validate.arguments import rule as rule
from optaxclip._validate.arguments import scope_given as scope_given
from optaxclip._validate.arguments import static as static
from optaxclip._validate.arguments import transform as transform
from optaxclip._validate.axes import mapped as mapped
from optaxclip._validate.axes import not_mapped as not_mapped
from optaxclip._validate.axes import not_split as not_split
from optaxclip._validate.axes import one_run as one_run
from optaxclip._validate.axes import same_on_all as same_on_all
from optaxclip._validate.axes import stack as stack
from optaxclip._validate.axes import tracked as tracked
from optaxclip._validate.axes import units as units
from optaxclip._validate.axes import whole as whole
from optaxclip._validate.combinations import bounds_elements as bounds_elements
from optaxclip._validate.combinations import matrix_axes as matrix_axes
from optaxclip._validate.examples import batch as batch
from optaxclip._validate.examples import center as center
from optaxclip._validate.examples import divided as divided
from optaxclip._validate.examples import mask as mask
from optaxclip._validate.examples import reduction as reduction
from optaxclip._validate.examples import sensitivity as sensitivity
from optaxclip._validate.examples import weights as weights
from optaxclip._validate.guards import loss as loss
from optaxclip._validate.guards import not_relative as not_relative
from optaxclip._validate.guards import signed as signed
from optaxclip._validate.guards import watched as watched
from optaxclip._validate.rules import absolute as absolute
from optaxclip._validate.rules import in_backward_pass as in_backward_pass
from optaxclip._validate.rules import memoryless as memoryless
from optaxclip._validate.rules import no_functions as no_functions
from optaxclip._validate.rules import without_memory as without_memory
from optaxclip._validate.trees import axes_of as axes_of
from optaxclip._validate.trees import given_block as given_block
from optaxclip._validate.trees import given_sizes as given_sizes
from optaxclip._validate.trees import group_name as group_name
from optaxclip._validate.trees import is_sparse as is_sparse
from optaxclip._validate.trees import leaf as leaf
from optaxclip._validate.trees import limits as limits
from optaxclip._validate.trees import names as names
from optaxclip._validate.trees import not_a_transform as not_a_transform
from optaxclip._validate.trees import one_source as one_source
from optaxclip._validate.trees import parameter as parameter
from optaxclip._validate.trees import params_given as params_given
from optaxclip._validate.trees import real as real
from optaxclip._validate.trees import response as response
from optaxclip._validate.trees import same_groups as same_groups
from optaxclip._validate.trees import same_structure as same_structure
from optaxclip._validate.trees import sparse as sparse
from optaxclip._validate.trees import state as state
from optaxclip._validate.trees import state_tree as state_tree
