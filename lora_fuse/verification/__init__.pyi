from .expectation import ExpectedDelta as ExpectedDelta
from .expectation import read_expected as read_expected
from .rederivation import Expectation as Expectation
from .rederivation import Verification as Verification
from .rederivation import verify_merge as verify_merge
from .weights import Weights as Weights
from .weights import row_blocks as row_blocks
from .weights import weight_files as weight_files
