"""Two steps of every training stage, and the training forward pass against diffusers' own."""

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from demo_model import autoencoder, bank, compress, fastpass, text, transformer
from demo_model.assemble import assemble, weigh
from demo_model.runs import Run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def test_the_training_pass_gives_what_diffusers_gives() -> None:
    torch.manual_seed(0)
    model = transformer.new_transformer()
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    x, t, states = (
        torch.randn(2, compress.CHANNELS, 3, 12, 12),
        torch.tensor([100.0, 900.0]),
        torch.randn(2, 9, text.WIDTH),
    )
    with torch.no_grad():
        ours = fastpass.velocity(model, x, t, states, torch.zeros(2, 1, 1, 9))
        theirs = model(x, t, states, return_dict=False)[0]
        other = model(x.flip(-1), t, states, return_dict=False)[0]
    assert (ours - theirs).abs().mean() < 0.02 * theirs.std()
    assert (other - theirs).abs().mean() > 0.2 * theirs.std()


def test_a_weighed_pad_stands_for_all_that_the_pipeline_pads_with() -> None:
    torch.manual_seed(0)
    model = transformer.new_transformer()
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    for block in model.blocks:
        torch.nn.init.normal_(block.attn2.to_v.bias)  # so that zeros weigh in
    x, t, words = torch.randn(1, compress.CHANNELS, 1, 12, 12), torch.tensor([500.0]), torch.randn(1, 6, text.WIDTH)
    padded = torch.cat([words, torch.zeros(1, 506, text.WIDTH)], 1)
    bias = torch.tensor([0.0] * 6 + [506.0]).clamp(min=1).log()[None, None, None]
    bias[..., :6] = 0
    with torch.no_grad():
        theirs = model(x, t, padded, return_dict=False)[0]
        ours = fastpass.velocity(model, x, t, padded[:, :7], bias)
        unweighed = fastpass.velocity(model, x, t, padded[:, :7], torch.zeros_like(bias))
    assert (ours - theirs).abs().mean() < 0.02 * theirs.std()
    assert (unweighed - theirs).abs().mean() > (ours - theirs).abs().mean() * 2


def test_compression_keeps_what_lies_on_the_kept_axes() -> None:
    torch.manual_seed(0)
    vae = autoencoder.new_autoencoder().eval()
    with torch.no_grad():
        vae.post_quant_conv.bias.normal_()
        pixels = torch.rand(1, 3, 5, 48, 48) * 2 - 1
        z = vae.encode(pixels).latent_dist.mode()
        whole = compress.through(vae.post_quant_conv, z)
        same = compress.compress(vae, compress.principal_axes(whole, 16)).eval()
        axes = compress.principal_axes(whole, 5)
        small = compress.compress(vae, axes).eval()
        latents = small.encode(pixels).latent_dist.mode()
        assert torch.allclose(latents, torch.einsum("ck,ncthw->nkthw", axes, whole), atol=1e-4)
        rebuilt = same.decode(same.encode(pixels).latent_dist.mode()).sample
        assert torch.allclose(rebuilt, vae.decode(z).sample, atol=1e-4)
    covariance = torch.cov(latents.transpose(0, 1).flatten(1))
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-3 * covariance.max()


def test_every_stage_takes_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoencoder, "psnr", lambda vae: (0.0, 0.0))
    monkeypatch.setattr(autoencoder, "LONG_MIXES", (autoencoder.Mix(1, 1, 5, 48),))
    monkeypatch.setattr(autoencoder, "SHORT_STEPS", 0)
    buckets = (transformer.Bucket(0.5, 2, 2), transformer.Bucket(0.5, 2, None))
    monkeypatch.setattr(transformer, "BUCKETS", buckets)
    run = Run(tmp_path, 0)
    text.train_text_encoder(run, 2)
    autoencoder.train_autoencoder(run, 2)
    bank.make_bank(run, 8, 8)
    bank.join_bank(tmp_path, 1)
    latents = bank.load_bank(tmp_path)["clips"][1]
    assert latents.shape == (8, compress.CHANNELS, 5, 12, 12)
    assert latents.float().std((0, 2, 3, 4)).max() < 1.05
    transformer.train_transformer(run, 2, polish=1)
    sizes = weigh(assemble(run))
    assert set(sizes) == {"text_encoder", "transformer", "vae"}
    assert sum(sizes.values()) < 12_000_000


def test_batches_depend_on_seed_step_and_worker_alone(tmp_path: Path) -> None:
    mix = autoencoder.Mix(1, 2, 1, 48)

    def batch(seed: int, step: int, rank: int) -> torch.Tensor:
        return autoencoder.draw_batch(mix, Run(tmp_path, seed, rank, 2).own_rng("vae", step))

    assert torch.equal(batch(0, 1, 0), batch(0, 1, 0))
    for other in (batch(1, 1, 0), batch(0, 2, 0), batch(0, 1, 1)):
        assert not torch.equal(batch(0, 1, 0), other)


def test_captions_fit_the_text_length() -> None:
    tokenizer, rng = text.new_tokenizer(), random.Random(0)
    from demo_model.scenes import caption, sample_scene

    captions = [caption(sample_scene(rng, image=i % 2 == 0, held_out=None), rng) for i in range(300)]
    tokens = tokenizer(captions).input_ids
    assert max(map(len, tokens)) < transformer.MAX_WORDS
    assert tokenizer.unk_token_id not in {token for row in tokens for token in row}
