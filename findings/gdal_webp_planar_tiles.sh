#!/bin/bash
# A band-interleaved GeoTIFF with WebP compression: GDAL 3.10.3 (in rasterio 1.4.4) writes and reads
# it, in strips and in tiles. tifffile 2026.3.3 with imagecodecs 2026.3.6 reads the strips, and
# refuses the tiles as corrupted: each tile of one band holds a WebP picture of three channels.
# Who writes rasters as (bands, rows, columns) and asks for WebP meets it; INTERLEAVE=PIXEL avoids it.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q rasterio==1.4.4 tifffile==2026.3.3 imagecodecs==2026.3.6 numpy==2.2.6
cd "$folder"
venv/bin/python -W ignore - <<'PY'
import numpy as np
import rasterio
import tifffile

values = np.random.default_rng(0).integers(0, 256, (3, 27, 22), dtype=np.uint8)
webp = {"compress": "webp", "WEBP_LOSSLESS": True}
layouts = {
    "strips, by band": {"interleave": "band"},
    "tiles, by pixel": {"interleave": "pixel", "tiled": True, "blockxsize": 16, "blockysize": 32},
    "tiles, by band": {"interleave": "band", "tiled": True, "blockxsize": 16, "blockysize": 32},
}
said = {}
for name, layout in layouts.items():
    with rasterio.open(
        "a.tif", "w", driver="GTiff", height=27, width=22, count=3, dtype="uint8", **webp, **layout
    ) as file:
        file.write(values)
    with rasterio.open("a.tif") as file:
        assert np.array_equal(file.read(), values), name
    try:
        found = tifffile.imread("a.tif")
        found = found if found.shape[0] == 3 else found.transpose(2, 0, 1)
        said[name] = "equal" if np.array_equal(found, values) else "other values"
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"
    print(f"{name}: GDAL {rasterio.__gdal_version__} equal; tifffile {tifffile.__version__} {said[name]}")
assert said["strips, by band"] == said["tiles, by pixel"] == "equal"
assert "corrupted tile" in said["tiles, by band"]
PY
