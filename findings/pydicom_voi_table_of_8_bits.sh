#!/bin/bash
# A VOI lookup table of more than 256 entries that are 8 bits each, as a scanner writes to show 12-bit
# values on 8 bits: pydicom 3.0.2 (with numpy 2.2.6) looks values up at their low 8 bits only. A table
# that rises from 0 to 255 over 4,096 entries shows white (stored 4095) as 15, and black and white stripes
# appear every 256 values. The same table with entries of 16 bits is applied rightly. No error is raised
# and no warning is given; who trains on the images trains on noise.
# Indices into the table are computed in the type of its entries.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pydicom==3.0.2 numpy==2.2.6
cd "$folder"
venv/bin/python -W error - <<'PY'
import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.pixels import apply_voi_lut

stored = np.arange(4096, dtype=np.uint16)
ramp = (stored // 16).astype(np.uint16)
found = {}
for bits in (8, 16):
    table = Dataset()
    table.add_new("LUTDescriptor", "US", [4096, 0, bits])
    table.add_new("LUTData", "US", ramp.tolist())
    image = Dataset()
    image.BitsStored, image.BitsAllocated, image.PixelRepresentation = 12, 16, 0
    image.VOILUTSequence = [table]
    image.set_original_encoding(False, True)
    found[bits] = apply_voi_lut(stored, image)
    right = np.count_nonzero(found[bits] == ramp)
    print(f"pydicom {pydicom.__version__}, entries of {bits} bits: {right} of 4096 values right,",
          f"largest {found[bits].max()}, stored 4095 becomes {found[bits][-1]}")
assert np.array_equal(found[16], ramp)
assert found[8].max() == 15 and np.array_equal(found[8], ramp[stored % 256])
PY
