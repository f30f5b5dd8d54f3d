"""UMT5 against transformers, and the cleaning and cutting of prompts against the diffusers pipeline."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sgld.errors import ModelError
from sgld.models.text import PromptEncoder, clean, distance_buckets, load_tokenizer


@pytest.fixture(scope="module")
def encoder(twins: Path) -> PromptEncoder:
    folder = twins / "wan21"
    return PromptEncoder.load(folder / "tokenizer", folder / "text_encoder", torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("text", ["a  b\n c ", "&amp;amp; &lt;b&gt;", "schÃ¶n", "“quotes” …", ""])
def test_prompts_are_cleaned_as_diffusers_cleans_them(text: str) -> None:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    assert clean(text) == prompt_clean(text)


@pytest.mark.parametrize("prompt", ["", "red", "a red cat over the green ball", "cat " * 40])
def test_encoder_equals_transformers(encoder: PromptEncoder, twins: Path, prompt: str) -> None:
    """Also beyond the largest distance bucket, and though we do not pad."""
    from transformers import AutoTokenizer, UMT5EncoderModel

    theirs = UMT5EncoderModel.from_pretrained(twins / "wan21" / "text_encoder", dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(twins / "wan21" / "tokenizer")(
        prompt, padding="max_length", max_length=64, truncation=True, return_tensors="pt"
    )
    with torch.inference_mode():
        expected = theirs(tokens.input_ids, tokens.attention_mask).last_hidden_state
        ours, note = encoder.encode(prompt, 64)
    n = int(tokens.attention_mask.sum())
    assert note is None
    assert ours.shape[1] == n
    assert (ours - expected[:, :n]).abs().max() < 1e-5


def test_half_precision_as_with_transformers(twins: Path, tmp_path: Path) -> None:
    """The last layer of each block adds up numbers that fp16 cannot hold: it stays in float32."""
    from transformers import UMT5EncoderModel

    folder = Path(shutil.copytree(twins / "wan21" / "text_encoder", tmp_path / "text_encoder"))
    tensors = load_file(folder / "model.safetensors")
    large = {name: x * 2**18 for name, x in tensors.items() if name.endswith("DenseReluDense.wo.weight")}
    save_file(tensors | large, folder / "model.safetensors", {"format": "pt"})
    encoder = PromptEncoder.load(twins / "wan21" / "tokenizer", folder, torch.float16, torch.device("cpu"))
    tokens = encoder.tokenizer.encode("a red cat over the green ball").ids
    with torch.inference_mode():
        found, _ = encoder.encode("a red cat over the green ball", 64)
        half, whole = (
            UMT5EncoderModel.from_pretrained(folder, dtype=dtype)(torch.tensor([tokens])).last_hidden_state
            for dtype in (torch.float16, torch.float32)
        )
    assert found.dtype == half.dtype == torch.float16
    assert (found - whole).abs().max() < 2 * (half - whole).abs().max() < 0.1 * whole.abs().max()


def test_a_long_prompt_is_cut_with_a_warning(encoder: PromptEncoder) -> None:
    with torch.inference_mode():
        cut, note = encoder.encode("cat dog " * 10, 8)
        short, _ = encoder.encode("cat dog cat dog cat dog cat", 8)
    assert note == "prompt cut from 21 to 8 tokens, the most this request allows"
    assert torch.equal(cut, short)


def test_distance_buckets_equal_transformers() -> None:
    from transformers.models.umt5.modeling_umt5 import UMT5Attention, UMT5Config

    theirs = UMT5Attention(UMT5Config(), has_relative_attention_bias=True)
    distance = torch.arange(-600, 600)
    assert torch.equal(distance_buckets(distance, 32, 128), theirs._relative_position_bucket(distance))


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    with pytest.raises(ModelError, match="no such file"):
        load_tokenizer(file)
    file.write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer\.json: cannot be read"):
        load_tokenizer(file)
