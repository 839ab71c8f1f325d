"""Scenarios for two processes: each runs on both and reports what went wrong."""

from __future__ import annotations

import copy
import datetime
import traceback
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

import nflows_kconv.nflows
import nflows_kconv.normflows
from nflows_kconv import ConditionalInvertibleConv2d, InvertibleConv2d, PeriodicConv2d
from nflows_kconv.flows import steps
from nflows_kconv.layer import KernelLayer

SCENARIOS: dict[str, Callable[[int], None]] = {}
LIBRARIES = {"nflows": nflows_kconv.nflows.finc_flow, "normflows": nflows_kconv.normflows.finc_flow}


def scenario(function: Callable[[int], None]) -> Callable[[int], None]:
    SCENARIOS[function.__name__] = function
    return function


def run(rank: int, path: str) -> None:
    """Writes the report of each scenario to {path}.{rank}, None if all was well."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{path}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=20)
    )
    found: dict[str, str | None] = dict.fromkeys(SCENARIOS, "did not run")
    for name, function in SCENARIOS.items():
        torch.manual_seed(rank)
        try:
            function(rank)
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
            break  # the other process has lost its partner
        finally:
            torch.save(found, f"{path}.{rank}")
    distributed.destroy_process_group()


class Density(nn.Module):
    """A flow of continuous numbers whose forward is the negative log-likelihood per image."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = steps.Sequence(
            steps.Sequence(
                [
                    InvertibleConv2d(4, diagonal="learned"),
                    PeriodicConv2d(4),
                    ConditionalInvertibleConv2d(4, context_features=4),
                    steps.ActNorm(4),
                    steps.InvertibleConv1x1(4),
                    steps.AffineCoupling(steps.coupling_network(4, 8)),
                ]
            )
            for _ in range(2)
        )

    def forward(self, images: Tensor) -> Tensor:
        noise, log_abs_det = self.steps(images, contexts(images))
        return noise.square().sum((1, 2, 3)) / 2 - log_abs_det


def contexts(images: Tensor) -> Tensor:
    return images.detach().mean((2, 3)).tanh()


def numbers(count: int = 8) -> Tensor:
    """Returns the same numbers in both processes; the halves have different means."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(count, 4, 4, 4, generator=generator) * 2
    images[: count // 2] += 3
    return images


def half(images: Tensor, rank: int) -> Tensor:
    return images.chunk(2)[rank]


def flow_of(library: str, **options) -> nn.Module:
    return LIBRARIES[library]((1, 4, 4), 1, 2, hidden_channels=4, **options)


def negative_log_likelihood(library: str, flow: nn.Module, images: Tensor) -> Tensor:
    return -flow(images).mean() if library == "nflows" else flow(images).mean()


def train(loss: Callable[[], Tensor], parameters, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(parameters, 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def train_together(model: DistributedDataParallel, rank: int, library: str | None = None) -> None:
    """Trains on each process's half, then requires equal state and an initialised ActNorm."""
    if library is None:
        images = half(numbers(), rank)
        train(lambda: model(images).mean(), model.parameters())
    else:
        images = torch.randint(256, (4, 1, 4, 4), generator=torch.Generator().manual_seed(rank))
        train(lambda: negative_log_likelihood(library, model, images), model.parameters())
    assert all(norm.initialized for norm in norms(model))
    assert_equal_in_both(model)


def norms(model: nn.Module) -> list[steps.ActNorm]:
    return [module for module in model.modules() if isinstance(module, steps.ActNorm)]


def assert_equal_in_both(model: nn.Module) -> None:
    for name, value in model.state_dict().items():
        values = [torch.empty_like(value) for _ in range(2)]
        distributed.all_gather(values, value)
        assert torch.equal(*values), name


def checkpoint(build: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """Returns the same checkpoint in both processes."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        flow = build()
        images = torch.randint(256, (8, 1, 4, 4))
        flow(numbers() if isinstance(flow, Density) else images)
    return flow.state_dict()


def each_flow(function: Callable[[int, str | None, Callable[[], nn.Module]], None]) -> None:
    """Registers a scenario for the flow of each library and one for the bare steps."""
    builders = {library: lambda library=library: flow_of(library) for library in LIBRARIES}
    for library, build in {None: Density, **builders}.items():
        SCENARIOS[f"{function.__name__}, {library or 'steps'}"] = lambda rank, library=library, build=build: function(
            rank, library, build
        )


@each_flow
def from_a_fresh_start(rank, library, build):
    train_together(DistributedDataParallel(build()), rank, library)


@each_flow
def without_broadcasting_buffers(rank, library, build):
    torch.manual_seed(3)  # so the processes start from equal parameters
    train_together(DistributedDataParallel(build(), broadcast_buffers=False, static_graph=True), rank, library)


@each_flow
def from_a_checkpoint_on_every_rank(rank, library, build):
    flow, saved = build(), checkpoint(build)
    flow.load_state_dict(saved)
    train_together(DistributedDataParallel(flow), rank, library)
    assert_trained_from(saved, flow)


@each_flow
def from_a_checkpoint_loaded_after_wrapping(rank, library, build):
    model, saved = DistributedDataParallel(build()), checkpoint(build)
    model.module.load_state_dict(saved)
    train_together(model, rank, library)
    assert_trained_from(saved, model.module)


@each_flow
def from_a_checkpoint_on_the_first_rank_alone(rank, library, build):
    flow, saved = build(), checkpoint(build)
    if rank == 0:
        flow.load_state_dict(saved)
    train_together(DistributedDataParallel(flow), rank, library)
    assert_trained_from(saved, flow)


@each_flow
def initialised_by_a_call_on_one_rank(rank, library, build):
    for caller in (0, 1):
        flow = build()
        if rank == caller:
            flow(numbers() if library is None else torch.randint(256, (4, 1, 4, 4)))
        train_together(DistributedDataParallel(flow), rank, library)


def assert_trained_from(saved: dict[str, Tensor], flow: nn.Module) -> None:
    """Asserts that ActNorm moved little, as by three small steps and unlike an initialisation."""
    for name, value in flow.state_dict().items():
        if "shift" in name or "log_scale" in name:
            torch.testing.assert_close(value, saved[name], atol=0.1, rtol=0, msg=name)


@each_flow
def as_one_process_on_the_joined_batch(rank, library, build):
    torch.manual_seed(3)
    alone = Density() if library is None else flow_of(library, preprocessing=None)
    together = DistributedDataParallel(copy.deepcopy(alone))
    images = numbers() if library is None else numbers().view(8, 1, 8, 8)[:, :, ::2, ::2]
    # The first one must not wait for the other process.
    for model, own in ((alone, images), (together, half(images, rank))):
        train(lambda f=model, x=own: negative_log_likelihood(library or "normflows", f, x), model.parameters())
    assert_equal_in_both(together)
    for one, two in zip(alone.state_dict().values(), together.module.state_dict().values(), strict=True):
        torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-5)


@scenario
def statistics_far_from_zero(rank):
    model = DistributedDataParallel(steps.ActNorm(2))
    images = torch.randn(16, 2, 8, 8, generator=torch.Generator().manual_seed(1)) + 1e4
    model(half(images, rank))
    torch.testing.assert_close(model.module.shift.double(), -images.double().mean((0, 2, 3)), atol=1e-3, rtol=0)
    deviation = images.double().std((0, 2, 3), correction=0)
    torch.testing.assert_close(model.module.log_scale.double().exp(), 1 / deviation, atol=0, rtol=1e-5)


@scenario
def an_empty_batch_takes_part(rank):
    model = DistributedDataParallel(steps.ActNorm(4))
    images = numbers()[:0] if rank else numbers()
    model(images)
    assert_equal_in_both(model)
    torch.testing.assert_close(model.module.shift, -numbers().mean((0, 2, 3)))
    other = DistributedDataParallel(steps.ActNorm(4))
    other(images[:0])
    assert not other.module.initialized


@scenario
def a_first_batch_that_is_not_finite_is_an_error_in_both(rank):
    model = DistributedDataParallel(steps.ActNorm(4))
    with pytest.raises(ValueError, match="finite mean and variance"):
        model(numbers() if rank else numbers() / 0)
    assert not model.module.initialized
    model(half(numbers(), rank))
    assert_equal_in_both(model)
    torch.testing.assert_close(model.module.shift, -numbers().mean((0, 2, 3)))


@scenario
def buffers_that_differ(rank):
    model = DistributedDataParallel(Density())
    for norm in norms(model):
        norm.initialized.fill_(rank == 1)  # the first rank's buffers are broadcast
    train_together(model, rank)


@scenario
def a_second_initialisation(rank):
    model = DistributedDataParallel(Density())
    train_together(model, rank)
    first = norms(model)[0]
    before = first.shift.clone()
    first.initialized.fill_(False)
    model(half(numbers() + 5, rank))
    assert (first.shift - before).abs().min() > 1
    assert_equal_in_both(model)


@scenario
def calls_outside_the_wrapper_are_ones_own(rank):
    model = DistributedDataParallel(Density())
    if rank == 0:
        model.module(numbers())
        assert all(norm.initialized for norm in norms(model))
    stranger = steps.ActNorm(4)

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = steps.ActNorm(4)

        def forward(self, images: Tensor) -> Tensor:
            if rank == 0:
                stranger(images)
            return self.norm(images)[0]

    DistributedDataParallel(Calls())(half(numbers(), rank))
    assert stranger.initialized == (rank == 0)


def shard(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        if isinstance(module, KernelLayer | steps.ActNorm | steps.AffineCoupling):
            fully_shard(module)
    return fully_shard(model)


@scenario
def sharded_steps(rank):
    torch.manual_seed(3)
    alone = Density().steps
    alone(numbers(), contexts(numbers()))
    sharded = shard(copy.deepcopy(alone))
    for model, images in ((alone, numbers()), (sharded, half(numbers(), rank))):
        given = images, contexts(images)
        for function in (model, model.inverse):  # both directions go through the module's own call
            train(lambda f=function, x=given: f(*x)[0].square().mean() - f(*x)[1].mean() / 64, model.parameters())
    for one, two in zip(alone.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(two.full_tensor(), one, atol=1e-5, rtol=1e-5)


@scenario
def sharded_before_the_first_batch(rank):
    """Requires an error, because ActNorm's initialisation would be lost."""
    sharded = shard(Density().steps)
    with pytest.raises(
        RuntimeError, match="ActNorm must see its first batch, or load a state_dict, before fully_shard"
    ):
        sharded(numbers(), contexts(numbers()))


def sharded_flow(rank: int, library: str) -> None:
    torch.manual_seed(3)
    alone = flow_of(library)
    images = torch.randint(256, (4, 1, 4, 4))
    alone(images)
    sharded = shard(copy.deepcopy(alone))
    register_fsdp_forward_method(sharded, "sample")
    torch.manual_seed(4)
    train(lambda: negative_log_likelihood(library, alone, images), alone.parameters())
    torch.manual_seed(4)
    train(lambda: negative_log_likelihood(library, sharded, images), sharded.parameters())
    for one, two in zip(alone.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(two.full_tensor(), one, atol=1e-5, rtol=1e-5)
    whole = StateDictOptions(full_state_dict=True)
    for load in (
        lambda: set_model_state_dict(sharded, alone.state_dict(), options=whole),
        lambda: sharded.load_state_dict(sharded.state_dict()),
    ):
        load()
        for name, value in get_model_state_dict(sharded, options=whole).items():  # in the first process alone
            assert torch.equal(value, alone.state_dict()[name]), name
    drawn = []
    for flow in (alone, sharded):
        torch.manual_seed(4)
        images = flow.sample(3)
        drawn.append(images if library == "nflows" else images[0])
    torch.testing.assert_close(*drawn, atol=1, rtol=0)
    torch.manual_seed(4)
    density = sharded.log_prob(images if library == "nflows" else images[0])
    assert density.isfinite().all()


for library in LIBRARIES:
    SCENARIOS[f"sharded flow, {library}"] = lambda rank, library=library: sharded_flow(rank, library)
