from .paired import PairedCheckpoints as PairedCheckpoints
from .paired import PairedTensor as PairedTensor
from .paired import open_pair as open_pair
