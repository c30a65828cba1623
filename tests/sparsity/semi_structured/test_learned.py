"""Learned masks: trained and frozen parts, noise, schedules and exact resumption."""

from __future__ import annotations

import copy
import hashlib
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from widekernel.errors import ArgumentError, CheckpointError
from widekernel.sparsity import semi_structured as ss
from widekernel.sparsity.semi_structured.learned import gumbel_mask, kept_share
from widekernel.sparsity.semi_structured.masks import magnitude_choices
from widekernel.sparsity.semi_structured.noise import gumbel, uniform
from widekernel.sparsity.semi_structured.patterns import PATTERNS


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 10),
    )


def config(**changes: object) -> ss.SemiStructuredConfig:
    return ss.SemiStructuredConfig(**{"method": "learned", "total_steps": 10, **changes})  # type: ignore[arg-type]


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 3, 6, 6, generator=generator), torch.randint(0, 10, (8,), generator=generator)


def train(model: nn.Module, controller: ss.SemiStructured, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        x, y = data(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model.train()(x), y) + controller.regularization()
        loss.backward()
        optimizer.step()
        controller.step()
        losses.append(float(loss.detach()))
    return losses


def digest(model: nn.Module, skip: str = "logits") -> str:
    state = {key: value for key, value in model.state_dict().items() if skip not in key}
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()


def test_only_logits_are_trained() -> None:
    """Weights, biases and batch norms (and their statistics, in training mode) have the same bytes after training."""
    model = network()
    controller = ss.prepare(model, config())
    before, logits = digest(model), [one.detach().clone() for one in controller.parameters()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(one) for one in trainable} == {id(one) for one in controller.parameters()} and len(trainable) == 2
    train(model, controller, torch.optim.AdamW(model.parameters(), 0.5, weight_decay=0.0), range(6))
    assert digest(model) == before
    assert all(bool((now != old).any()) for now, old in zip(controller.parameters(), logits))
    assert controller.steps == 6


def test_learning_lowers_the_loss() -> None:
    model = network()
    controller = ss.prepare(model, config(total_steps=60, entropy_penalty=0.0, min_in_channels=3))
    optimizer = torch.optim.Adam(controller.parameters(), 0.3)
    start, choices = F.cross_entropy(model.eval()(data(0)[0]), data(0)[1]), controller.choices
    for _ in range(60):
        train(model, controller, optimizer, range(1))
    assert F.cross_entropy(model.eval()(data(0)[0]), data(0)[1]) < start - 0.05
    assert any(not torch.equal(choices[name], now) for name, now in controller.choices.items())


def test_norms_are_updated_if_configured() -> None:
    model = network()
    controller = ss.prepare(model, config(freeze_norms=False))
    before = digest(model)
    train(model, controller, torch.optim.SGD(controller.parameters(), 0.1), range(1))
    assert digest(model) != before


def test_evaluation_uses_the_most_probable_mask_without_noise() -> None:
    model = network()
    controller = ss.prepare(model, config(prior_strength=0.5))
    x, _ = data(0)
    assert not torch.equal(model.train()(x), model.eval()(x))
    first = model.eval()(x)
    controller.step()
    assert torch.equal(first, model(x)), "bit for bit, at any step"
    layer = model[3]
    mask = controller.masks["3.weight"]
    assert torch.equal(layer.weight != 0, mask) and not torch.signbit(layer.weight[~mask]).any()
    assert ss.validate(model) == ("3.weight", "8.weight")


def test_a_network_prepared_in_evaluation_mode_stays_there() -> None:
    model = network().eval()
    ss.prepare(model, config())
    assert not any(module.training for module in model.modules())


def test_training_masks_are_semi_structured_and_change_with_the_step_only() -> None:
    model = network().train()
    controller = ss.prepare(model, config(prior_strength=0.0))
    first = model[3].weight.detach().clone()
    ss.validate(first)
    assert torch.equal(model[3].weight, first), "accumulation and recomputation see one mask"
    controller.step()
    assert not torch.equal(model[3].weight, first)


def test_noise_uses_no_generator() -> None:
    """Drawing noise neither reads nor advances the global generator."""
    model = network().train()
    ss.prepare(model, config())
    torch.manual_seed(1)
    first = model[3].weight.detach().clone()
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(model[3].weight, first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_is_a_function_of_seed_step_and_name() -> None:
    base = gumbel((100, 6), 0, 3, "a.weight")
    assert torch.equal(base, gumbel((100, 6), 0, 3, "a.weight"))
    for other in [(1, 3, "a.weight"), (0, 4, "a.weight"), (0, 3, "b.weight")]:
        assert not torch.isclose(base, gumbel((100, 6), *other)).any(1).all()
        assert abs(float(torch.corrcoef(torch.stack([base.flatten(), gumbel((100, 6), *other).flatten()]))[0, 1])) < 0.15
    assert torch.equal(base[:10], gumbel((10, 6), 0, 3, "a.weight")), "a counter, not a stream"


def test_noise_is_gumbel() -> None:
    numbers = uniform((200_000,), 7, 0, "x")
    assert float(numbers.min()) > 0 and float(numbers.max()) < 1
    counts = torch.histc(numbers, 50, 0, 1)
    assert float(((counts - 4000) ** 2 / 4000).sum()) < 90, "chi-squared with 49 degrees of freedom, p about 0.0003"
    noise = gumbel((200_000,), 7, 0, "x")
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01) and noise.isfinite().all()
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.03)


def test_draws_follow_the_logits() -> None:
    """The share of each pattern among many draws is softmax(kappa · logits), at every temperature."""
    logits = torch.tensor([[0.0, 1.0, -1.0, 0.5, 2.0, 0.0]]).repeat(50_000, 1)
    for tau in (4.0, 0.05):
        drawn = gumbel_mask(logits, gumbel(logits.shape, 0, 0, "x"), tau, 2.0)
        table = torch.tensor(PATTERNS).float()
        shares = (drawn.unsqueeze(1) == table).all(2).float().mean(0)
        torch.testing.assert_close(shares, torch.softmax(2.0 * logits[0], 0), atol=0.01, rtol=0)


def test_the_gradient_is_that_of_the_soft_mask() -> None:
    """It is compared with hard - soft.detach() + soft, as published, in double precision."""
    logits = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    noise, out = torch.randn(20, 6, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64)
    mask = gumbel_mask(logits, noise, 0.7, 1.3)
    (ours,) = torch.autograd.grad(mask, logits, out)
    soft = torch.softmax((1.3 * logits + noise) / 0.7, 1)
    hard = F.one_hot(soft.argmax(1), 6).double()
    reference = (hard - soft.detach() + soft) @ torch.tensor(PATTERNS, dtype=torch.float64)
    (theirs,) = torch.autograd.grad(reference, logits, out)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(mask, reference)


def test_padding_is_never_chosen_over_a_real_weight() -> None:
    model = nn.Sequential(nn.Conv2d(19, 8, 3)).train()
    controller = ss.prepare(model, config(prior_strength=0.0))
    for _ in range(5):
        kept = (model[0].weight != 0).sum(1)
        assert torch.equal(kept, torch.full((8, 3, 3), 10)), "8 of 16 channels and 2 of 3"
        controller.step()
    controller.regularization().backward()
    assert all(bool(one.grad.isfinite().all()) for one in controller.parameters())


def test_the_prior_prefers_the_magnitude_mask() -> None:
    model = network()
    magnitude = magnitude_choices(model[3].weight)
    controller = ss.prepare(model, config(prior_strength=2.0))
    assert torch.equal(controller.choices["3.weight"], magnitude)
    logits = controller.parameters()[0]
    assert sorted(set(logits.flatten().tolist())) == [0.0, 1.0, 2.0]
    assert int((logits == 2).sum()) == logits.shape[0]


def test_report_follows_the_masks() -> None:
    model = network()
    before = copy.deepcopy(model[3].weight.detach())
    controller = ss.prepare(model, config())
    row = next(row for row in controller.report if row.name == "3")
    assert row.kept == pytest.approx(kept_share(before, magnitude_choices(before), "channels"))
    with torch.no_grad():
        controller.parameters()[0].copy_(torch.randn_like(controller.parameters()[0]))
    now = next(row for row in controller.report if row.name == "3")
    assert now.kept == pytest.approx(kept_share(before, controller.choices["3.weight"], "channels")) and now.kept < row.kept


def test_schedules() -> None:
    controller = ss.prepare(
        network(), config(tau_start=4.0, tau_end=0.25, kappa_start=100.0, kappa_end=500.0, total_steps=4)
    )
    seen = []
    for _ in range(6):
        seen.append((controller.tau, controller.kappa))
        controller.step()
    assert [tau for tau, _ in seen] == pytest.approx([4, 2, 1, 0.5, 0.25, 0.25])
    assert [kappa for _, kappa in seen] == [100, 200, 300, 400, 500, 500]
    default = ss.SemiStructuredConfig()
    assert (default.kappa_start, default.kappa_end, default.weight_regularization) == (1, 1, 0), "see the patent note"


def test_entropy() -> None:
    controller = ss.prepare(network(), config(prior_strength=0.0))
    assert controller.entropy() == pytest.approx(math.log(6), abs=1e-5)
    with torch.no_grad():
        for logits in controller.parameters():
            logits[:, 2] = 100
    assert controller.entropy() == pytest.approx(0, abs=1e-6)


def test_flip_rate_is_since_the_last_call() -> None:
    controller = ss.prepare(network(), config())
    assert controller.flip_rate() == 0
    logits = controller.parameters()
    with torch.no_grad():
        half = logits[0].shape[0] // 2
        moved = (controller.choices["3.weight"][:half].long() + 1) % 6
        logits[0][torch.arange(half), moved] = 50
    total = sum(one.shape[0] for one in logits)
    assert controller.flip_rate() == pytest.approx(half / total)
    assert controller.flip_rate() == 0


def test_regularization() -> None:
    """Entropy is added, and the squared norm of the kept weights is subtracted."""
    model = network().train()
    controller = ss.prepare(model, config(entropy_penalty=0.5, weight_regularization=0.1))
    kept = sum(float(model[i].weight.detach().square().sum()) for i in (3, 8))
    assert float(controller.regularization().detach()) == pytest.approx(0.5 * controller.entropy() - 0.1 * kept, rel=1e-4)
    controller.regularization().backward()
    assert all(bool(logits.grad.any()) for logits in controller.parameters())


def test_regularization_can_be_off() -> None:
    controller = ss.prepare(network(), config(entropy_penalty=0.0))
    assert float(controller.regularization()) == 0


def test_resumed_learning_is_bit_identical() -> None:
    """Resumed after any step, losses, logits and flip rates are the same, whatever the state of the global generator."""
    initial = network().state_dict()

    def start() -> tuple[nn.Module, ss.SemiStructured, torch.optim.Optimizer]:
        model = network()
        model.load_state_dict(initial)
        controller = ss.prepare(model, config())
        return model, controller, torch.optim.Adam(controller.parameters(), 0.2)

    model, controller, optimizer = start()
    expected, states = [], []
    for step in range(6):
        states.append(copy.deepcopy((model.state_dict(), controller.state_dict(), optimizer.state_dict())))
        expected += train(model, controller, optimizer, range(step, step + 1))
    rate = controller.flip_rate()
    for cut, state in enumerate(states):
        torch.manual_seed(cut)
        torch.randn(cut)
        other, resumed, again = start()
        other.load_state_dict(state[0])
        resumed.load_state_dict(state[1])
        again.load_state_dict(state[2])
        assert train(other, resumed, again, range(cut, 6)) == expected[cut:]
        assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), controller.parameters()))
        assert resumed.flip_rate() == rate


def same_controllers(one: ss.SemiStructured, other: ss.SemiStructured) -> bool:
    """Return whether two controllers have the same layers, step, temperature, logits, choices and masks."""
    assert (
        one.choices.keys() == other.choices.keys() == one.masks.keys() == other.masks.keys() and len(one.parameters()) == 2
    )
    pairs = [*zip(one.parameters(), other.parameters())]
    for name in one.choices:
        pairs += [(one.choices[name], other.choices[name]), (one.masks[name], other.masks[name])]
    same = all(torch.equal(ours, theirs) for ours, theirs in pairs)
    return same and (one.state_dict()["step"], one.entropy()) == (other.state_dict()["step"], other.entropy())


def test_state_survives_a_file(tmp_path: object) -> None:
    """Step, logits, choices and masks of a trained controller are restored, and it continues from there."""
    model = network()
    controller = ss.prepare(model, config())
    train(model, controller, torch.optim.Adam(controller.parameters(), 0.5), range(3))
    controller.flip_rate()
    torch.save(controller.state_dict(), tmp_path / "state.pt")  # type: ignore[operator]
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)  # type: ignore[operator]
    other = ss.prepare(network(), config())
    assert not same_controllers(other, controller)
    other.load_state_dict(loaded)
    assert same_controllers(other, controller)
    rates = []
    for one in (controller, other):
        for logits in one.parameters():
            logits.data.neg_()
        rates.append(one.flip_rate())
    assert rates[0] == rates[1] > 0, "what had been chosen last is in the file, too"


def test_states_of_other_masks_are_refused() -> None:
    controller = ss.prepare(network(), config())
    state = controller.state_dict()
    with pytest.raises(CheckpointError, match="not a state of 2:4 masks"):
        controller.load_state_dict({})
    with pytest.raises(CheckpointError, match=r"another configuration \(seed 0 -> 3\)"):
        ss.prepare(network(), config(seed=3)).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"another network: only one of the two has 0\.weight, 3\.weight, 8\.weight"):
        ss.prepare(nn.Sequential(nn.Linear(16, 8)), config()).load_state_dict(state)
    wide = nn.Sequential(*[nn.Identity()] * 3, nn.Conv2d(16, 32, 3), *[nn.Identity()] * 4, nn.Linear(24, 10))
    with pytest.raises(CheckpointError, match=r"choices of 3\.weight are .* of shape \(864,\)"):
        ss.prepare(wide, config()).load_state_dict(state)


def test_learning_continues_from_given_logits() -> None:
    first = ss.prepare(network(), config(axis="im2col"))
    logits = {"3.weight": torch.randn(first.parameters()[0].shape)}
    controller = ss.prepare(network(), config(axis="im2col"), logits=logits)
    assert torch.equal(controller.parameters()[0], logits["3.weight"]) and list(controller.choices) == ["3.weight"]
    assert [row.reason for row in controller.report if not row.masked] == ["no mask was given"] * 2
    with pytest.raises(
        ArgumentError, match=r"logits of 3\.weight are .* must be floating-point numbers of shape \(864, 6\)"
    ):
        ss.prepare(network(), config(axis="im2col"), logits={"3.weight": torch.randn(5, 6)})


def test_bfloat16_weights() -> None:
    model = network().bfloat16()
    controller = ss.prepare(model, config())
    assert all(logits.dtype == torch.float32 for logits in controller.parameters())
    model.train()(data(0)[0].bfloat16()).float().sum().backward()
    assert model[3].weight.dtype == torch.bfloat16 and all(one.grad is not None for one in controller.parameters())


def test_gradients_of_logits_do_not_depend_on_autocast() -> None:
    logits, noise, out = torch.randn(50, 6, requires_grad=True), torch.randn(50, 6), torch.randn(50, 4)
    (plain,) = torch.autograd.grad(gumbel_mask(logits, noise), logits, out)
    with torch.autocast("cpu", torch.bfloat16):
        mask = gumbel_mask(logits, noise)
    (mixed,) = torch.autograd.grad(mask, logits, out)
    assert mask.dtype == torch.float32 and torch.equal(plain, mixed)


@pytest.mark.slow
def test_learned_masks_lose_less_than_magnitude_masks() -> None:
    """This is tested on handwritten digits; no weight changes."""
    from sklearn.datasets import load_digits

    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images, order = images.float().view(-1, 1, 8, 8) / 16, torch.randperm(len(labels))
    model = nn.Sequential(
        *(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.BatchNorm2d(16),
        ),
        *(nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)),
    )

    def fit(network: nn.Module, optimizer: torch.optim.Optimizer, controller: ss.SemiStructured | None = None) -> None:
        for _ in range(300):
            batch = order[torch.randint(0, 1200, (64,))]
            loss = F.cross_entropy(network.train()(images[batch]), labels[batch])
            optimizer.zero_grad()
            (loss if controller is None else loss + controller.regularization()).backward()
            optimizer.step()
            if controller is not None:
                controller.step()

    def accuracy(network: nn.Module) -> float:
        with torch.no_grad():
            return float((network.eval()(images[order[1200:]]).argmax(1) == labels[order[1200:]]).float().mean())

    fit(model, torch.optim.AdamW(model.parameters(), 3e-3))
    magnitude, learned = copy.deepcopy(model), copy.deepcopy(model)
    ss.prepare(magnitude)
    controller = ss.prepare(learned, config(total_steps=300))
    fit(learned, torch.optim.Adam(controller.parameters(), 0.3), controller)
    assert accuracy(model) > 0.96
    assert accuracy(ss.convert(learned)) > max(accuracy(magnitude), accuracy(model) - 0.05)


def test_copies_learn_independently() -> None:
    model = network().train()
    controller = ss.prepare(model, config())
    other = copy.deepcopy(model)
    x, _ = data(0)
    assert torch.equal(other[3].weight, model[3].weight)
    torch.testing.assert_close(other(x), model(x))
    controller.step()
    assert not torch.equal(other[3].weight, model[3].weight), "the copy is still at its step"
