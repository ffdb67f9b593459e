"""What every fork of a door would do anew, done once in the server that they are forks of.

Imports of what is needed late, such as methods, which are found by name, take up to two seconds.
Reading the sources for the help of each option takes most of a second, and so does each look of
the garbage collector at half a million objects of libraries, which are here to stay.
"""

import contextlib
import gc
import importlib
import io
import pkgutil

import ssl_vit

# Of libraries: the digits, charts, and what torch.compile imports when it is first called.
LATE = ("sklearn.datasets", "matplotlib.pyplot", "einops._torch_specific")
LATE += ("torch._dynamo.backends.debugging", "torch.distributed.fsdp")

for name in (*(m.name for m in pkgutil.walk_packages(ssl_vit.__path__, "ssl_vit.")), *LATE):
    with contextlib.suppress(ImportError):  # of a library that is not installed
        importlib.import_module(name)

from ssl_vit import evaluate, pretrain  # noqa: E402
from ssl_vit.reporting import page  # noqa: E402

for door, called in ((pretrain, "mae"), (pretrain, "dino"), (evaluate, "knn")):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        door.main([called, "--help"])
page._library()
gc.collect()
gc.freeze()
