"""Train the embedded mini CLIPs (open_clip architecture, OpenAI weight names) on CIFAR-10 captions.

    python recipes/train_mini.py rn  --train train.parquet --test test.parquet --out DIR
    python recipes/train_mini.py vit --train train.parquet --test test.parquet --out DIR \\
           --teacher DIR/mini-rn.safetensors

`train.parquet` and `test.parquet` hold CIFAR-10 in the Hugging Face layout (`image{bytes,path}`, `label`).
Two towers, one contrastive loss: each step encodes one random caption per class and classifies every
image of the batch against them; with a teacher, part of the loss is the teacher's soft answer on the same
augmented (and, half of the time, mixed) pixels. CPU only, bfloat16 autocast; a checkpoint after each epoch
lets a rerun of the same command continue. This is the only file of the project that opens training images.
"""

import argparse
import io
import json
import math
import time
import types
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from safetensors.torch import load_file, save_file

from d4c_onnx.models.compact import pack_token_table, unpack_token_table

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)

NAMES = [
    ["airplane", "aeroplane", "plane", "jet"],
    ["automobile", "car"],
    ["bird"],
    ["cat"],
    ["deer"],
    ["dog"],
    ["frog"],
    ["horse"],
    ["ship", "boat"],
    ["truck", "lorry"],
]
TEMPLATES = [
    "a photo of a {}.",
    "a blurry photo of a {}.",
    "a black and white photo of a {}.",
    "a low contrast photo of a {}.",
    "a high contrast photo of a {}.",
    "a bad photo of a {}.",
    "a good photo of a {}.",
    "a photo of a small {}.",
    "a photo of a big {}.",
    "a photo of the {}.",
    "a blurry photo of the {}.",
    "a black and white photo of the {}.",
    "a low contrast photo of the {}.",
    "a high contrast photo of the {}.",
    "a bad photo of the {}.",
    "a good photo of the {}.",
    "a photo of the small {}.",
    "a photo of the big {}.",
    "an image of a {}.",
    "a {}.",
]

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 3}
VISION = {
    "rn": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 32, "head_width": 32},
    "vit": {"image_size": 48, "layers": 6, "width": 128, "head_width": 32, "patch_size": 8},
}


def plain_attention(self, query, key=None, value=None, need_weights=False, attn_mask=None, **_):
    """nn.MultiheadAttention as plain matmuls: torch's fused CPU attention spends three times as long going backward."""
    n, length, width = query.shape
    heads = self.num_heads
    qkv = F.linear(query, self.in_proj_weight, self.in_proj_bias).view(n, length, 3, heads, width // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, length, width / heads]
    scores = (q * (width // heads) ** -0.5) @ k.transpose(-1, -2)
    if attn_mask is not None:
        scores = scores + attn_mask
    mixed = scores.softmax(-1).to(v.dtype) @ v
    return self.out_proj(mixed.transpose(1, 2).reshape(n, length, width)), None


def build(kind: str, weights: str | None = None) -> CLIP:
    model = CLIP(**config(kind))
    if weights:
        model.load_state_dict({k: v.float() for k, v in unpack_token_table(load_file(weights)).items()})
    for module in model.modules():
        if isinstance(module, torch.nn.MultiheadAttention):
            module.forward = types.MethodType(plain_attention, module)
    if kind == "rn":
        model.visual.to(memory_format=torch.channels_last)
    return model


def config(kind: str) -> dict:
    return {"embed_dim": 128, "quick_gelu": True, "text_cfg": dict(TEXT), "vision_cfg": dict(VISION[kind])}


def read(path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images uint8 [N, 3, 32, 32] and labels int64 [N]."""
    table = pq.read_table(path)
    images = [np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in table["image"].to_pylist()]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(table["label"].to_pylist())


def resize_matrix(size: int) -> torch.Tensor:
    """The bicubic 32 -> size map as a matrix [size, 32]: two matmuls are far cheaper than interpolate in the loop."""
    eye = torch.eye(32).view(1, 1, 32, 32)
    return F.interpolate(eye, size=(size, 32), mode="bicubic", align_corners=False, antialias=True)[0, 0]


def to_input(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """float [B, 3, 32, 32] in 0..1 -> the tower's normalised pixels [B, 3, size, size]."""
    return ((matrix @ x @ matrix.T).clamp(0, 1) - MEAN) / STD


def augment(x: torch.Tensor) -> torch.Tensor:
    """Random crop (pad 4), flip, brightness, contrast, saturation and cutout on uint8 [B, 3, 32, 32]; float in 0..1."""
    b = x.shape[0]
    x = F.pad(x.float() / 255, (4, 4, 4, 4), mode="reflect")
    dx, dy = torch.randint(0, 9, (2, b))
    idx = torch.arange(32)
    x = x[torch.arange(b)[:, None, None], :, (dy[:, None] + idx)[:, :, None], (dx[:, None] + idx)[:, None, :]]
    x = x.permute(0, 3, 1, 2)
    flip = torch.rand(b) < 0.5
    x = torch.where(flip.view(-1, 1, 1, 1), x.flip(-1), x)
    gain, contrast, saturation = 1 + (torch.rand(3, b, 1, 1, 1) - 0.5) * 0.5
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * saturation + grey
    mean = x.mean((1, 2, 3), keepdim=True)
    x = ((x - mean) * contrast + mean) * gain
    cy, cx = torch.randint(0, 32, (2, b))
    ys, xs = torch.arange(32).view(1, 32, 1), torch.arange(32).view(1, 1, 32)
    hole = ((ys - cy.view(-1, 1, 1)).abs() < 5) & ((xs - cx.view(-1, 1, 1)).abs() < 5)
    return x.clamp(0, 1).masked_fill(hole.unsqueeze(1), 0.45)


@torch.no_grad()
def class_embeddings(model: CLIP, tokenizer: SimpleTokenizer) -> torch.Tensor:
    rows = [model.encode_text(tokenizer([t.format(n[0]) for t in TEMPLATES]), normalize=True).mean(0) for n in NAMES]
    return F.normalize(torch.stack(rows), dim=-1)


@torch.no_grad()
def accuracy(model: CLIP, x: torch.Tensor, y: torch.Tensor, tokenizer: SimpleTokenizer, matrix: torch.Tensor) -> float:
    model.eval()
    text = class_embeddings(model, tokenizer)
    hits = 0
    for i in range(0, len(x), 500):
        image = model.encode_image(to_input(x[i : i + 500].float() / 255, matrix), normalize=True)
        hits += int((image @ text.T).argmax(1).eq(y[i : i + 500]).sum())
    return hits / len(x)


def save_weights(model: CLIP, tokenizer: SimpleTokenizer, path: Path) -> None:
    """fp16 safetensors; rows of the token table that no caption uses are zero, and are not stored."""
    state = {
        k: v.detach().half() if v.is_floating_point() and "num_batches" not in k else v.detach()
        for k, v in model.state_dict().items()
        if "attn_mask" not in k
    }
    used = torch.zeros(TEXT["vocab_size"], dtype=torch.bool)
    used[torch.unique(tokenizer([t.format(m) for t in TEMPLATES for n in NAMES for m in n]))] = True
    state["token_embedding.weight"] = state["token_embedding.weight"] * used[:, None].half()
    save_file({k: v.contiguous() for k, v in pack_token_table(state).items()}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=sorted(VISION))
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--epochs", type=int, default=45)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--teacher")
    parser.add_argument("--init", help="start from these weights instead of a random initialisation")
    a = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    cfg = config(a.kind)
    model = build(a.kind, a.init)
    tokenizer = SimpleTokenizer(context_length=77)
    matrix = resize_matrix(cfg["vision_cfg"]["image_size"])
    teacher = build("rn", a.teacher).eval().requires_grad_(False) if a.teacher else None
    if teacher is not None:
        teacher_matrix, teacher_text = resize_matrix(VISION["rn"]["image_size"]), class_embeddings(teacher, tokenizer)
    x_train, y_train = read(a.train)
    x_test, y_test = read(a.test)

    decay = [q for n, q in model.named_parameters() if q.ndim > 1 and "embedding" not in n]
    rest = [q for n, q in model.named_parameters() if not (q.ndim > 1 and "embedding" not in n)]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=a.lr, betas=(0.9, 0.98))
    steps = a.epochs * (len(x_train) // a.batch)
    warm = max(steps // 12, 1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / warm) * (0.5 + 0.5 * math.cos(math.pi * min(1, s / steps)))
    )
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, first = out / f"train-{a.kind}.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        torch.set_rng_state(saved["rng"])
        first = saved["epoch"] + 1

    for epoch in range(first, a.epochs):
        model.train()
        start, total = time.time(), 0.0
        order = torch.randperm(len(x_train))
        for i in range(0, len(order) - a.batch + 1, a.batch):
            j = order[i : i + a.batch]
            raw, label = augment(x_train[j]), y_train[j]
            target = F.one_hot(label, len(NAMES)).float()
            if teacher is not None and torch.rand(()) < 0.5:
                mix = torch.distributions.Beta(0.8, 0.8).sample((a.batch, 1))
                raw = torch.lerp(raw.flip(0), raw, mix.view(-1, 1, 1, 1))
                target = torch.lerp(target.flip(0), target, mix)
            captions = tokenizer(
                [
                    TEMPLATES[int(torch.randint(len(TEMPLATES), ()))].format(n[int(torch.randint(len(n), ()))])
                    for n in NAMES
                ]
            )
            with torch.autocast("cpu", dtype=torch.bfloat16):
                image = model.encode_image(to_input(raw, matrix), normalize=True)
                text = model.encode_text(captions, normalize=True)
            logits = model.logit_scale.exp().clamp(max=100) * image.float() @ text.float().T
            loss = F.cross_entropy(logits, target, label_smoothing=0.05)
            if teacher is not None:
                with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                    seen = teacher.encode_image(to_input(raw, teacher_matrix), normalize=True)
                soft = F.softmax(teacher.logit_scale.exp() * seen.float() @ teacher_text.T / 2, 1)
                loss = 0.4 * loss + 0.6 * F.kl_div(F.log_softmax(logits / 2, 1), soft, reduction="batchmean") * 4
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            total += loss.item()
        last = epoch + 1 == a.epochs
        part = slice(None) if last else slice(2000)
        top1 = accuracy(model, x_test[part], y_test[part], tokenizer, matrix)
        message = f"{a.kind} epoch {epoch + 1}/{a.epochs} loss {total / (len(order) // a.batch):.3f} top1 {top1:.4f}"
        print(f"{message} scale {model.logit_scale.exp().item():.1f} {time.time() - start:.0f}s", flush=True)
        save_weights(model, tokenizer, out / f"mini-{a.kind}.safetensors")
        (out / f"mini-{a.kind}.json").write_text(json.dumps(cfg, indent=1))
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
        torch.save(state | {"scheduler": scheduler.state_dict(), "rng": torch.get_rng_state()}, checkpoint)


if __name__ == "__main__":
    main()
