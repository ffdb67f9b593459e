#!/bin/bash
# torch 2.14.1 on a CPU with AVX512-BF16: a bfloat16 linear layer keeps memory for every number of
# rows it has ever seen. oneDNN, which multiplies in bfloat16, makes kernels for each shape and
# caches them, 1024 of them: some 0.6 MiB for each of the three products of forward and backward, of
# which nothing shows as a tensor. So 60 batches that differ by one row leave 121 MiB behind (with AMX;
# 103 without); the same batches again leave nothing, and in float32, which another library
# multiplies, nothing is kept. Whoever trains on rows that vary (stochastic depth that leaves
# rows out, masked tokens, sequences without padding) sees memory grow for hours as from a leak, and
# pays some ms for each new number. To pad to a few numbers avoids it.
set -eu
grep -q avx512_bf16 /proc/cpuinfo || { echo "this CPU has no AVX512-BF16; nothing to see"; exit 0; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.2.6
cat > "$folder/rows.py" <<'PY'
import ctypes
import sys

import torch


class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info


def used():
    info = libc.mallinfo2()
    return (info.uordblks + info.hblkhd) / 2**20


torch.set_num_threads(1)
kind = getattr(torch, sys.argv[1])
layer = torch.nn.Linear(384, 1536).to(kind)
rows = torch.randn(2100, 384).to(kind)


def learn(count):
    layer.zero_grad(set_to_none=True)
    layer(rows[:count].clone().requires_grad_()).sum().backward()


learn(2099)
kept = [used()]
for _ in range(2):
    for count in range(2000, 2060):
        learn(count)
    learn(2099)
    kept.append(used())
first, again = (after - before for before, after in zip(kept, kept[1:]))
seen = f"60 numbers of rows keep {first:.1f} MiB, again {again:.1f} MiB"
print(f"torch {torch.__version__}, {sys.argv[1]}: {seen}")
assert first > 20 if sys.argv[1] == "bfloat16" else first < 5
assert again < 5
PY
cd "$folder"
venv/bin/python -W ignore rows.py bfloat16
venv/bin/python -W ignore rows.py float32
