from .paired import PairedCheckpoints as PairedCheckpoints
from .paired import PairedTensor as PairedTensor
from .paired import RowPiece as RowPiece
from .paired import open_pair as open_pair
from .presence import WAY_OUT as WAY_OUT
from .presence import look_for as look_for
from .presence import presence_warnings as presence_warnings
