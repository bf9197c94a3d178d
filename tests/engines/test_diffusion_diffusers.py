"""The real `diffusers` at random weights: pipelines with our samplers and guidance, its models under our losses."""

import functools
import importlib
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from lossary.diffusion import AdaptiveGuidance, AdaptiveProjectedGuidance, debiased_estimation_loss
from lossary.diffusion import _samplers as samplers
from lossary.diffusion._denoiser import Counted, denoising_error, score_of, to_clean
from lossary.diffusion._guidance import Guided, classifier_free
from lossary.diffusion._process import flow, tabulated

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # numpy 2 about diffusers
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("greenlet")

from lossary.diffusion._diffusers import DiffusersDenoiser, DiffusersGuider, DiffusersScheduler  # noqa: E402

NAMES = ["euler", "heun", "ancestral", "dpm_solver_pp", "sde", "predictor_corrector"]
SHAPE = (2, 4, 8, 8)
BLOCKS = {"layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 8}
SPACES = {"sample_size": 8, "in_channels": 4, "out_channels": 4}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def built(kind, **settings) -> nn.Module:
    """A tiny network at random weights, in double precision."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(**settings).double().eval()


@functools.cache
def unet() -> nn.Module:
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    return built(diffusers.UNet2DModel, **SPACES, **BLOCKS, down_block_types=down, up_block_types=up)


@functools.cache
def conditional_unet(*, xl: bool = False) -> nn.Module:
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    also = {}
    if xl:
        also = {"addition_embed_type": "text_time", "addition_time_embed_dim": 2}
        also["projection_class_embeddings_input_dim"] = 6 * 2 + 6
    kind = diffusers.UNet2DConditionModel
    return built(kind, **SPACES, **BLOCKS, down_block_types=down, up_block_types=up, cross_attention_dim=12, **also)


@functools.cache
def transformer() -> nn.Module:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "patch_size": 2, "norm_num_groups": 4}
    return built(
        diffusers.DiTTransformer2DModel, sample_size=8, in_channels=4, out_channels=8, num_embeds_ada_norm=1000, **sizes
    )


BASE = diffusers.DDPMScheduler(clip_sample=False)


def schedule(steps: int, **settings) -> tuple[torch.Tensor, dict[float, int]]:
    """Noise levels, and the timestep at each, as diffusers' own DPM-Solver++ spaces them."""
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(BASE.config, **settings)
    theirs.set_timesteps(steps)
    sigmas = theirs.sigmas.double()
    return sigmas, dict(zip(sigmas.tolist(), theirs.timesteps.tolist()))


def by_hand(network, times, seen, *conditions):
    """x_0 from a network that predicts noise, in the textbook's words; `seen` collects x_t at each call."""

    def denoise(x, sigma):
        x_t = x / (1 + sigma**2) ** 0.5
        seen.append(x_t)
        with torch.no_grad():
            noise = network(x_t, torch.tensor([times[sigma]]).expand(len(x)), *conditions).sample
        return x - sigma * noise[:, : x.shape[1]]

    return denoise


def watched(scheduler):
    """The scheduler, and a list that collects the samples which its pipeline hands it."""
    seen, step = [], scheduler.step

    @functools.wraps(step)
    def watching(output, t, sample, **named):
        seen.append(sample.clone())
        return step(output, t, sample, **named)

    scheduler.step = watching
    return scheduler, seen


def same(seen, expected) -> None:
    assert len(seen) == len(expected)
    torch.testing.assert_close(torch.stack(seen), torch.stack(expected), rtol=1e-9, atol=1e-9)


# Samplers in pipelines


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_a_pipeline_takes_the_steps_of_our_sampler(name, final):
    scheduler, seen = watched(DiffusersScheduler.from_config(BASE.config, sampler=name, final_sigmas_type=final))
    pipe = diffusers.DDPMPipeline(unet(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=2, generator=rng(), num_inference_steps=4, output_type="pt").images

    sigmas, times = schedule(4, final_sigmas_type=final)
    times.setdefault(sigmas[-1].item(), 0)
    expected, generator = [], rng()
    x = torch.randn(SHAPE, generator=generator, dtype=torch.float64) * (1 + sigmas[0] ** 2).sqrt()
    x = getattr(samplers, name)(by_hand(unet(), times, expected), x, sigmas, generator=generator)
    same(seen, expected)
    assert len(seen) == len(scheduler.timesteps)
    last = x / (1 + sigmas[-1] ** 2).sqrt()
    torch.testing.assert_close(images, (last / 2 + 0.5).clamp(0, 1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["euler", "dpm_solver_pp"])
def test_a_guided_transformer_takes_the_steps_of_our_sampler(name):
    vae = built(
        diffusers.AutoencoderKL,
        block_out_channels=(4,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        latent_channels=4,
        norm_num_groups=4,
    )
    scheduler, seen = watched(DiffusersScheduler.from_config(BASE.config, sampler=name))
    pipe = diffusers.DiTPipeline(transformer(), vae, scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe([1, 5], guidance_scale=3.0, num_inference_steps=4, generator=rng(), output_type="np")

    sigmas, times = schedule(4)
    labels, nothing = torch.tensor([1, 5]), torch.tensor([1000, 1000])
    expected: list[torch.Tensor] = []
    of_class, of_nothing = by_hand(transformer(), times, expected, labels), by_hand(transformer(), times, [], nothing)
    x = draw(*SHAPE) * (1 + sigmas[0] ** 2).sqrt()
    getattr(samplers, name)(Guided(classifier_free(3.0), of_class, of_nothing), x, sigmas)
    same([both[:2] for both in seen], expected)
    assert (expected[-1] - expected[0]).abs().max() > 0.1


@pytest.mark.parametrize("in_place", [True, False])
def test_what_a_callback_changes_reaches_the_sampler(in_place):
    scheduler, seen = watched(DiffusersScheduler.from_config(BASE.config, sampler="dpm_solver_pp", steps_offset=1))
    pipe = diffusers.StableDiffusionPipeline(
        None, None, None, conditional_unet(), scheduler, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)

    def nudge(_, step, t, named):
        if step != 1:
            return {}
        if in_place:
            named["latents"] += 0.3
            return {}
        return {"latents": named["latents"] + 0.3}

    words = draw(2, 3, 12, seed=1)
    sizes = {"height": 64, "width": 64, "guidance_scale": 1.0, "num_inference_steps": 5, "output_type": "latent"}
    pipe(prompt_embeds=words, latents=draw(*SHAPE), callback_on_step_end=nudge, **sizes)

    sigmas, times = schedule(5)
    expected: list[torch.Tensor] = []
    denoise = by_hand(conditional_unet(), times, expected, words)

    def nudged(x, sigma):
        if len(expected) == 2:
            x += 0.3 * (1 + sigma**2) ** 0.5
        return denoise(x, sigma)

    samplers.dpm_solver_pp(nudged, draw(*SHAPE) * (1 + sigmas[0] ** 2).sqrt(), sigmas)
    same(seen, expected)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_solver_pp"])
def test_from_the_middle_as_from_an_image(name):
    scheduler = DiffusersScheduler.from_config(BASE.config, sampler=name)
    scheduler.set_timesteps(6)
    begin = 2 * scheduler.order
    scheduler.set_begin_index(begin)
    sigmas, times = schedule(6)
    clean, noise = draw(2, *SHAPE).unbind()
    x = scheduler.add_noise(clean, noise, scheduler.timesteps[begin].expand(2))
    torch.testing.assert_close(x, (clean + sigmas[2] * noise) / (1 + sigmas[2] ** 2).sqrt(), rtol=1e-6, atol=1e-6)
    for t in scheduler.timesteps[begin:]:
        with torch.no_grad():
            x = scheduler.step(unet()(x, t).sample, t, x).prev_sample
    start = (clean + sigmas[2] * noise) / (1 + sigmas[2] ** 2).sqrt() * (1 + sigmas[2] ** 2).sqrt()
    expected = getattr(samplers, name)(by_hand(unet(), times, []), start, sigmas[2:])
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)  # diffusers noises with float32 levels


# The schedulers of the same name


def run(scheduler, output, x, *, generator=None):
    """The loop of every pipeline; `output` is the network's, of what the scheduler feeds it."""
    for t in scheduler.timesteps:
        fed = scheduler.scale_model_input(x, t)
        x = scheduler.step(output(fed), t, x, **({"generator": generator} if generator else {})).prev_sample
    return x


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    ("name", "peer"),
    [
        ("euler", "EulerDiscreteScheduler"),
        ("heun", "HeunDiscreteScheduler"),
        ("dpm_solver_pp", "DPMSolverMultistepScheduler"),
    ],
)
def test_a_peer_of_the_same_name_agrees(name, peer, prediction):
    settings = {"prediction_type": prediction, "use_karras_sigmas": True, "beta_start": 1e-4, "beta_end": 0.02}
    theirs, ours = getattr(diffusers, peer)(**settings), DiffusersScheduler(name, **settings)
    theirs.set_timesteps(7)
    ours.set_timesteps(7)
    output = lambda fed: torch.tanh(1.3 * fed + 0.2)  # noqa: E731
    x = draw(*SHAPE).float()
    expected = run(theirs, output, x * (1.0 if peer.startswith("DPM") else (1 + theirs.sigmas.max() ** 2).sqrt()))
    torch.testing.assert_close(run(ours, output, x), expected, rtol=2e-4, atol=2e-4)
    assert ours.order == theirs.order
    assert len(ours.timesteps) == len(theirs.timesteps)


@pytest.mark.parametrize(("name", "peer"), [("euler", "DDIMScheduler"), ("ancestral", "DDPMScheduler")])
def test_ddim_is_euler_and_ddpm_is_ancestral(name, peer):
    theirs, ours = getattr(diffusers, peer)(clip_sample=False), DiffusersScheduler(name)
    theirs.set_timesteps(10)
    ours.set_timesteps(timesteps=theirs.timesteps.tolist())
    output = lambda fed: torch.tanh(1.3 * fed + 0.2)  # noqa: E731
    x = draw(*SHAPE)
    expected = run(theirs, output, x, generator=rng(1))
    torch.testing.assert_close(run(ours, output, x, generator=rng(1)), expected, rtol=1e-4, atol=1e-4)


def test_ancestral_is_that_of_diffusers():
    theirs, ours = diffusers.EulerAncestralDiscreteScheduler(), DiffusersScheduler("ancestral")
    ours.set_timesteps(7)
    theirs.set_timesteps(7)
    theirs.sigmas, theirs.timesteps = ours.sigmas, ours.timesteps.float()  # it spaces them otherwise
    output = lambda fed: torch.tanh(1.3 * fed + 0.2)  # noqa: E731
    x = draw(*SHAPE).float()
    expected = run(theirs, output, x * (1 + theirs.sigmas.max() ** 2).sqrt(), generator=rng(1))
    torch.testing.assert_close(run(ours, output, x, generator=rng(1)), expected, rtol=2e-4, atol=2e-4)


def test_a_flow_is_that_of_diffusers():
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = DiffusersScheduler("euler", use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    ours.set_timesteps(6)
    theirs.set_timesteps(6)
    theirs.sigmas = ours.sigmas  # it spaces them otherwise
    output, x = lambda fed: torch.tanh(1.3 * fed + 0.2), draw(*SHAPE)
    for t, other in zip(ours.timesteps, theirs.timesteps):
        expected = theirs.step(output(x), other, x).prev_sample
        x = ours.step(output(x), t, x).prev_sample
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)  # theirs in float32


@pytest.mark.parametrize(
    ("prediction", "kind"), [("epsilon", "noise"), ("v_prediction", "v"), ("sample", "clean"), ("flow", "velocity")]
)
def test_predictions_are_read_as_the_engine_reads_them(prediction, kind):
    """One step of Euler to noise level 0 is x_0."""
    x_t, output = draw(2, *SHAPE).unbind()
    if prediction == "flow":
        scheduler = DiffusersScheduler("euler", prediction_type="flow_prediction", use_flow_sigmas=True)
        scheduler.set_timesteps(1)
        process, time = flow(), scheduler.sigmas[:1].double()
    else:
        scheduler = DiffusersScheduler("euler", prediction_type=prediction)
        scheduler.set_timesteps(timesteps=[300])
        process, time = tabulated(BASE.alphas_cumprod), torch.tensor([300.0], dtype=torch.float64)
    expected = to_clean(output, x_t, time.expand(2), process, kind)
    found = scheduler.step(output, scheduler.timesteps[0], x_t).prev_sample
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_variance_behind_the_mean_is_left_out():
    x, output = draw(2, *SHAPE).unbind()
    scheduler = DiffusersScheduler("euler")
    found = []
    for whole in (output, torch.cat([output, draw(*SHAPE, seed=1)], dim=1)):
        scheduler.set_timesteps(2)
        found.append(scheduler.step(whole, scheduler.timesteps[0], x).prev_sample)
    torch.testing.assert_close(*found, rtol=0.0, atol=0.0)


def test_half_precision_stays_outside():
    """The sampler's own x is float32 although the pipeline passes bfloat16 back and forth."""
    output, sigmas = lambda fed: torch.tanh(1.3 * fed + 0.2), schedule(50)[0]
    scheduler = DiffusersScheduler("euler")
    scheduler.set_timesteps(50)
    start = draw(*SHAPE).bfloat16()

    def denoise(x, sigma):
        return x - sigma * output((x / (1 + sigma**2) ** 0.5).bfloat16()).float()

    expected = samplers.euler(denoise, start.float() * (1 + sigmas[0] ** 2).sqrt().float(), sigmas)
    found = run(scheduler, output, start)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() <= 0.01 * expected.abs().max()  # one rounding, to 8 bits
    theirs = diffusers.DPMSolverMultistepScheduler(solver_order=1)
    theirs.set_timesteps(50)
    rounded = (run(theirs, output, start).float() - expected).abs().mean()
    assert (found.float() - expected).abs().mean() < 0.5 * rounded


@pytest.mark.parametrize("name", ["heun", "ancestral"])
def test_inference_mode_changes_nothing(name):
    scheduler = DiffusersScheduler(name)
    found = []
    for mode in (torch.no_grad, torch.inference_mode):
        scheduler.set_timesteps(5)
        with mode():
            found.append(run(scheduler, lambda fed: torch.tanh(1.3 * fed), draw(*SHAPE), generator=rng()))
    torch.testing.assert_close(*found, rtol=0.0, atol=0.0)


def test_a_pipeline_is_saved_and_loaded(tmp_path):
    pipe = diffusers.DDPMPipeline(unet(), DiffusersScheduler.from_config(BASE.config, sampler="heun"))
    pipe.save_pretrained(tmp_path)
    scheduler = diffusers.DDPMPipeline.from_pretrained(tmp_path).scheduler
    assert type(scheduler) is DiffusersScheduler
    assert scheduler.config.sampler == "heun"
    scheduler.set_timesteps(3)
    assert len(scheduler.timesteps) == 5


def test_a_sampler_of_ones_own():
    def half_way(denoise, x, sigmas, *, generator=None):
        for sigma, lower in pairwise(sigmas.tolist()):
            x = x + (x - denoise(x, sigma)) * ((lower - sigma) / sigma) / 2
        return x

    scheduler = DiffusersScheduler(half_way)
    scheduler.set_timesteps(7)
    run(scheduler, torch.tanh, draw(*SHAPE))
    scheduler.set_timesteps(5)
    scheduler.step(draw(*SHAPE), scheduler.timesteps[0], draw(*SHAPE))
    scheduler.set_timesteps(4)  # nothing is left of samples before, whole or interrupted
    sigmas = schedule(4)[0]
    output = lambda fed: torch.tanh(1.3 * fed)  # noqa: E731
    found = run(scheduler, output, draw(*SHAPE))
    denoise = lambda x, sigma: x - sigma * output(x / (1 + sigma**2) ** 0.5)  # noqa: E731
    expected = half_way(denoise, draw(*SHAPE) * (1 + sigmas[0] ** 2).sqrt(), sigmas)
    torch.testing.assert_close(found, expected)
    assert "half_way" in repr(scheduler)


@torch.no_grad()
def quiet(denoise, x, sigmas, *, generator=None):
    """Euler that must never run with gradients."""

    def checked(x, sigma):
        clean = denoise(x, sigma)
        assert not torch.is_grad_enabled()
        return clean

    return samplers.euler(checked, x, sigmas)


@pytest.mark.parametrize("sampler", ["euler", quiet])
@pytest.mark.parametrize("grad", [True, False])
def test_steps_leave_the_grad_mode_alone(sampler, grad):
    scheduler = DiffusersScheduler(sampler)
    scheduler.set_timesteps(3)
    with torch.set_grad_enabled(grad):
        x = draw(*SHAPE)
        for t in scheduler.timesteps:
            x = scheduler.step(torch.tanh(x), t, x).prev_sample
            assert torch.is_grad_enabled() == grad


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("end", ["set_timesteps", "deletion", "error"])
def test_an_abandoned_run_leaves_the_grad_mode_alone(grad, end):
    """The run began in the other mode, which `torch.no_grad` comes back to when it is ended."""
    scheduler = DiffusersScheduler(quiet)
    scheduler.set_timesteps(3)
    with torch.set_grad_enabled(not grad):
        x = scheduler.step(draw(*SHAPE), scheduler.timesteps[0], draw(*SHAPE)).prev_sample
    with torch.set_grad_enabled(grad):
        if end == "set_timesteps":
            scheduler.set_timesteps(3)
        elif end == "deletion":
            del scheduler
        else:
            with pytest.raises(RuntimeError):
                scheduler.step(draw(2, 4, 3, 3), scheduler.timesteps[1], x)
        assert torch.is_grad_enabled() == grad


def test_gradients_of_the_last_steps_alone():
    """The caller's mode may change between steps: x_3 = x_2 + (sigma_3 - sigma_2) output for a network of noise."""
    scheduler = DiffusersScheduler("euler")
    scheduler.set_timesteps(3)
    x, shift = draw(*SHAPE), torch.zeros((), dtype=torch.float64, requires_grad=True)
    for i, t in enumerate(scheduler.timesteps):
        with torch.set_grad_enabled(i == 2):
            x = scheduler.step(torch.tanh(x) + shift, t, x).prev_sample
    x.sum().backward()
    sigmas = schedule(3)[0]
    assert shift.grad.item() == pytest.approx(-x.numel() * sigmas[2].item())


def test_refusals():
    with pytest.raises(ValueError, match="sampler: expected one of 'euler'"):
        DiffusersScheduler("eulr")

    def between(denoise, x, sigmas, *, generator=None):
        return denoise(x, float(sigmas[:2].mean()))

    def adaptive(denoise, x, sigmas, *, generator=None):
        return denoise(x, sigmas[0] if x.abs().sum() == 0 else sigmas[1])

    with pytest.raises(ValueError, match="sampler: expected calls of the network at levels out of sigmas"):
        DiffusersScheduler(between).set_timesteps(4)
    scheduler = DiffusersScheduler(adaptive)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="sampler: expected noise levels that do not depend on x"):
        run(scheduler, torch.tanh, draw(*SHAPE))
    with pytest.raises(ValueError, match="scheduler: expected one with alphas_cumprod"):
        DiffusersDenoiser(unet(), diffusers.EDMEulerScheduler())


# Guidance in a pipeline


class Momentum:
    """A guidance with a memory, which is not linear and lets the last steps go without the unconditional network."""

    def needs(self, state):
        return state is None or state[1] < 4

    def __call__(self, cond, uncond, state):
        shift, calls = (0.0, 0) if state is None else state
        shift = 0.5 * shift if uncond is None else 0.5 * shift + (cond - uncond)
        return (cond + 2 * shift).clamp(-3, 3), (shift, calls + 1)


def modular(scheduler, guider):
    """The real guided pipeline of Stable Diffusion XL, between its text encoders and its decoder."""
    from diffusers.modular_pipelines import SequentialPipelineBlocks
    from diffusers.modular_pipelines.stable_diffusion_xl import before_denoise, denoise

    blocks = {
        "input": before_denoise.StableDiffusionXLInputStep(),
        "timesteps": before_denoise.StableDiffusionXLSetTimestepsStep(),
        "latents": before_denoise.StableDiffusionXLPrepareLatentsStep(),
        "conditions": before_denoise.StableDiffusionXLPrepareAdditionalConditioningStep(),
        "denoise": denoise.StableDiffusionXLDenoiseStep(),
    }
    pipe = SequentialPipelineBlocks.from_blocks_dict(blocks).init_pipeline()
    pipe.update_components(unet=conditional_unet(xl=True), scheduler=scheduler, guider=guider)
    pipe.set_progress_bar_config(disable=True)
    return pipe


WORDS, POOLED = draw(2, 1, 3, 12, seed=1), draw(2, 1, 6, seed=2)  # of the condition, and of none


def guided_sample(scheduler, guider) -> torch.Tensor:
    return modular(scheduler, guider)(
        prompt_embeds=WORDS[0],
        negative_prompt_embeds=WORDS[1],
        pooled_prompt_embeds=POOLED[0],
        negative_pooled_prompt_embeds=POOLED[1],
        latents=draw(1, 4, 8, 8),
        num_inference_steps=4,
        height=64,
        width=64,
        output="latents",
    )


GUIDANCES = {
    "classifier-free": (classifier_free(3.0), None),
    "momentum": (Momentum(), 4),
    "adaptive": (AdaptiveGuidance(3.0, threshold=0.9998), 2),  # passed at the second step, which is still paid for
    "projected": (AdaptiveProjectedGuidance(3.0, radius=2.0), None),
}
"""And for how many calls of the network each needs the unconditional prediction, None for all."""


@pytest.mark.parametrize(("guidance", "needed"), GUIDANCES.values(), ids=GUIDANCES)
@pytest.mark.parametrize("name", ["euler", "heun"])
def test_a_guided_pipeline_takes_the_steps_of_our_guided_sampler(guidance, needed, name):
    scheduler, seen = watched(DiffusersScheduler.from_config(BASE.config, sampler=name))
    guider = DiffusersGuider(guidance, scheduler)
    guided_sample(scheduler, guider)
    seen.clear()
    found = guided_sample(scheduler, guider)  # the guidance's memory starts anew

    sigmas, times = schedule(4)
    expected: list[torch.Tensor] = []
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]], dtype=torch.float64)

    def network(i):
        added = {"text_embeds": POOLED[i], "time_ids": sizes}
        return lambda x, t: conditional_unet(xl=True)(x, t, encoder_hidden_states=WORDS[i], added_cond_kwargs=added)

    cond, uncond = by_hand(network(0), times, expected), Counted(by_hand(network(1), times, []))
    start = draw(1, 4, 8, 8) * (1 + sigmas[0] ** 2).sqrt()
    final = getattr(samplers, name)(Guided(guidance, cond, uncond), start, sigmas)
    assert len(seen) == len(expected)
    # The guider has its noise levels from the timesteps, with the seven digits of diffusers' table.
    torch.testing.assert_close(torch.stack(seen), torch.stack(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, final, rtol=1e-5, atol=1e-5)
    assert uncond.evaluations == (needed or len(seen))


def test_classifier_free_guidance_is_that_of_diffusers():
    scheduler = DiffusersScheduler.from_config(BASE.config, sampler="euler")
    theirs = guided_sample(scheduler, diffusers.ClassifierFreeGuidance(guidance_scale=3.0))
    ours = guided_sample(scheduler, DiffusersGuider(classifier_free(3.0), scheduler))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("flows", [False, True])
def test_a_guider_reads_any_scheduler(flows):
    """A clamp of x_0 at the first step of a flow, where alpha is 0, and halfway through a table."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler() if flows else BASE
    guider = DiffusersGuider(lambda cond, uncond, state: (cond.clamp(-1, 1), state), scheduler, stop=0.5)
    x_t, output = draw(2, *SHAPE).unbind()
    t = torch.tensor(1000.0 if flows else 500.0)

    class Network(nn.Module):
        def forward(self, hidden_states):
            return output

    def answer(step):
        guider.set_state(step, 10, t)
        batches = guider.prepare_inputs({"prompt": (torch.zeros(1), torch.ones(1))})
        for batch in batches:
            network = Network()
            guider.prepare_models(network)
            batch.noise_pred = network(hidden_states=x_t)
            guider.cleanup_models(network)
            assert not network._forward_pre_hooks
        return len(batches), guider(batches)[0]

    calls, found = answer(0)
    assert calls == 2
    if flows:
        torch.testing.assert_close(x_t - found, (x_t - output).clamp(-1, 1))
    else:
        alpha, sigma = BASE.alphas_cumprod[500].double().sqrt(), (1 - BASE.alphas_cumprod[500].double()).sqrt()
        clean = ((x_t - sigma * output) / alpha).clamp(-1, 1)
        torch.testing.assert_close(found, (x_t - alpha * clean) / sigma)
    assert (found - output).abs().max() > 0.1
    calls, found = answer(5)
    assert calls == 1
    assert torch.equal(found, output)


# Models as denoisers


def test_the_denoising_error_is_the_loss_of_diffusers():
    """Times 1 / sigma^2 it is the mean squared error of the predicted noise, what every training script takes."""
    clean, noise = draw(2, *SHAPE).unbind()
    t = torch.tensor([40, 700])
    alphas = BASE.alphas_cumprod.double()[t]
    sigma = ((1 - alphas) / alphas).sqrt()
    x_t = alphas.sqrt()[:, None, None, None] * clean + (1 - alphas).sqrt()[:, None, None, None] * noise
    expected = (unet()(x_t, t).sample - noise).square().mean((1, 2, 3))
    found = denoising_error(DiffusersDenoiser(unet(), BASE), clean, sigma, noise) / sigma**2
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("of", ["unet", "conditional", "transformer"])
def test_every_model_is_a_denoiser_for_our_samplers(of):
    network, conditions = {
        "unet": (unet(), ()),
        "conditional": (conditional_unet(), (draw(2, 3, 12, seed=1),)),
        "transformer": (transformer(), (torch.tensor([3, 7]),)),
    }[of]
    denoise, (sigmas, times) = DiffusersDenoiser(network, BASE), schedule(3)
    x = draw(*SHAPE) * (1 + sigmas[0] ** 2).sqrt()
    with torch.no_grad():
        found = samplers.heun(lambda x, sigma: denoise(x, sigma, *conditions), x, sigmas)
    expected = samplers.heun(by_hand(network, times, [], *conditions), x, sigmas)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # timesteps to seven digits


def test_a_model_of_a_flow_is_a_denoiser():
    """It predicts noise minus data at x_t = (1 - s) data + s noise, its timestep being 1000 s; sigma is s / (1 - s)."""

    class Network(nn.Module):
        dtype = torch.float64

        def forward(self, x, t, return_dict):
            return (torch.tanh(x) + t[:, None, None, None] / 1000,)

    x, s = draw(*SHAPE), torch.tensor([0.25, 0.8], dtype=torch.float64)
    found = DiffusersDenoiser(Network(), diffusers.FlowMatchEulerDiscreteScheduler())(x, s / (1 - s))
    wide = s[:, None, None, None]
    torch.testing.assert_close(found, (1 - wide) * x - wide * (torch.tanh((1 - wide) * x) + wide))


def test_a_step_of_training_with_one_of_our_losses():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = diffusers.UNet2DModel.from_config(unet().config)
    denoise = DiffusersDenoiser(network, BASE)
    clean, noise = draw(2, 8, 4, 8, 8).float().unbind()
    sigma = torch.linspace(0.3, 3, 8)
    optimizer = torch.optim.SGD(denoise.parameters(), lr=0.02)

    def objective():
        score = score_of(denoise, clean + sigma[:, None, None, None] * noise, sigma)
        predicted = -sigma[:, None, None, None] * score
        return debiased_estimation_loss(predicted, noise, snr=sigma**-2).mean()

    before = objective()
    before.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    optimizer.step()
    assert objective() < 0.99 * before


@pytest.mark.parametrize("kind", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("betas", ["linear", "squaredcos_cap_v2"])
def test_a_schedule_that_ends_in_pure_noise(kind, betas):
    """x_0 = alpha x_t - sigma v at the last timestep, where alpha is all but 0; elsewhere the table holds."""
    settings = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "beta_schedule": betas}
    scheduler, seen = getattr(diffusers, kind)(**settings), []

    class Network(nn.Module):
        dtype = torch.float64

        def forward(self, x, t, return_dict):
            seen.append(t)
            return (torch.tanh(x),)

    x, denoise = draw(*SHAPE), DiffusersDenoiser(Network(), scheduler)
    found = denoise(1e6 * x, 1e6)
    assert seen[0].tolist() == [999.0] * 2
    alpha = denoise.process.alpha(torch.tensor(999.0, dtype=torch.float64)).item()
    before = scheduler.alphas_cumprod[998].item()  # of linear betas it is 4e-9
    assert alpha**2 == pytest.approx(2**-24 if betas == "squaredcos_cap_v2" else before / 2)
    x_t = alpha * 1e6 * x
    torch.testing.assert_close(found, alpha * x_t - (1 - alpha**2) ** 0.5 * torch.tanh(x_t))
    alphas = scheduler.alphas_cumprod[700].double()
    found = denoise(x, ((1 - alphas) / alphas).sqrt())
    torch.testing.assert_close(found, alphas * x - (1 - alphas).sqrt() * torch.tanh(alphas.sqrt() * x))
    assert seen[1].tolist() == pytest.approx([700.0] * 2)
    guider = DiffusersGuider(classifier_free(3.0), scheduler)
    assert guider.process.alpha(torch.tensor(999.0)) > 0


def test_pure_noise_that_the_scheduler_does_not_tell_of():
    """Refused, instead of x_0 that is not a number at the last timestep; with something small there it is taken."""
    scheduler = diffusers.DDPMScheduler(trained_betas=[0.1, 0.2, 1.0], num_train_timesteps=3)
    with pytest.raises(ValueError, match="alphas_cumprod: expected values strictly between 0 and 1, got 0;"):
        DiffusersDenoiser(unet(), scheduler)
    scheduler.alphas_cumprod[-1] = 2**-24
    alpha = DiffusersDenoiser(unet(), scheduler).process.alpha(torch.tensor([2.0], dtype=torch.float64))
    assert alpha.item() == pytest.approx(2**-12)


def test_half_precision_models_get_their_timestep_whole():
    """987 is not a bfloat16."""
    seen = []

    class Network(nn.Module):
        dtype = torch.bfloat16

        def forward(self, x, t, return_dict):
            seen.append((x.dtype, t.clone()))
            return (x,)

    alphas = BASE.alphas_cumprod[987]
    found = DiffusersDenoiser(Network(), BASE)(draw(*SHAPE).float(), float(((1 - alphas) / alphas).sqrt()))
    assert found.dtype == torch.float32
    assert seen[0][0] == torch.bfloat16
    torch.testing.assert_close(seen[0][1], torch.full((2,), 987.0), rtol=0.0, atol=0.01)


# The page

TEXT = (Path(__file__).parents[2] / "docs" / "diffusers.md").read_text("utf-8")
EXAMPLES = dict(re.findall(r"```python (\w+)\n(.*?)```", TEXT, re.DOTALL))


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "setup"])
def test_the_example_runs(name):
    there: dict = {}
    with torch.random.fork_rng(devices=[]):
        exec(EXAMPLES["setup"] + EXAMPLES[name], there)
    if name == "train":
        assert sum(there["losses"][-5:]) < 0.5 * sum(there["losses"][:5])
    else:
        assert there["samples"].shape == (4, 1, 8, 8)
        assert there["samples"].isfinite().all()


# Without diffusers


def test_the_room_does_not_import_diffusers():
    code = "import sys, lossary.diffusion as room; dir(room); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"diffusers", "greenlet"} & set(loaded)


@pytest.mark.parametrize("missing", ["diffusers", "greenlet"])
def test_what_is_missing_is_said_in_one_line(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "lossary.diffusion._diffusers")
    with pytest.raises(ImportError, match=r"^[^\n]*pip install 'lossary\[diffusers\]'$") as caught:
        importlib.import_module("lossary.diffusion._diffusers")
    assert missing in str(caught.value)
