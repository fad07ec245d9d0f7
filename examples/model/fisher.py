#!/usr/bin/env python3
"""Fisher weights of the bundled model: squared gradients on its calibration text, summed by rows and columns.

    python3 fisher.py            # reads and writes this folder; needs torch and numpy

For every linear weight W [d_out, d_in] of the blocks, with L the mean loss of a window of 512 bytes:
  NAME.fisher_row [d_out]   sum over columns of the mean over windows of (dL/dW_ij)^2
  NAME.fisher_col [d_in]    the same summed over rows
"""
import json, os, struct

import numpy as np
import torch
import torch.nn.functional as F

from train import CONFIG, Llama

HERE = os.path.dirname(os.path.abspath(__file__))
WINDOW = 512


def load(path):
    raw = open(path, "rb").read()
    length = struct.unpack("<Q", raw[:8])[0]
    header, out = json.loads(raw[8 : 8 + length]), {}
    for name, t in header.items():
        if name != "__metadata__":
            a, b = t["data_offsets"]
            bits = np.frombuffer(raw[8 + length + a : 8 + length + b], np.uint16).astype(np.uint32) << 16
            out[name] = torch.from_numpy(bits.view(np.float32).reshape(t["shape"]).copy())
    return out


def main():
    model = Llama(CONFIG)
    missing, unexpected = model.load_state_dict(load(os.path.join(HERE, "model.safetensors")), strict=False)
    assert not unexpected and all("embed" in m or "head" in m or "cos" in m or "sin" in m for m in missing), (missing, unexpected)
    text = torch.frombuffer(bytearray(open(os.path.join(HERE, "calibration.txt"), "rb").read()), dtype=torch.uint8).long()
    weights = {k: p for k, p in model.named_parameters() if k.endswith("_proj.weight")}
    rows = {k: np.zeros(p.shape[0]) for k, p in weights.items()}
    columns = {k: np.zeros(p.shape[1]) for k, p in weights.items()}
    windows = [text[i : i + WINDOW] for i in range(0, len(text), WINDOW)]
    for window in windows:
        model.zero_grad()
        F.cross_entropy(model(window[None, :-1])[0].float(), window[1:]).backward()
        for k, p in weights.items():
            squared = p.grad.double().square()
            rows[k] += squared.sum(1).numpy()
            columns[k] += squared.sum(0).numpy()
    out = {}
    for k in weights:
        out[k + ".fisher_row"] = rows[k] / len(windows)
        out[k + ".fisher_col"] = columns[k] / len(windows)
    header, data = {"__metadata__": {"kind": "fisher", "windows": str(len(windows))}}, b""
    for k in sorted(out):
        raw = out[k].astype("<f4").tobytes()
        header[k] = {"dtype": "F32", "shape": [len(out[k])], "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    head = json.dumps(header, sort_keys=True).encode()
    head += b" " * (-len(head) % 8)
    with open(os.path.join(HERE, "fisher.safetensors"), "wb") as f:
        f.write(struct.pack("<Q", len(head)) + head + data)


if __name__ == "__main__":
    main()
