"""What a sampler adds to the network's time at each of its calls, against the diffusers scheduler of the same name.

The loop of a pipeline in 20 steps on latents [1, 4, 64, 64], single precision, one thread, with a network that costs
nothing; CPU time of a round, medians over rounds in which all take turns. "In a pipeline" is our sampler as a
`DiffusersScheduler`, "alone" the same function in its own loop, noise prediction and all. `set_timesteps`, once for a
sample, stands in rows of its own; ours calls the one of DPM-Solver++ first.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lossary.diffusion import _samplers as samplers

STEPS, SHAPE, ROUNDS = 20, (1, 4, 64, 64), 25
PEERS = {
    "euler": ("EulerDiscreteScheduler", "DDIMScheduler"),
    "heun": ("HeunDiscreteScheduler",),
    "ancestral": ("EulerAncestralDiscreteScheduler", "DDPMScheduler"),
    "dpm_solver_pp": ("DPMSolverMultistepScheduler",),
}


def seconds(run: Callable[[], object]) -> float:
    start = time.thread_time()  # without the time for which a busy machine puts us aside
    run()
    return time.thread_time() - start


def loop(scheduler, x: Tensor, output: Tensor, generator: torch.Generator | None) -> None:  # type: ignore[no-untyped-def]
    """A pipeline's loop without its network."""
    drawn = {} if generator is None else {"generator": generator}
    for t in scheduler.timesteps:
        scheduler.scale_model_input(x, t)
        x = scheduler.step(output, t, x, **drawn, return_dict=False)[0]


@torch.no_grad()
def measure() -> list[dict[str, str | float]]:
    """Name, ratio of the median times for each call of the network, target and unit."""
    import diffusers

    from lossary.diffusion._diffusers import DiffusersScheduler

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x, output = torch.randn(2, *SHAPE, generator=generator).unbind()

    def denoise(x: Tensor, sigma: float) -> Tensor:
        return torch.add(x, output, alpha=-sigma)

    rows: list[dict[str, str | float]] = []
    for name, peers in PEERS.items():
        draws = generator if name == "ancestral" else None
        sampler, sigmas = getattr(samplers, name), samplers.karras_sigmas(STEPS)
        schedulers = {"ours": DiffusersScheduler(name), **{peer: getattr(diffusers, peer)() for peer in peers}}
        times: dict[str, list[float]] = {arm: [] for arm in ("alone", *schedulers, *(f"{s}, set" for s in schedulers))}
        for _ in range(ROUNDS):
            times["alone"].append(seconds(partial(sampler, denoise, x, sigmas, generator=draws)))
            for arm, scheduler in schedulers.items():
                times[f"{arm}, set"].append(seconds(partial(scheduler.set_timesteps, STEPS)))
                times[arm].append(seconds(partial(loop, scheduler, x, output, draws)))
        median = {arm: statistics.median(t[1:]) for arm, t in times.items()}  # the first round warms up
        for peer in peers:
            against = f"against {peer}"
            target = "<= 1" if peer == peers[0] else None
            unit = f"times its {1e6 * median[peer] / len(schedulers[peer].timesteps):.0f} us"
            for where, arm in (("in a pipeline", "ours"), ("alone", "alone")):
                ratio = median[arm] / median[peer]
                rows.append({"name": f"{name} {where}, {against}", "ratio": ratio, "target": target, "unit": unit})
        set_ratio = median["ours, set"] / median[f"{peers[0]}, set"]
        unit = f"times its {1e6 * median[f'{peers[0]}, set']:.0f} us"
        name = f"set_timesteps for {name}, against {peers[0]}"
        rows.append({"name": name, "ratio": set_ratio, "target": None, "unit": unit})
    torch.set_num_threads(threads)
    return rows
