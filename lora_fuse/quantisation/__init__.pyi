from .codecs import FORMATS as FORMATS
from .compiling import compiled as compiled
from .fp8 import Fp8Options as Fp8Options
from .stored import decode as decode
from .stored import decode_ggml as decode_ggml
