#!/bin/bash
# torch 2.14.1's DataLoader: what it takes to receive a batch from a worker grows with the number of
# its tensors, not with their bytes. Each tensor is a file in shared memory, for whose descriptor the
# main process connects to the worker anew, with a handshake; a thread of the worker answers, which
# competes with the decoding of the next batch. 16 tensors of 256 bytes are 16 connections, and
# several times the milliseconds of one tensor of 4096 bytes. Who sends many small tensors with each
# batch (masks, boxes, draws of augmentation) meets it; to send one tensor and split it avoids it.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.2.6
cd "$folder"
venv/bin/python -W ignore - <<'PY'
import statistics
import time
from multiprocessing import resource_sharer

import torch
from torch.utils.data import DataLoader, Dataset

connect, connections = resource_sharer._ResourceSharer.get_connection, []


def counted(place):
    connections.append(place)
    return connect(place)


resource_sharer._ResourceSharer.get_connection = staticmethod(counted)


class Batches(Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return [part.clone() for part in torch.arange(1024.0).chunk(self.count)]


for count in (1, 16):
    loader = DataLoader(Batches(count), batch_size=None, num_workers=1, prefetch_factor=20)
    taken, batches = [], iter(loader)
    next(batches)
    time.sleep(0.5)  # the next ones are ready
    connections.clear()
    for _ in range(12):
        start = time.perf_counter()
        batch = next(batches)
        taken.append(1e3 * (time.perf_counter() - start))
        assert torch.equal(torch.cat(batch), torch.arange(1024.0))
    each = len(connections) / 12
    print(f"torch {torch.__version__}: {count} tensors of {4096 // count} bytes: {each:g} connections, "
          f"{statistics.median(taken):.2f} ms")
    assert each == count
PY
