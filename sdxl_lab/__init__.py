"""SDXL Lab: what a researcher tuned is, provably, what the product serves.

The public names, such as `from sdxl_lab import Engine`, stand in `__init__.pyi`. Each is imported from its module when
it is first used, so that `import sdxl_lab` loads no torch.
"""

import lazy_loader

from sdxl_lab.environment import collect_less, prepare

prepare()
collect_less()
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
