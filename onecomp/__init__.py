"""OneComp: post-training quantization of large language models, in one process or on Ray.

The names are listed in ``__init__.pyi`` and imported when first used, so that what needs no torch
(``onecomp --help``, say) does not wait seconds for it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
