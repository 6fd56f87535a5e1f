"""Discretization bottlenecks: what they compute, their gradients and limits, and that each of them can carry something."""


import pytest
import torch
from torch.nn import functional as F

from latent import bottleneck as bottlenecks
from latent.bottleneck import gumbel_softmax
from latent.latent_transformer import LatentTransformerConfig

KINDS = {
    "vq": {},
    "rq": {"codebook_levels": 3},
    "dvq": {"codebook_levels": 2},
    "gumbel": {},
    "gumbel_hard": {"gumbel_hard": True},
    "semhash": {},
}


def make(kind: str, **options):
    torch.manual_seed(0)
    config = LatentTransformerConfig(
        bottleneck=kind.split("_")[0], **({"latent_dim": 6, "codebook_size": 8} | KINDS[kind] | options)
    )
    bottleneck = bottlenecks.make(config).double()
    for quantizer in getattr(bottleneck, "quantizers", ()):
        quantizer.codebook.initialized.fill_(True)
    return bottleneck


@pytest.mark.parametrize("kind", KINDS)
def test_decode_gives_what_forward_gave(kind):
    """Guards sampling: in evaluation z_q is what its codes decode to, bit for bit, and 0 with code -1 where masked, twice alike."""
    bottleneck = make(kind).eval()
    z, mask = torch.randn(3, 5, 6, dtype=torch.float64), torch.arange(5) < torch.tensor([[5], [2], [0]])
    first, again = bottleneck(z, mask, 7), bottleneck(z, mask, 900)
    assert torch.equal(first.z_q, again.z_q) and torch.equal(first.z_q, bottleneck.decode(first.codes))
    assert first.codes.shape == (3, 5, KINDS[kind].get("codebook_levels", 1)) and first.codes.max() < 8
    assert torch.equal(first.codes[..., 0] >= 0, mask) and (first.z_q[~mask] == 0).all()
    assert torch.equal(bottleneck(z, None, 7).codes[mask], first.codes[mask])
    other = torch.where(mask[..., None], z, 100.0)  # what is masked must not count
    for name, loss in bottleneck(other, mask, 7).losses.items():
        assert torch.equal(loss, first.losses[name])
        assert torch.isclose(loss, bottleneck(z[mask], None, 7).losses[name])  # and not be averaged over
    many = bottleneck(torch.randn(300, 6, dtype=torch.float64))
    assert set(many.codes.unique().tolist()) == set(range(8)), "vacuous: code 0 must be among them, which is no padding"
    assert torch.equal(many.z_q, bottleneck.decode(many.codes))
    bottleneck.train()
    assert torch.equal(bottleneck(z, mask, 5000).codes, first.codes)  # whatever noise z_q has by then


def test_restarts_of_all_quantizers_count():
    """Guards code_restarts: slices have codebooks of their own."""
    bottleneck = make("dvq")
    for number, quantizer in enumerate(bottleneck.quantizers):
        quantizer.codebook.restarts += 1 + number
    assert bottleneck.restarts == 3 and make("semhash").restarts == make("gumbel").restarts == 0


@pytest.mark.parametrize("kind", ["vq", "rq", "dvq"])
def test_latents_pass_in_training_until_all_codebooks_are_made(kind):
    """
    Guards the start: before k-means, which waits until it is told, training passes z itself, 0 where masked, and pays no
    commitment, while evaluation uses codes. With slices that goes on until the last of them is ready; then both use codes.
    """
    bottleneck = make(kind).train()
    for quantizer in bottleneck.quantizers:
        quantizer.codebook.initialized.fill_(False)
    z, mask = torch.randn(3, 300, 6, dtype=torch.float64), torch.rand(3, 300) < 0.7
    for quantizer in bottleneck.quantizers:
        trained = bottleneck(z, mask)  # more latents than the 50 a code that k-means needs
        assert torch.equal(trained.z_q, torch.where(mask[..., None], z, 0.0)) and trained.losses["commitment"] == 0
        evaluated = bottleneck.eval()(z, mask)
        assert torch.equal(evaluated.z_q, bottleneck.decode(trained.codes)) and evaluated.losses["commitment"] > 0
        bottleneck.train().after_step(False)
        assert not bottleneck.ready
        quantizer.step()
    trained, evaluated = bottleneck(z, mask), bottleneck.eval()(z, mask)
    assert bottleneck.ready and torch.equal(trained.z_q, evaluated.z_q)
    assert trained.losses["commitment"] == evaluated.losses["commitment"] > 0
    if kind != "rq":  # one level: the distance of real latents, per channel, however many slices they are cut into
        assert torch.isclose(trained.losses["commitment"], (z - trained.z_q)[mask].square().mean())


@pytest.mark.parametrize("decay, steps", [(0.5, 100), (0.99, 100), (0.999, 1000)])
def test_codes_are_not_restarted_too_early(decay, steps):
    """Guards codebook_decay: searches for dead codes wait until the averages have forgotten what they began with."""
    assert make("dvq", codebook_decay=decay).quantizers[0].config.restart_steps == steps


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_gumbel_frequencies_are_those_of_softmax(temperature):
    """Guards the sign and the scale of the noise: the largest weight is a draw from softmax(logits); at temperature 1, too."""
    torch.manual_seed(1)
    logits = torch.tensor([2.0, 0.5, 0.0, -1.0, 1.0], dtype=torch.float64)
    count = 200_000
    drawn = gumbel_softmax(logits.expand(count, -1), temperature, 1.0).argmax(-1)
    p = logits.softmax(-1)
    error = (torch.bincount(drawn, minlength=5) / count - p) / (p * (1 - p) / count).sqrt()
    assert error.abs().max() < 4  # standard deviations


def test_gumbel_limits():
    """Guards the temperature: near 0 the weights are the one-hot argmax; without noise at 1 they are softmax itself."""
    torch.manual_seed(2)
    logits = torch.randn(50, 9, dtype=torch.float64)
    assert (gumbel_softmax(logits, 1e-4, 0.0) - F.one_hot(logits.argmax(-1), 9)).abs().max() < 1e-6
    assert (gumbel_softmax(logits, 1.0, 0.0) - logits.softmax(-1)).abs().max() < 1e-12
    torch.manual_seed(3)
    noisy = gumbel_softmax(logits, 1.0, 1.0).argmax(-1)
    torch.manual_seed(3)
    cold = gumbel_softmax(logits, 1e-4, 1.0)
    assert (cold.max(-1).values > 0.99).float().mean() > 0.95 and torch.equal(cold.argmax(-1), noisy)


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0])
def test_gumbel_gradients(noise):
    """Guards the relaxation: its gradients are finite differences of it, in float64, with the noise held fixed."""
    torch.manual_seed(4)
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def relaxed(logits):
        torch.manual_seed(5)
        return gumbel_softmax(logits, 0.7, noise)

    assert torch.autograd.gradcheck(relaxed, logits)


def test_whole_gumbel_bottleneck_has_the_right_gradients():
    """Guards the soft path from z through the mixture of codes, and the usage loss, by finite differences."""
    bottleneck = make("gumbel").train()
    z = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, True, False, True])

    def run(z, *parameters):
        torch.manual_seed(6)
        bottled = bottleneck(z, mask, 1000)
        return bottled.z_q, bottled.losses["usage"]

    assert torch.autograd.gradcheck(run, (z, *bottleneck.parameters()))


def test_hard_gumbel_is_one_code_with_the_soft_gradient():
    """Guards straight-through: forward exactly one code of the table, backward as if the mixture had been used."""
    hard, soft = make("gumbel_hard").train(), make("gumbel").train()
    z = torch.randn(7, 6, dtype=torch.float64)
    results, weight = [], torch.randn(7, 6, dtype=torch.float64)
    for bottleneck in (hard, soft):
        leaf = z.clone().requires_grad_(True)
        torch.manual_seed(8)
        z_q = bottleneck(leaf, None, 2000).z_q
        (z_q * weight).sum().backward()
        results.append((z_q, leaf.grad, bottleneck.directions.grad))
    assert torch.allclose(results[0][1], results[1][1]) and torch.allclose(results[0][2], results[1][2])
    distance = torch.cdist(results[0][0], hard.codes)
    assert (distance.min(-1).values < 1e-9).all() and not torch.allclose(results[0][0], results[1][0])


def test_gumbel_schedule():
    """Guards the schedules: 1.2 and no noise at first, the given ones at the end and for ever after, half way in between."""
    bottleneck = make("gumbel", gumbel_temperature=0.4, gumbel_noise=0.6, anneal_steps=100)
    for step, expected in ((0, (1.2, 0.0)), (50, (0.8, 0.3)), (100, (0.4, 0.6)), (5000, (0.4, 0.6))):
        assert [round(float(v), 6) for v in bottleneck.schedule(torch.tensor(step))] == list(expected)


@pytest.mark.parametrize("step", [0, 700, 5000])
def test_gumbel_trains_at_the_temperature_of_its_step(step):
    """Guards the use of the schedules: in training z_q is the mixture at the temperature and the noise of the step it is told."""
    bottleneck, z = make("gumbel").train(), torch.randn(20, 6, dtype=torch.float64)
    torch.manual_seed(1)
    z_q = bottleneck(z, None, torch.tensor(step)).z_q
    torch.manual_seed(1)
    w = gumbel_softmax(z @ bottleneck.directions.T, *bottleneck.schedule(step))
    assert (z_q - w @ bottleneck.codes).abs().max() < 1e-12


def test_gumbel_usage_loss():
    """Guards its meaning: log K if one code takes all, 0 if all are used alike."""
    bottleneck = make("gumbel").eval()
    with torch.no_grad():
        bottleneck.directions.copy_(torch.eye(8, 6) * 100)
    one = torch.zeros(5, 6, dtype=torch.float64)
    assert bottleneck(one).losses["usage"].abs() < 1e-12  # all logits equal
    assert bottleneck(one, torch.zeros(5, dtype=torch.bool)).losses["usage"] == 0  # nothing is real, and no NaN
    one[:, 2] = 1.0
    assert abs(bottleneck(one).losses["usage"].item() - torch.log(torch.tensor(8.0)).item()) < 1e-6


def test_hashing_bits():
    """Guards the packing: every code has bits of its own, and code k is where the logits have the signs of the bits of k."""
    bottleneck = make("semhash").eval()
    codes = torch.arange(8)[:, None]
    assert torch.unique(bottleneck.decode(codes), dim=0).shape[0] == 8
    signs = torch.tensor([[1.0 if k >> i & 1 else -1.0 for i in range(3)] for k in range(8)], dtype=torch.float64)
    z = signs @ torch.linalg.pinv(bottleneck.directions).T
    assert torch.equal(bottleneck(z).codes, codes)


def test_hashing_in_training():
    """
    Guards the noise, the mix and the gradient: bits are drawn as a Gaussian of deviation 0.5 decides, half of the latents, whole
    ones, pass a sigmoid that reaches 0 and 1, and the threshold of the others has the gradient of that sigmoid.
    """
    bottleneck = make("semhash").train()
    to_z, to_bits = torch.linalg.pinv(bottleneck.directions).T, torch.linalg.pinv(bottleneck.codes)

    def bits(logits):
        return (bottleneck(logits @ to_z).z_q @ to_bits + 1) / 2

    logits = torch.tensor([0.2, -0.1, 0.0], dtype=torch.float64).expand(40_000, 3).clone().requires_grad_()
    found = bits(logits)
    found.sum().backward()
    whole = (found - found.round()).abs() < 1e-9
    hard = whole.all(-1)
    assert (whole.any(-1) & ~hard).sum() < 10 and abs(hard.double().mean() - 0.5) < 0.01
    for some in (hard, ~hard):
        assert ((found[some] > 0.5).double().mean(0) - torch.special.ndtr(logits[0] / 0.5)).abs().max() < 0.015
    assert (logits.grad[hard].mean(0) / logits.grad[~hard].mean(0) - 1).abs().max() < 0.02
    far = torch.randn_like(logits).sign() * 6
    assert (bits(far) - (far > 0).double()).abs().max() < 1e-9


def test_slices_of_dvq_are_quantized_apart():
    """Guards decomposition: another value in one slice moves the code of that slice alone."""
    bottleneck = make("dvq").eval()
    z = torch.randn(40, 6, dtype=torch.float64)
    other = z.clone()
    other[:, :3] = -other[:, :3]
    a, b = bottleneck(z).codes, bottleneck(other).codes
    assert torch.equal(a[:, 1], b[:, 1]) and (a[:, 0] != b[:, 0]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_every_bottleneck_carries_a_message(kind):
    """Guards learning: 8 different inputs are told apart behind every bottleneck, in evaluation, after some hundred steps."""
    torch.manual_seed(9)
    bottleneck = make(kind, codebook_size=16, latent_dim=8 if kind != "rq" else 6, anneal_steps=100, codebook_decay=0.9).float()
    width = bottleneck.decode(torch.zeros(1, KINDS[kind].get("codebook_levels", 1), dtype=torch.int64)).size(-1)
    encoder, decoder = torch.nn.Embedding(8, width), torch.nn.Linear(width, 8)
    norm = torch.nn.LayerNorm(width, elementwise_affine=False)
    parameters = [*encoder.parameters(), *decoder.parameters(), *bottleneck.parameters()]
    optimizer, inputs = torch.optim.Adam(parameters, lr=0.02), torch.arange(8).repeat(8)
    for step in range(250):
        bottled = bottleneck(norm(encoder(inputs)), None, torch.tensor(step))
        loss = F.cross_entropy(decoder(bottled.z_q), inputs)
        loss = loss + sum(weight * bottled.losses[name] for name, weight in bottleneck.loss_weights.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bottleneck.after_step(True)
    bottleneck.eval()
    bottled = bottleneck(norm(encoder(inputs[:8])))
    assert torch.unique(bottled.codes, dim=0).shape[0] == 8
    assert F.cross_entropy(decoder(bottled.z_q), inputs[:8]) < 0.05


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bottleneck": "gumbel", "codebook_levels": 2}, "bottleneck=gumbel has one level"),
        ({"bottleneck": "dvq", "codebook_levels": 3}, "latent_dim=64 cannot be cut into codebook_levels=3"),
        ({"bottleneck": "semhash", "codebook_size": 12}, "choose a power of two"),
        ({"bottleneck": "semhash", "codebook_size": 1}, "codebook_size=1: bottleneck=semhash has"),
        ({"gumbel_temperature": 0.0}, "gumbel_temperature=0.0"),
        ({"gumbel_noise": -1.0}, "gumbel_noise=-1.0 must not be negative"),
        ({"anneal_steps": 0}, "anneal_steps=0: at least 1"),
        ({"codebook_decay": 1.0}, "codebook_decay=1.0"),
    ],
)
def test_settings_that_cannot_work(options, message):
    """Guards clear lines: each names the key, its value and what is allowed."""
    with pytest.raises(ValueError, match=message):
        LatentTransformerConfig(**options)
