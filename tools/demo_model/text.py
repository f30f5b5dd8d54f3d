"""Stage `text`: the tokenizer, and a text encoder that knows which colour word is the shape's.

With stock initialisation a small UMT5 stays blind to word order, and the transformer then never learns which colour is
the shape's. Wide position biases and sharp attention, and a few minutes alone on labels, cure that.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from .runs import Run, set_rate
from .scenes import COLORS, MOTIONS, SHAPES, VOCABULARY, Scene, caption, sample_scene

WIDTH = 128
RATE = 2e-3
BATCH = 96
LABELS = {"color": COLORS, "background": COLORS, "shape": SHAPES, "motion": MOTIONS}
SPECIAL = ("<pad>", "</s>", "<unk>")
CONFIG: dict[str, Any] = {
    "vocab_size": len(SPECIAL) + len(VOCABULARY),
    "d_model": WIDTH,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 32,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "is_encoder_decoder": False,
    "use_cache": False,
}


def new_tokenizer() -> PreTrainedTokenizerFast:
    """One word, one token; lower case, punctuation apart, `</s>` at the end."""
    words = {word: i for i, word in enumerate(SPECIAL + VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def new_text_encoder() -> UMT5EncoderModel:
    """Builds the encoder with position biases wide enough to tell neighbours apart from the first step."""
    encoder = UMT5EncoderModel(UMT5Config(**CONFIG))
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "relative_attention_bias" in name:
                parameter.normal_(0, 1.5)
            elif name.endswith(("SelfAttention.q.weight", "SelfAttention.k.weight")):
                parameter.mul_(2)
    return encoder


class Readout(nn.Module):
    """Reads labels off the `</s>` state and the role, shape's or background's, off every colour word."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, len(values)) for name, values in LABELS.items()})
        self.role = nn.Linear(WIDTH, 2)

    def forward(self, states: Tensor, mask: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Takes states [B, L, D] and mask [B, L]; gives label logits [B, K] by name and role logits [B, L, 2]."""
        last = states[torch.arange(len(states)), mask.sum(1) - 1]
        return {name: head(last) for name, head in self.heads.items()}, self.role(states)


def label_targets(scenes: Sequence[Scene], name: str) -> Tensor:
    """Class indices [B]; an image has no motion to learn."""
    values = LABELS[name]
    return torch.tensor(
        [-100 if name == "motion" and scene.image else values.index(getattr(scene, name)) for scene in scenes]
    )


def role_targets(scenes: Sequence[Scene], ids: Tensor, words: dict[str, int]) -> Tensor:
    """0 at the shape's colour word, 1 at the background's, -100 elsewhere: [B, L]."""
    roles = torch.full_like(ids, -100)
    for row, scene in enumerate(scenes):
        roles[row][ids[row] == words[scene.color]] = 0
        roles[row][ids[row] == words[scene.background]] = 1
    return roles


def draw_scenes(rng: random.Random, count: int, held_out: bool) -> list[Scene]:
    """A fifth of the scenes are images."""
    return [sample_scene(rng, image=rng.random() < 0.2, held_out=held_out) for _ in range(count)]


@torch.no_grad()
def label_accuracy(encoder: UMT5EncoderModel, readout: Readout, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Accuracy of each label over 400 held-out scenes."""
    rng = random.Random(9)
    scenes = draw_scenes(rng, 400, held_out=True)
    tokens = tokenizer([caption(scene, rng) for scene in scenes], padding=True, return_tensors="pt")
    logits, _ = readout(encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state, tokens.attention_mask)
    scores = {}
    for name, guess in logits.items():
        truth = label_targets(scenes, name)
        scores[name] = (guess.argmax(1) == truth)[truth >= 0].float().mean().item()
    return scores


def train_text_encoder(run: Run, steps: int) -> Path:
    """Trains the encoder alone for `steps` steps; writes `text_encoder` and `tokenizer`."""
    torch.manual_seed(run.seed)
    tokenizer, encoder, readout = new_tokenizer(), new_text_encoder(), Readout()
    words = tokenizer.get_vocab()
    parameters = [*encoder.parameters(), *readout.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.98), fused=True)
    for step in range(steps):
        set_rate(optimizer, RATE * min(1, (step + 1) / 50) * max(0.05, 1 - step / steps))
        rng = run.own_rng("text", step)
        scenes = draw_scenes(rng, BATCH, held_out=False)
        tokens = tokenizer([caption(scene, rng) for scene in scenes], padding=True, return_tensors="pt")
        states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        logits, roles = readout(states, tokens.attention_mask)
        truth = role_targets(scenes, tokens.input_ids, words)
        loss = 2 * F.cross_entropy(roles.flatten(0, 1), truth.flatten(), ignore_index=-100)
        loss += sum(F.cross_entropy(logits[name], label_targets(scenes, name)) for name in LABELS)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 250 == 0 or step + 1 == steps:
            scores = {name: round(score, 3) for name, score in label_accuracy(encoder, readout, tokenizer).items()}
            run.log(f"text {step + 1} loss {loss.item():.3f} {scores}")
    tokenizer.save_pretrained(run.folder("tokenizer"))
    encoder.save_pretrained(run.folder("text_encoder"))
    return run.folder("text_encoder")
