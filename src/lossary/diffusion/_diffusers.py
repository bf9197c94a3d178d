"""The real `diffusers`: our samplers as its schedulers, our guidance as its guiders, its models as our denoisers.

A pipeline calls the network itself between two steps of its scheduler, whereas a sampler is one function over all
noise levels that calls the network. A greenlet turns the one into the other: the sampler runs until it asks for x_0 and
waits there until the pipeline brings the network's output. Any s(denoise, x, sigmas, *, generator) therefore serves a
pipeline as it stands.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn

from lossary import require
from lossary.diffusion._guidance import Guidance
from lossary.diffusion._process import Process, over, tabulated
from lossary.diffusion._samplers import ancestral, dpm_solver_pp, euler, heun, predictor_corrector, sde

try:
    from diffusers import DPMSolverMultistepScheduler, SchedulerMixin
    from diffusers.configuration_utils import register_to_config
    from diffusers.guiders import ClassifierFreeGuidance
    from diffusers.guiders.guider_utils import GuiderOutput
    from diffusers.schedulers.scheduling_utils import SchedulerOutput
    from greenlet import getcurrent, greenlet
except ImportError as error:
    raise ImportError(f"{error}; pip install 'lossary[diffusers]'") from None

_SAMPLERS = {s.__name__: s for s in (euler, heun, ancestral, dpm_solver_pp, sde, predictor_corrector)}

# x_0 = a x_t + b output for each prediction type of diffusers: (a, b) from alpha and sigma. It says what
# `_denoiser.to_clean` says, and apart from it: that one finds its factors anew at each call, in tensors, which triples
# the time of a step of Euler here, and for a flow it differentiates, which inference mode forbids.
_CLEAN: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "epsilon": lambda alpha, sigma: (1 / alpha, -sigma / alpha),
    "sample": lambda alpha, sigma: (0, 1),
    "v_prediction": lambda alpha, sigma: (alpha, -sigma),
    "flow_prediction": lambda alpha, sigma: (1, -sigma),
}


def _trained(scheduler: SchedulerMixin) -> tuple[Process, Callable[[Any, Any], tuple[Any, Any]]]:
    """The process of a scheduler's model, its time being the timestep, and the model's row of `_CLEAN`."""
    config = scheduler.config
    if "shift" in config or config.get("use_flow_sigmas"):
        last = config.num_train_timesteps
        process = Process(lambda t: 1 - t / last, lambda t: t / last, lambda ratio: last * ratio / (1 + ratio))
    elif hasattr(scheduler, "alphas_cumprod"):
        table = scheduler.alphas_cumprod.double()
        if config.get("rescale_betas_zero_snr"):  # the last one is 0, or 2^-24 in the solvers of diffusers
            table = torch.cat([table[:-1], (table[-2:-1] / 2).clamp(max=2**-24)])
        process = tabulated(table)
    else:
        raise ValueError(f"scheduler: expected one with alphas_cumprod or of a flow, got {type(scheduler).__name__}")
    prediction = config.get("prediction_type", "flow_prediction")
    require.one_of("prediction_type", prediction, _CLEAN)
    return process, _CLEAN[prediction]


def _calls(sampler: Callable[..., Tensor], sigmas: Tensor) -> list[int]:
    """At which of these levels a sampler calls the network, found by a run on nothing."""
    place = {level: i for i, level in enumerate(sigmas.tolist())}
    calls: list[int] = []

    def note(x: Tensor, sigma: Any) -> Tensor:
        if float(sigma) not in place:
            raise ValueError(f"sampler: expected calls of the network at levels out of sigmas, got {sigma:g}")
        calls.append(place[float(sigma)])
        return x

    sampler(note, torch.zeros(1, 1, 1, 1), sigmas, generator=Generator())
    return calls


class DiffusersScheduler(DPMSolverMultistepScheduler):
    """A sampler as a pipeline's scheduler: `DiffusersScheduler.from_config(pipe.scheduler.config, sampler="heun")`.

    Noise levels, timesteps and noising are those of `DPMSolverMultistepScheduler`, and so are all settings but the
    first. The sample is x_t = alpha x_0 + sigma noise and starts at variance 1. Between the steps the sampler keeps its
    own x in float32 or wider, whatever the pipeline's dtype; what the pipeline or a callback changes in x_t reaches it.
    Each call of the network is one of `timesteps`. Noise is drawn with one generator for the batch, not a list.

    Args:
        sampler: "euler", "heun", "ancestral", "dpm_solver_pp", "sde", "predictor_corrector", or any
            s(denoise, x, sigmas, *, generator) that calls the network at levels out of sigmas, whatever x. It may
            switch gradients off for itself, but not enter `torch.inference_mode`. Only names can be saved and loaded.
    """

    @register_to_config
    def __init__(
        self,
        sampler: str | Callable[..., Tensor] = "dpm_solver_pp",
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        final_sigmas_type: str = "zero",
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        if not callable(sampler):
            require.one_of("sampler", sampler, _SAMPLERS)
        require.one_of("prediction_type", prediction_type, _CLEAN)
        super().__init__(**{k: v for k, v in self.config.items() if k != "sampler" and not k.startswith("_")})
        self._sampler = sampler if callable(sampler) else _SAMPLERS[sampler]
        self.register_to_config(sampler=getattr(self._sampler, "__name__", repr(sampler)))
        self._run: greenlet | None = None
        self._levels: list[float] = []

    @functools.wraps(DPMSolverMultistepScheduler.set_timesteps)
    def set_timesteps(self, *args: Any, **named: Any) -> None:
        super().set_timesteps(*args, **named)
        alphas, sigmas = self._sigma_to_alpha_sigma_t(self.sigmas.double())
        levels = (sigmas / alphas).tolist()
        if levels != self._levels:
            self._levels, self._calls = levels, _calls(self._sampler, sigmas / alphas)
        self._alphas = alphas[[*self._calls, -1]].tolist()
        clean = _CLEAN[self.config.prediction_type]
        weights = [clean(alpha, sigma) for alpha, sigma in zip(self._alphas, sigmas[self._calls].tolist())]
        self._clean = [(round(a * alpha, 15), b) for (a, b), alpha in zip(weights, self._alphas)]  # of x = x_t / alpha
        # At the last level, where few samplers call the network, the timestep is 0.
        self.timesteps = torch.cat([self.timesteps, self.timesteps.new_zeros(1)])[self._calls]
        self.sigmas = self.sigmas[[*self._calls, -1]]
        self.order = -(-len(self._calls) // self.num_inference_steps)
        self._run = None

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generator | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """x_t for the sampler's next call of the network, or its result, from the network's output at this one."""
        if self._step_index is None:
            self._init_step_index(timestep)
        i: int = self._step_index
        alpha, (a, b) = self._alphas[i], self._clean[i]
        if self._run is None:
            self._start(i, sample, generator)
        elif sample is not self._given or _writes(sample) != self._written:
            self._x += (sample.to(self._x.dtype) - (alpha * self._x).to(sample.dtype)) / alpha
        if model_output.shape != sample.shape:  # some models predict a variance behind it
            model_output = model_output[:, : sample.shape[1]]
        x, output = self._x, model_output.to(self._x.dtype)
        self._x = self._run.switch(torch.add(x if a == 1 else a * x, output, alpha=b))
        self._given = (self._alphas[i + 1] * self._x).to(sample.dtype)
        self._written = _writes(self._given)
        self._step_index = i + 1
        if self._run.dead:
            self._run = self._x = None
        return SchedulerOutput(prev_sample=self._given) if return_dict else (self._given,)

    def _start(self, i: int, sample: Tensor, generator: Generator | None) -> None:
        """Let the sampler run from the level of call i until it makes that call.

        Whether gradients are recorded is up to the thread, not the greenlet: each side finds its own setting again.
        """
        plan = iter([self._levels[place] for place in self._calls[i:]])
        sampler, outside = self._sampler, torch.is_grad_enabled()

        def denoise(x: Tensor, sigma: Any) -> Tensor:
            nonlocal outside
            if float(sigma) != next(plan, None):
                raise ValueError("sampler: expected noise levels that do not depend on x")
            inside = torch.is_grad_enabled()
            changed = inside != outside
            torch.set_grad_enabled(outside)
            try:
                clean = getcurrent().parent.switch(x)
            finally:  # an abandoned run is ended here, whenever that is
                outside = torch.is_grad_enabled()
            if changed:
                torch.set_grad_enabled(inside)
            return clean

        def sample_all(x: Tensor, sigmas: Tensor) -> Tensor:
            try:
                return sampler(denoise, x, sigmas, generator=generator)
            finally:
                torch.set_grad_enabled(outside)

        x = sample.to(torch.promote_types(sample.dtype, torch.float32)) / self._alphas[i]
        if isinstance(generator, Generator) and generator.device.type != x.device.type:
            seed = torch.randint(2**62, (), generator=generator, device=generator.device)
            generator = Generator(x.device).manual_seed(int(seed))
        self._run = greenlet(sample_all)
        self._x = self._run.switch(x, torch.tensor(self._levels[self._calls[i] :], dtype=torch.float64))


def _writes(x: Tensor) -> float:
    """How often x has been written to; in inference mode nobody counts, and x never passes for unchanged."""
    return math.nan if x.is_inference() else x._version


class DiffusersGuider(ClassifierFreeGuidance):
    """A guidance g(cond, uncond, state) as a guider of modular pipelines: `pipe.update_components(guider=...)`.

    The network's outputs become predictions of x_0 for the guidance, and its answer an output again. The state starts
    anew with each sample. Outside [start, stop) of the steps the prediction stays plainly conditional.

    Args:
        guidance: see `lossary.diffusion._guidance`.
        scheduler: the pipeline's, which knows how its model was trained.
        start, stop: fractions of the steps.
    """

    def __init__(self, guidance: Guidance, scheduler: SchedulerMixin, start: float = 0.0, stop: float = 1.0) -> None:
        super().__init__(start=start, stop=stop)
        self.guidance, self.scheduler, self.state = guidance, scheduler, None
        self.process, self._weights = _trained(scheduler)

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        # Pipelines count steps of the sampler here, and calls of the network there.
        super().set_state(step, num_inference_steps * self.scheduler.order, timestep)
        if step == 0:
            self.state = None

    @property
    def num_conditions(self) -> int:
        needs = getattr(self.guidance, "needs", None)
        return 2 if self._is_cfg_enabled() and (needs is None or needs(self.state)) else 1

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Watch for x_t, which pipelines do not pass to guiders."""
        super().prepare_models(denoiser)

        def see(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._x_t = args[0] if args else named.get("hidden_states", named.get("sample"))

        self._watch = denoiser.register_forward_pre_hook(see, with_kwargs=True)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        self._watch.remove()

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        guided = pred_cond
        if self._is_cfg_enabled():
            x = self._x_t[:, : pred_cond.shape[1]]
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            t = torch.as_tensor(self._timestep, dtype=x.dtype, device=x.device)
            a, b = self._weights(self.process.alpha(t), self.process.sigma(t))
            cond, uncond = (None if p is None else a * x + b * p.to(x.dtype) for p in (pred_cond, pred_uncond))
            clean, self.state = self.guidance(cond, uncond, self.state)
            guided = ((clean - a * x) / b).to(pred_cond.dtype)
        return GuiderOutput(pred=guided, pred_cond=pred_cond, pred_uncond=pred_uncond)


class DiffusersDenoiser(nn.Module):
    """A model of diffusers as denoise(x, sigma, *conditions), for our losses and samplers.

    It is called as model(x_t, t, *conditions), x_t in its own dtype; the arithmetic around it is that of x. Levels
    above the highest that it was trained at go to the last timestep. Where that one is pure noise (alpha 0), it counts
    as alpha^2 = 2^-24, a level of 4096, or as half the alpha^2 before it where that is less.

    Args:
        model: a `UNet2DModel`, `UNet2DConditionModel`, `DiTTransformer2DModel` or the like. Where it predicts a
            variance behind the mean, that is left out.
        scheduler: the one that it is trained with, for alphas and prediction type.

    Raises:
        ValueError: a scheduler of another kind, or one whose alphas end in pure noise without its
            `rescale_betas_zero_snr`.
    """

    def __init__(self, model: nn.Module, scheduler: SchedulerMixin) -> None:
        super().__init__()
        self.model = model
        self.process, self._weights = _trained(scheduler)

    def forward(self, x: Tensor, sigma: Tensor | float, *conditions: Any, **named: Any) -> Tensor:
        """x_0, of the shape of x (batch, channels, ...); sigma is (batch,) or a number."""
        t = self.process.time(torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x)))
        alpha, noise = over(self.process.alpha(t), x), over(self.process.sigma(t), x)
        output = self.model((alpha * x).to(self.model.dtype), t, *conditions, return_dict=False, **named)[0]
        a, b = self._weights(alpha, noise)
        return a * alpha * x + b * output[:, : x.shape[1]].to(x.dtype)
