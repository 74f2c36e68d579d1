from __future__ import annotations

import pytest
import torch

import deepemd
from deepemd.examples import colour_transfer
from deepemd.examples.autoencoder import reconstruction_emd, train_autoencoder
from deepemd.examples.clouds import digit_clouds, photo_colours
from deepemd.examples.vae import train_vae


def test_digit_clouds_lie_in_the_inked_pixels_and_sets_do_not_overlap() -> None:
    clouds, labels = digit_clouds(32, 10, seed=1)
    again, _ = digit_clouds(32, 10, seed=1)
    assert clouds.equal(again)
    assert clouds.shape == (10, 32, 2)
    assert labels.shape == (10,)
    assert float(clouds.abs().max()) <= 1
    train, test = digit_clouds(8, 1700, seed=0), digit_clouds(8, seed=0, offset=1700)
    assert len(train[0]) + len(test[0]) == 1797


def test_autoencoders_start_alike_and_learn_under_any_loss() -> None:
    clouds, _ = digit_clouds(24, 64)
    start = train_autoencoder(clouds, deepemd.emd_loss, steps=0)
    before = float(reconstruction_emd(start, clouds).mean())
    for method in ("exact", "chamfer"):
        loss = deepemd.EMDLoss(method=method)
        model = train_autoencoder(clouds, loss, steps=60)
        assert float(reconstruction_emd(model, clouds).mean()) < 0.7 * before


def test_vae_learns_and_samples() -> None:
    clouds, _ = digit_clouds(16, 32)
    vae = train_vae(clouds, deepemd.EMDLoss(method="exact"), steps=40, warmup=10)
    reconstruction, kl = vae(clouds)
    assert reconstruction.shape == clouds.shape
    assert bool((kl >= 0).all())
    assert float(deepemd.emd_loss(reconstruction.detach(), clouds)) < 0.6
    generator = torch.Generator().manual_seed(0)
    assert vae.sample(3, generator).shape == (3, 16, 2)


def test_colour_transfer_gives_the_target_s_palette() -> None:
    source, target = photo_colours(n_points=60), photo_colours("flower.jpg", 60)
    recoloured, distance = colour_transfer.transfer(source, target)
    assert recoloured.sort(0).values.equal(target.sort(0).values)
    assert distance == pytest.approx(float(deepemd.emd(source, target)))
    with pytest.raises(ValueError, match="gives no matching"):
        colour_transfer.transfer(source, target, method="sliced")


def test_colour_transfer_prints_both_methods(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    colours = photo_colours

    def few(name: str, seed: int = 0) -> torch.Tensor:
        return colours(name, 40, seed=seed)

    monkeypatch.setattr("deepemd.examples.clouds.photo_colours", few)
    colour_transfer.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("exact: EMD 0.")
