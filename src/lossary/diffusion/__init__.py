"""Diffusion: samples from data by undoing noise.

The engine sees every network as `denoise(x, sigma) -> x_0`, x being data plus noise of standard deviation sigma:

- `_process`: x_t = alpha(t) x_0 + sigma(t) noise (variance preserving and exploding, cosine, flow, bridge,
  mean-reverting, or a trained model's table), and the ratio sigma / alpha that samplers see.
- `_denoiser`: a network that predicts x_0, noise, v, score or velocity as such a denoiser, exactly; the one denoising
  error that losses weight.
- `_samplers`: s(denoise, x, sigmas, *, generator). `_guidance`: g(cond, uncond, state) -> (guided, state).
- `_discrete`: noise on tokens (absorbing, uniform, step by step), its posterior and sampler.
- `_distil`: generators of one or a few steps from a teacher's score, as a procedure.
- `_mixture`, `_chain`: Gaussian mixtures and Markov chains, whose perfect networks are known.

| Your trouble | Try first | Then |
|---|---|---|
"""

from lossary.catalogue import lazy_room

__getattr__, __dir__ = lazy_room(__name__)
