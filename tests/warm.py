"""What every fork of a door would do anew, done once in the server that they are forks of.

Reading the sources for the help of each option takes most of a second, and so does each look of
the garbage collector at half a million objects of libraries, which are here to stay.
"""

import contextlib
import gc
import io

from ssl_vit import evaluate, pretrain

for door, called in ((pretrain, "mae"), (pretrain, "dino"), (evaluate, "knn")):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        door.main([called, "--help"])
gc.collect()
gc.freeze()
