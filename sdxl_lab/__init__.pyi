# The public names. A type checker reads them here, and so does `__init__.py`, which imports each when it is first used.

from .config import GenerationConfig as GenerationConfig
from .config import HiresConfig as HiresConfig
from .config import LoraRef as LoraRef
from .config import ModelRef as ModelRef
from .config import RefinerConfig as RefinerConfig
from .config import RuntimeProfile as RuntimeProfile
from .diffusion.engine import Engine as Engine
from .images import GeneratedImage as GeneratedImage
from .images import read_record as read_record
from .job import ImageRequest as ImageRequest
from .job import Job as Job
from .notebook.explorer import Explorer as Explorer
from .release.promote import promote as promote
from .release.slot import Slot as Slot
from .release.slot import load_slot as load_slot
from .research.sweep import Sweep as Sweep
from .source import SourceImage as SourceImage
from .version import __version__ as __version__
