import json

import timm
from safetensors import safe_open
from safetensors.torch import load_file

path = "runs/mae-digits/encoder.safetensors"
recipe = json.loads(safe_open(path, "pt").metadata()["ssl_vit"])["timm"]
model = timm.create_model(recipe["arch"], num_classes=0, **recipe["kwargs"])
print(model.load_state_dict(load_file(path), strict=True))
