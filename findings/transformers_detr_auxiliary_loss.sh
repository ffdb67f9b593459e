#!/bin/bash
# transformers 5.24.0: `auxiliary_loss` of DETR changes what the network predicts, not only its
# losses. With it the decoder normalises its state after each layer and gives the normalised state
# to the next one; without it, as in the paper's code, layers pass on the state as it is, and the
# norm comes once, at the end. So the same weights find other classes and boxes in evaluation, with
# no loss in sight: pretrained weights that are fine-tuned with auxiliary_loss=True begin as another
# network than the published one, and a network trained so is not DETR as published. Whoever wants
# the losses of all layers calls the decoder layers one by one and norms a copy of each state.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 transformers==5.24.0 \
    scipy==1.16.3 numpy==2.2.6
cat > "$folder/detr.py" <<'PY'
import torch
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

body = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 3, "num_queries": 5}
heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
wide = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def network(auxiliary):
    config = DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=body,
        auxiliary_loss=auxiliary,
        **sizes,
        **heads,
        **wide,
    )
    torch.manual_seed(0)
    return DetrForObjectDetection(config).eval()


def boxes(model):
    with torch.no_grad():
        return model(pixel_values=images).pred_boxes


without, along = network(False), network(True)
torch.manual_seed(2)
for weight in without.parameters():  # as after some training: norms, too, are not the identity
    torch.nn.init.normal_(weight, std=0.3)
along.load_state_dict(without.state_dict())
apart = (boxes(without) - boxes(along)).abs().max().item()
along.config.auxiliary_loss = along.model.decoder.config.auxiliary_loss = False
again = (boxes(without) - boxes(along)).abs().max().item()
print(f"boxes (shares of the image) with auxiliary_loss apart from those without: {apart:.3f}")
print(f"and after it is switched off in the same network: {again:.3f}")
raise SystemExit(not (apart > 0.02 and again == 0))
PY
"$folder/venv/bin/python" "$folder/detr.py"
